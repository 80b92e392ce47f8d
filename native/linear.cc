#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace pruneofa {
namespace {

int popcount(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_popcountll(bits);
#else
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
#endif
}

int lowest(uint64_t bits) { return popcount((bits & (~bits + 1)) - 1); }

// Which of the inputs 64 * chunk .. 64 * chunk + 63 of output n are not zero.
uint64_t mask_at(const PackedLayer& layer, int n, int chunk) {
  const std::size_t row = (static_cast<std::size_t>(layer.inputs) + 7) / 8, at = static_cast<std::size_t>(chunk) * 8;
  uint64_t mask = 0;
  for (std::size_t i = at; i < row && i < at + 8; ++i) {
    mask |= static_cast<uint64_t>(layer.bitmask[n * row + i]) << (8 * (i - at));
  }
  return mask;
}

// Where the values of each output begin, and the end.
std::vector<std::size_t> row_begins(const PackedLayer& layer) {
  std::vector<std::size_t> begin(static_cast<std::size_t>(layer.outputs) + 1, 0);
  for (int n = 0; n < layer.outputs; ++n) {
    begin[n + 1] = begin[n];
    for (int c = 0; c * 64 < layer.inputs; ++c) begin[n + 1] += popcount(mask_at(layer, n, c));
  }
  return begin;
}

// The bits of input k of a word that holds `group` inputs.
uint32_t part(const PackedLayer& layer, std::size_t value, int group, int k) {
  if (layer.codes == nullptr) {
    uint32_t bits;
    std::memcpy(&bits, layer.values + value, sizeof bits);
    return bits;
  }
  const int code = layer.codes[value];
  if (group == 2) return static_cast<uint32_t>(static_cast<uint16_t>(static_cast<int16_t>(code))) << (16 * (k % 2));
  return static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(code))) << (8 * (k % 4));
}

}  // namespace

Linear::Linear(const PackedLayer& layer, const Kernels& kernels)
    : kernels_(kernels), int8_(layer.codes != nullptr), input_(layer.input) {
  // 255 * 128 * inputs has to fit int32, and an index of a group 16 bits.
  if (layer.outputs < 1 || layer.inputs < 1 || layer.inputs >= 1 << 16 || layer.outputs >= 1 << 24) {
    throw std::invalid_argument("a linear layer needs 1 to 65535 inputs and 1 to 16777215 outputs");
  }
  if (layer.nonzeros >> 32 != 0) throw std::invalid_argument("a linear layer can have at most 2^32 - 1 non-zeros");
  const std::vector<std::size_t> begin = row_begins(layer);
  if (begin.back() != layer.nonzeros) {
    throw std::invalid_argument("the bitmask of a linear layer has another number of ones than there are values");
  }
  const double weights = static_cast<double>(layer.outputs) * layer.inputs;
  sparsity_ = 1.0 - static_cast<double>(layer.nonzeros) / weights;
  weights_.outputs = layer.outputs;
  weights_.inputs = layer.inputs;
  if (int8_ && kernels.block_int8 > 0) {
    choose(layer);
  } else {
    weights_.sparse = sparsity_ > (int8_ ? kernels.sparse_above : kernels.sparse_above_float);
  }
  bias_.assign(layer.outputs, 0.0f);
  if (layer.bias != nullptr) bias_.assign(layer.bias, layer.bias + layer.outputs);
  weights_.bias = bias_.data();
  if (int8_) {
    scale_.assign(layer.scale, layer.scale + layer.outputs);
    row_sum_.assign(layer.outputs, 0.0f);
    for (int n = 0; n < layer.outputs; ++n) {
      int32_t sum = 0;
      for (std::size_t i = begin[n]; i < begin[n + 1]; ++i) sum += layer.codes[i];
      row_sum_[n] = static_cast<float>(sum);
    }
    weights_.scale = scale_.data();
    weights_.row_sum = row_sum_.data();
  }
  if (int8_ && kernels.block_int8 == 0) {
    lay_out_tiles(layer, begin);
  } else if (weights_.shared > 0) {
    lay_out_gathered(layer, begin, kernels.group_int8);
  } else {
    lay_out_groups(layer, int8_ ? kernels.group_int8 : 1, int8_ ? kernels.block_int8 : kernels.block_float);
  }
}

