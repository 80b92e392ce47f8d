// Conversion of the weights of one linear layer from the packed file to the layout of one path.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace pruneofa {

// Static scale and zero point of a layer's input. Scale 0: dynamic, each token has its own.
struct StaticInput {
  float scale = 0;
  int32_t zero = 0;
  bool operator==(const StaticInput& other) const = default;
};

// A layer as stored in the packed file: a bitmask, row by row, and the non-zeros in the same order.
struct PackedLayer {
  int outputs = 0;
  int inputs = 0;
  const uint8_t* bitmask = nullptr;  // [outputs][ceil(inputs / 8)], little-endian bits
  const int8_t* codes = nullptr;     // int8: [non-zeros] ...
  const float* scale = nullptr;      //       ... and [outputs]
  const float* values = nullptr;     // float: [non-zeros]
  const float* bias = nullptr;       // [outputs] or null
  std::size_t nonzeros = 0;
  StaticInput input;                 // int8 only
};

// How the weights of a layer are stored; docs/kernels.md describes each.
enum class Layout {
  kDenseWords,     // blocks of outputs
  kSparseWords,    // for each output, the words of consecutive inputs that have a non-zero
  kGatheredWords,  // for each output, words of any inputs
  kGatheredBy4,    // for every four outputs, words of any inputs
  kDenseTiles,     // AMX: tiles of 16 outputs x 64 inputs
  kSparseTiles,    // AMX: a bitmask for each row of a tile, and the non-zeros
};

// Weights in the layout of a path: the view that kernels read, and the memory that it points into.
struct LaidOut {
  Layout layout = Layout::kDenseWords;
  double sparsity = 0;
  double cost = 0;  // int8 words: cost of the cheapest sparse layout, relative to the dense one
  Weights weights;
  std::vector<uint32_t> row_start;  // of lists and of rows of tiles
  Aligned<uint16_t> index;
  Aligned<uint32_t> words;
  Aligned<uint64_t> masks;
  Aligned<int8_t> values;
};

// Which of the inputs 64 * chunk .. 64 * chunk + 63 of an output are not zero.
uint64_t mask_at(const PackedLayer& layer, int output, int chunk);

// Index of the first value of each output, and the number of values: [outputs + 1].
std::vector<std::size_t> row_begins(const PackedLayer& layer);

// Sets `layout` of float words, or of tiles: sparse if the layer's sparsity is above the path's limit.
void choose_by_sparsity(double limit, Layout dense, Layout sparse, LaidOut& out);

// A readable line that says which layout was chosen and why.
std::string describe(const LaidOut& laid_out, const Kernels& kernels);

}  // namespace pruneofa
