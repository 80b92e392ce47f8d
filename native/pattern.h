// Products with a weight matrix of which only the entries of a fixed pattern are not zero, for training in float32. The
// values are read from the dense matrix in every call: between two calls an optimizer changes them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace pruneofa {

// Immutable: threads may use it at the same time. Results depend on the sizes and on the path, not on `threads`.
class Pattern {
 public:
  // kept: [outputs][inputs]. Throws std::invalid_argument when a size is out of range.
  Pattern(const bool* kept, std::size_t outputs, std::size_t inputs, const Kernels& kernels);

  int outputs() const { return rows_.entries.rows; }
  int inputs() const { return rows_.entries.columns; }

  // y = x W^T + bias. x: [tokens][inputs], weight: [outputs][inputs], bias: [outputs] or null, y: [tokens][outputs].
  void multiply(const float* x, std::size_t tokens, const float* weight, const float* bias, float* y,
                int threads) const;
  // dx = dy W. dy: [tokens][outputs], dx: [tokens][inputs].
  void multiply_transposed(const float* dy, std::size_t tokens, const float* weight, float* dx, int threads) const;
  // dw = dy^T x where a weight is kept, else +0. dw: [outputs][inputs].
  void weight_gradient(const float* x, const float* dy, std::size_t tokens, float* dw, int threads) const;

 private:
  struct Lists {
    std::vector<uint32_t> row_start;
    std::vector<uint16_t> index;
    Entries entries;  // points into these two
  };
  void multiply(const Lists& lists, const float* values, const float* bias, const float* x, std::size_t tokens,
                float* y, int threads) const;

  const Kernels& kernels_;
  Lists rows_, columns_;                       // of the matrix, and of its transpose
  std::vector<uint32_t> transposed_position_;  // for each entry of rows_, its position in columns_
};

}  // namespace pruneofa