// Which layout of int8 words does the least work, in words of a plain list. A dense layer counts as much as an
// unstructured one at the sparsity where the two were measured to be equally fast.
void Linear::choose(const PackedLayer& layer) {
  const int group = kernels_.group_int8;
  const double gathered = kernels_.gathered, gathered_by_4 = kernels_.gathered_by_4;
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
        words += popcount(word & first);
        kept[r] += popcount(mask);
        any |= mask;
      }
      kept_by_any += popcount(any);
    }
    for (int inputs : kept) entries[0] += round_to_entries(inputs);
    entries[1] += round_to_entries(kept_by_any);
  }
  double best = static_cast<double>(words);
  if (gathered > 0 && entries[0] * gathered < best) {
    best = entries[0] * gathered;
    weights_.shared = 1;
  }
  if (gathered_by_4 > 0 && entries[1] * gathered_by_4 < best) {
    best = entries[1] * gathered_by_4;
    weights_.shared = 4;
  }
  const double kept = 1.0 - kernels_.sparse_above;  // at the limit
  double dense = 1.0 - std::pow(kernels_.sparse_above, group);
  if (gathered > 0) dense = std::min(dense, kept * gathered);
  cost_ = best / (dense * layer.outputs * static_cast<double>(round_to_entries(layer.inputs)));
  weights_.sparse = cost_ < 1.0;
  if (!weights_.sparse) weights_.shared = 0;
}

void Linear::lay_out_tiles(const PackedLayer& layer, const std::vector<std::size_t>& begin) {
  const int chunks = round_up(layer.inputs, 64) / 64;
  const int rows = round_up(layer.outputs, 16) / 16;
  if (weights_.sparse) {
    masks_ = Aligned<uint64_t>(static_cast<std::size_t>(rows) * chunks * 16);
    values_ = Aligned<int8_t>(layer.nonzeros + 64);  // a vector is read at the last non-zero
    row_start_.assign(rows + 1, static_cast<uint32_t>(layer.nonzeros));
  } else {
    values_ = Aligned<int8_t>(static_cast<std::size_t>(rows) * chunks * 1024);
  }
  std::size_t written = 0;
  weights_.short_runs = true;
  for (int row = 0; row < rows; ++row) {
    if (weights_.sparse) row_start_[row] = static_cast<uint32_t>(written);
    const int count = layer.outputs - row * 16 < 16 ? layer.outputs - row * 16 : 16;
    std::size_t next[16];
    for (int r = 0; r < count; ++r) next[r] = begin[row * 16 + r];
    for (int c = 0; c < chunks; ++c) {
      const std::size_t tile = static_cast<std::size_t>(row) * chunks + c;
      for (int r = 0; r < count; ++r) {
        const uint64_t mask = mask_at(layer, row * 16 + r, c);
        if (weights_.sparse) {
          const int found = popcount(mask);
          masks_[tile * 16 + r] = mask;
          weights_.short_runs = weights_.short_runs && found <= 32;
          std::memcpy(values_.data() + written, layer.codes + next[r], found);
          written += found;
          next[r] += found;
        } else {
          int8_t* to = values_.data() + tile * 1024 + r * 64;
          for (uint64_t left = mask; left; left &= left - 1) to[lowest(left)] = layer.codes[next[r]++];
        }
      }
    }
  }
  weights_.masks = masks_.data();
  weights_.values = values_.data();
  weights_.value_start = row_start_.data();
}

