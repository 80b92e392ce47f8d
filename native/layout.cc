#include "layout.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace pruneofa {
namespace {

// The bits of the weight of input k, at its position in a word of `group` inputs.
uint32_t bits_in_word(const PackedLayer& layer, std::size_t value, int group, int k) {
  if (layer.codes == nullptr) {
    uint32_t bits;
    std::memcpy(&bits, layer.values + value, sizeof bits);
    return bits;
  }
  const int code = layer.codes[value];
  if (group == 2) return static_cast<uint32_t>(static_cast<uint16_t>(static_cast<int16_t>(code))) << (16 * (k % 2));
  return static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(code))) << (8 * (k % 4));
}

// Chooses the layout of int8 words with the lowest cost. The unit is the cost of one word of a plain sparse list
// (kSparseWords). The cost of the dense layout is that of an unstructured layer with the sparsity `sparse_above`, at
// which the two were measured to be equally fast.
void choose_by_cost(const PackedLayer& layer, const Kernels& kernels, LaidOut& out) {
  const int group = kernels.group_int8;
  const double gathered = kernels.gathered, gathered_by_4 = kernels.gathered_by_4;
  const uint64_t first = group == 4 ? 0x1111111111111111u : 0x5555555555555555u;  // inputs that begin a word
  std::size_t words = 0, entries[2] = {0, 0};                                     // entries: of one output, of four
  const auto round_to_entries = [group](int inputs) { return static_cast<std::size_t>((inputs + group - 1) / group); };
  for (int n = 0; n < layer.outputs; n += 4) {
    int kept[4] = {0, 0, 0, 0}, kept_by_any = 0;
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      uint64_t any = 0;
      for (int r = 0; r < 4 && n + r < layer.outputs; ++r) {
        const uint64_t mask = mask_at(layer, n + r, c);
        uint64_t word = mask | mask >> 1;
        if (group == 4) word |= word >> 2;
        words += std::popcount(word & first);
        kept[r] += std::popcount(mask);
        any |= mask;
      }
      kept_by_any += std::popcount(any);
    }
    for (int inputs : kept) entries[0] += round_to_entries(inputs);
    entries[1] += round_to_entries(kept_by_any);
  }
  double best = static_cast<double>(words);
  out.layout = Layout::kSparseWords;
  if (gathered > 0 && entries[0] * gathered < best) {
    best = entries[0] * gathered;
    out.layout = Layout::kGatheredWords;
  }
  if (gathered_by_4 > 0 && entries[1] * gathered_by_4 < best) {
    best = entries[1] * gathered_by_4;
    out.layout = Layout::kGatheredBy4;
  }
  const double kept = 1.0 - kernels.sparse_above;  // at the limit
  double dense = 1.0 - std::pow(kernels.sparse_above, group);
  if (gathered > 0) dense = std::min(dense, kept * gathered);
  out.cost = best / (dense * layer.outputs * static_cast<double>(round_to_entries(layer.inputs)));
  if (!(out.cost < 1.0)) out.layout = Layout::kDenseWords;
}

void store_lists(const std::vector<uint16_t>& index, const std::vector<uint32_t>& words, LaidOut& out) {
  out.index = Aligned<uint16_t>(index.size());
  out.words = Aligned<uint32_t>(words.size());
  if (!words.empty()) {
    std::memcpy(out.index.data(), index.data(), index.size() * sizeof(uint16_t));
    std::memcpy(out.words.data(), words.data(), words.size() * sizeof(uint32_t));
  }
  out.weights.row_start = out.row_start.data();
  out.weights.index = out.index.data();
  out.weights.words = out.words.data();
}

void lay_out_dense(const PackedLayer& layer, int group, int groups, int block, LaidOut& out) {
  out.words = Aligned<uint32_t>(static_cast<std::size_t>(round_up(layer.outputs, block)) * groups);
  std::size_t value = 0;
  for (int n = 0; n < layer.outputs; ++n) {
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      for (uint64_t left = mask_at(layer, n, c); left; left &= left - 1) {
        const int k = c * 64 + std::countr_zero(left);
        const std::size_t place =
            static_cast<std::size_t>(n / block * block) * groups + k / group * block + n % block;
        out.words[place] |= bits_in_word(layer, value++, group, k);
      }
    }
  }
  out.weights.words = out.words.data();
}

void lay_out_sparse(const PackedLayer& layer, int group, LaidOut& out) {
  out.row_start.assign(layer.outputs + 1, 0);
  std::vector<uint16_t> index;
  std::vector<uint32_t> words;
  std::size_t value = 0;
  for (int n = 0; n < layer.outputs; ++n) {
    int last = -1;
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      for (uint64_t left = mask_at(layer, n, c); left; left &= left - 1) {
        const int k = c * 64 + std::countr_zero(left), g = k / group;
        const uint32_t bits = bits_in_word(layer, value++, group, k);
        if (g != last) {
          index.push_back(static_cast<uint16_t>(g));
          words.push_back(bits);
        } else {
          words.back() |= bits;
        }
        last = g;
      }
    }
    out.row_start[n + 1] = static_cast<uint32_t>(words.size());
  }
  store_lists(index, words, out);
}

