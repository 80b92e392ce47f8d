// One linear layer, laid out at construction for the kernels of one path.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace pruneofa {

// Scale and zero point of everything a layer reads, where they are known beforehand; scale 0: found for each token.
struct StaticInput {
  float scale = 0;
  int32_t zero = 0;
  bool operator==(const StaticInput& other) const { return scale == other.scale && zero == other.zero; }
};

// A layer as the packed file has it: a bitmask, row by row, and the non-zeros in its order.
struct PackedLayer {
  int outputs = 0;
  int inputs = 0;
  const uint8_t* bitmask = nullptr;      // [outputs][ceil(inputs / 8)], little-endian bits
  const int8_t* codes = nullptr;         // int8: [non-zeros] ...
  const float* scale = nullptr;          //       ... and [outputs]
  const float* values = nullptr;         // float: [non-zeros]
  const float* bias = nullptr;           // [outputs] or null
  std::size_t nonzeros = 0;
  StaticInput input;                     // int8 only
};

class Linear {
 public:
  // Throws std::invalid_argument when the mask and the number of values disagree or a size is out of range.
  Linear(const PackedLayer& layer, const Kernels& kernels);

  int outputs() const { return weights_.outputs; }
  int inputs() const { return weights_.inputs; }
  bool is_int8() const { return int8_; }
  bool is_static() const { return input_.scale > 0; }
  const StaticInput& input() const { return input_; }
  double sparsity() const { return sparsity_; }
  const Kernels& kernels() const { return kernels_; }
  std::string choice() const;

  // Rows [begin, end) of y; `begin` is a multiple of 16.
  void run(const Operands& operands, int begin, int end) const {
    (int8_ ? kernels_.linear_int8 : kernels_.linear_float)(weights_, operands, begin, end);
  }

 private:
  void choose(const PackedLayer& layer);
  void lay_out_tiles(const PackedLayer& layer, const std::vector<std::size_t>& begin);
  void lay_out_groups(const PackedLayer& layer, int group, int block);
  void lay_out_gathered(const PackedLayer& layer, const std::vector<std::size_t>& begin, int group);
  void keep_lists(const std::vector<uint16_t>& index, const std::vector<uint32_t>& words);

  const Kernels& kernels_;
  bool int8_;
  StaticInput input_;
  double sparsity_;
  double cost_ = 0;  // of the best sparse layout of int8 words, in those of the dense one
  Weights weights_;
  std::vector<uint32_t> row_start_;
  Aligned<uint16_t> index_;
  Aligned<uint32_t> words_;
  Aligned<uint64_t> masks_;
  Aligned<int8_t> values_;
  std::vector<float> scale_, bias_, row_sum_;
};

}  // namespace pruneofa