void Linear::lay_out_groups(const PackedLayer& layer, int group, int block) {
  const int groups = (int8_ ? round_up(layer.inputs, 64) : layer.inputs) / group;
  if (!weights_.sparse) words_ = Aligned<uint32_t>(static_cast<std::size_t>(round_up(layer.outputs, block)) * groups);
  row_start_.assign(layer.outputs + 1, 0);
  std::vector<uint16_t> index;
  std::vector<uint32_t> words;
  std::size_t value = 0;
  for (int n = 0; n < layer.outputs; ++n) {
    int last = -1;
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      for (uint64_t left = mask_at(layer, n, c); left; left &= left - 1) {
        const int k = c * 64 + lowest(left), g = k / group;
        const uint32_t bits = part(layer, value++, group, k);
        if (!weights_.sparse) {
          words_[static_cast<std::size_t>(n / block * block) * groups + g * block + n % block] |= bits;
        } else if (g != last) {
          index.push_back(static_cast<uint16_t>(g));
          words.push_back(bits);
        } else {
          words.back() |= bits;
        }
        last = g;
      }
    }
    row_start_[n + 1] = static_cast<uint32_t>(words.size());
  }
  if (weights_.sparse) return keep_lists(index, words);
  weights_.words = words_.data();
}

void Linear::lay_out_gathered(const PackedLayer& layer, const std::vector<std::size_t>& begin, int group) {
  const int shared = weights_.shared;
  std::vector<uint16_t> index;
  std::vector<uint32_t> words;
  index.reserve(layer.nonzeros + layer.nonzeros / 8);
  words.reserve(layer.nonzeros / group + layer.outputs);
  row_start_.assign(round_up(layer.outputs, shared) / shared + 1, 0);
  for (int n = 0; n < layer.outputs; n += shared) {
    std::size_t next[4] = {0, 0, 0, 0};
    for (int r = 0; r < shared && n + r < layer.outputs; ++r) next[r] = begin[n + r];
    int taken = 0;  // inputs of this list
    for (int c = 0; c * 64 < layer.inputs; ++c) {
      uint64_t mask[4] = {0, 0, 0, 0}, any = 0;
      for (int r = 0; r < shared && n + r < layer.outputs; ++r) any |= mask[r] = mask_at(layer, n + r, c);
      for (; any; any &= any - 1, ++taken) {
        const int bit = lowest(any);
        if (taken % group == 0) words.resize(words.size() + shared);
        index.push_back(static_cast<uint16_t>(c * 64 + bit));
        for (int r = 0; r < shared; ++r) {
          if (mask[r] >> bit & 1) words[words.size() - shared + r] |= part(layer, next[r]++, group, taken % group);
        }
      }
    }
    for (; taken % group != 0; ++taken) index.push_back(index.back());  // with a weight of zero
    row_start_[n / shared + 1] = static_cast<uint32_t>(words.size() / shared);
  }
  keep_lists(index, words);
}

void Linear::keep_lists(const std::vector<uint16_t>& index, const std::vector<uint32_t>& words) {
  index_ = Aligned<uint16_t>(index.size());
  words_ = Aligned<uint32_t>(words.size());
  if (!words.empty()) {
    std::memcpy(index_.data(), index.data(), index.size() * sizeof(uint16_t));
    std::memcpy(words_.data(), words.data(), words.size() * sizeof(uint32_t));
  }
  weights_.row_start = row_start_.data();
  weights_.index = index_.data();
  weights_.words = words_.data();
}

std::string Linear::choice() const {
  char text[160];
  if (int8_ && kernels_.block_int8 > 0) {
    if (!weights_.sparse) {
      std::snprintf(text, sizeof text, "dense: sparsity %.3f; skipping zeros would cost %.2f times as much with %s",
                    sparsity_, cost_, kernels_.isa);
      return text;
    }
    std::snprintf(text, sizeof text, "%s: sparsity %.3f; words of %s%d %sinputs cost %.2f of dense with %s",
                  weights_.shared == 4 ? "sparse blocks of 4 outputs" : "sparse", sparsity_,
                  weights_.shared ? "any " : "", kernels_.group_int8, weights_.shared ? "" : "consecutive ", cost_,
                  kernels_.isa);
    return text;
  }
  const double limit = int8_ ? kernels_.sparse_above : kernels_.sparse_above_float;
  std::snprintf(text, sizeof text, "%s: sparsity %.3f is %s %.2f, where %s skips enough to pay",
                weights_.sparse ? "sparse" : "dense", sparsity_, weights_.sparse ? "above" : "not above", limit,
                kernels_.isa);
  return text;
}

}  // namespace pruneofa
