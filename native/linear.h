// One linear layer; the constructor converts its weights to the layout of one path.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace pruneofa {

class Linear {
 public:
  // Throws std::invalid_argument when the mask and the number of values disagree or a size is out of range.
  Linear(const PackedLayer& layer, const Kernels& kernels);

  int outputs() const { return laid_out_.weights.outputs; }
  int inputs() const { return laid_out_.weights.inputs; }
  bool is_int8() const { return int8_; }
  bool is_static() const { return input_.scale > 0; }
  const StaticInput& input() const { return input_; }
  double sparsity() const { return laid_out_.sparsity; }
  const Kernels& kernels() const { return kernels_; }
  std::string choice() const { return describe(laid_out_, kernels_); }

  // Rows [begin, end) of y; `begin` is a multiple of 16.
  void run(const Operands& operands, int begin, int end) const {
    (int8_ ? kernels_.linear_int8 : kernels_.linear_float)(laid_out_.weights, operands, begin, end);
  }

  // Computes this layer only, on one thread. x: [tokens][inputs], out: [tokens][outputs], both row-major.
  void forward(const float* x, std::size_t tokens, float* out) const;
  // The raw sums of codes 0..255; int8 only.
  void accumulate(const uint8_t* x, std::size_t tokens, int32_t* out) const;

 private:
  const Kernels& kernels_;
  bool int8_;
  StaticInput input_;
  LaidOut laid_out_;
  std::vector<float> scale_, bias_, row_sum_;
};

}  // namespace pruneofa