void lay_out_gathered(const PackedLayer& layer, int group, int shared, LaidOut& out) {
  const std::vector<std::size_t> begin = row_begins(layer);
  std::vector<uint16_t> index;
  std::vector<uint32_t> words;
  index.reserve(layer.nonzeros + layer.nonzeros / 8);
  words.reserve(layer.nonzeros / group + layer.outputs);
  out.row_start.assign(round_up(layer.outputs, shared) / shared + 1, 0);
  for (int n = 0; n < layer.outputs; n += shared) {
    std::size_t next[4] = {0, 0, 0, 0};
    for (int r = 0; r < shared && n + r < layer.outputs; ++r) next[r] = begin[n + r];
    int taken = 0;  // inputs in this list so far
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      uint64_t mask[4] = {0, 0, 0, 0}, any = 0;
      for (int r = 0; r < shared && n + r < layer.outputs; ++r) any |= mask[r] = mask_at(layer, n + r, c);
      for (; any; any &= any - 1, ++taken) {
        const int bit = std::countr_zero(any);
        if (taken % group == 0) words.resize(words.size() + shared);
        index.push_back(static_cast<uint16_t>(c * 64 + bit));
        for (int r = 0; r < shared; ++r) {
          if ((mask[r] >> bit & 1) == 0) continue;
          words[words.size() - shared + r] |= bits_in_word(layer, next[r]++, group, taken % group);
        }
      }
    }
    for (; taken % group != 0; ++taken) index.push_back(index.back());  // with a weight of zero
    out.row_start[n / shared + 1] = static_cast<uint32_t>(words.size() / shared);
  }
  out.weights.shared = shared;
  store_lists(index, words, out);
}

}  // namespace

uint64_t mask_at(const PackedLayer& layer, int output, int chunk) {
  const std::size_t row = (static_cast<std::size_t>(layer.inputs) + 7) / 8, at = static_cast<std::size_t>(chunk) * 8;
  uint64_t mask = 0;
  for (std::size_t i = at; i < row && i < at + 8; ++i) {
    mask |= static_cast<uint64_t>(layer.bitmask[output * row + i]) << (8 * (i - at));
  }
  return mask;
}

std::vector<std::size_t> row_begins(const PackedLayer& layer) {
  std::vector<std::size_t> begin(static_cast<std::size_t>(layer.outputs) + 1, 0);
  for (int n = 0; n < layer.outputs; ++n) {
    begin[n + 1] = begin[n];
    for (int c = 0; c * 64 < layer.inputs; ++c) begin[n + 1] += std::popcount(mask_at(layer, n, c));
  }
  return begin;
}

void choose_by_sparsity(double limit, Layout dense, Layout sparse, LaidOut& out) {
  out.layout = out.sparsity > limit ? sparse : dense;
}

void lay_out_words(const PackedLayer& layer, const Kernels& kernels, LaidOut& out) {
  const bool int8 = layer.codes != nullptr;
  if (int8) {
    choose_by_cost(layer, kernels, out);
  } else {
    choose_by_sparsity(kernels.sparse_above_float, Layout::kDenseWords, Layout::kSparseWords, out);
  }
  const int group = int8 ? kernels.group_int8 : 1;
  out.weights.sparse = out.layout != Layout::kDenseWords;
  if (out.layout == Layout::kDenseWords) {
    const int groups = (int8 ? round_up(layer.inputs, 64) : layer.inputs) / group;
    return lay_out_dense(layer, group, groups, int8 ? kernels.block_int8 : kernels.block_float, out);
  }
  if (out.layout == Layout::kSparseWords) return lay_out_sparse(layer, group, out);
  lay_out_gathered(layer, group, out.layout == Layout::kGatheredBy4 ? 4 : 1, out);
}

std::string describe(const LaidOut& laid_out, const Kernels& kernels) {
  const Layout layout = laid_out.layout;
  const bool int8 = laid_out.weights.scale != nullptr;
  const bool tiles = layout == Layout::kDenseTiles || layout == Layout::kSparseTiles;
  const double zeros = 100 * laid_out.sparsity;
  char text[160];
  if (!int8 || tiles) {
    const double limit = 100 * (int8 ? kernels.sparse_above : kernels.sparse_above_float);
    std::snprintf(text, sizeof text, "%s: %.1f %% zeros, %s the %.0f %% from which skipping them is faster",
                  laid_out.weights.sparse ? "sparse" : "dense", zeros, laid_out.weights.sparse ? "above" : "not above",
                  limit);
  } else if (layout == Layout::kDenseWords) {
    std::snprintf(text, sizeof text, "dense: %.1f %% zeros; estimated time of skipping them %.0f %% of that of dense",
                  zeros, 100 * laid_out.cost);
  } else {
    std::snprintf(text, sizeof text, "%s, %d %s inputs: %.1f %% zeros; estimated time %.0f %% of that of dense",
                  layout == Layout::kGatheredBy4 ? "sparse blocks of 4 outputs" : "sparse", kernels.group_int8,
                  layout == Layout::kSparseWords ? "consecutive" : "gathered", zeros, 100 * laid_out.cost);
  }
  return text;
}

}  // namespace pruneofa
