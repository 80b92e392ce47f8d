// Plain C++, apart from amx.cc, so that no function of the standard library is compiled for AVX-512.
#include "x86/amx_layout.h"

#include <bit>
#include <cstring>

#include "layout.h"

namespace pruneofa {
namespace {

void lay_out_tiles(const PackedLayer& layer, LaidOut& out) {
  const bool sparse = out.layout == Layout::kSparseTiles;
  const std::vector<std::size_t> begin = row_begins(layer);
  const int chunks = round_up(layer.inputs, 64) / 64;
  const int rows = round_up(layer.outputs, 16) / 16;
  if (sparse) {
    out.masks = Aligned<uint64_t>(static_cast<std::size_t>(rows) * chunks * 16);
    out.values = Aligned<int8_t>(layer.nonzeros + 64);  // a vector is read at the last non-zero
    out.row_start.assign(rows + 1, static_cast<uint32_t>(layer.nonzeros));
  } else {
    out.values = Aligned<int8_t>(static_cast<std::size_t>(rows) * chunks * 1024);
  }
  std::size_t written = 0;
  out.weights.sparse = sparse;
  out.weights.short_runs = true;
  for (int row = 0; row < rows; ++row) {
    if (sparse) out.row_start[row] = static_cast<uint32_t>(written);
    const int count = layer.outputs - row * 16 < 16 ? layer.outputs - row * 16 : 16;
    std::size_t next[16];
    for (int r = 0; r < count; ++r) next[r] = begin[row * 16 + r];
    for (int c = 0; c < chunks; ++c) {
      const std::size_t tile = static_cast<std::size_t>(row) * chunks + c;
      for (int r = 0; r < count; ++r) {
        const uint64_t mask = mask_at(layer, row * 16 + r, c);
        if (sparse) {
          const int found = std::popcount(mask);
          out.masks[tile * 16 + r] = mask;
          out.weights.short_runs = out.weights.short_runs && found <= 32;
          std::memcpy(out.values.data() + written, layer.codes + next[r], found);
          written += found;
          next[r] += found;
        } else {
          int8_t* to = out.values.data() + tile * 1024 + r * 64;
          for (uint64_t left = mask; left; left &= left - 1) to[std::countr_zero(left)] = layer.codes[next[r]++];
        }
      }
    }
  }
  out.weights.masks = out.masks.data();
  out.weights.values = out.values.data();
  out.weights.value_start = out.row_start.data();
}

}  // namespace

void lay_out_amx(const PackedLayer& layer, const Kernels& kernels, LaidOut& out) {
  if (layer.codes == nullptr) return lay_out_words(layer, kernels, out);
  choose_by_sparsity(kernels.sparse_above, Layout::kDenseTiles, Layout::kSparseTiles, out);
  lay_out_tiles(layer, out);
}

}  // namespace pruneofa
