#include "linear.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace pruneofa {
namespace {

bool kept(const PackedLayer& layer, int n, int k) {
  const std::size_t row = (static_cast<std::size_t>(layer.inputs) + 7) / 8;
  return (layer.bitmask[n * row + k / 8] >> (k % 8)) & 1;
}

std::size_t count(const uint8_t* bytes, std::size_t size) {
  std::size_t bits = 0;
  for (std::size_t i = 0; i < size; ++i) {
    for (uint8_t b = bytes[i]; b; b &= static_cast<uint8_t>(b - 1)) ++bits;
  }
  return bits;
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

Linear::Linear(const PackedLayer& layer, const Kernels& kernels) : kernels_(kernels), int8_(layer.codes != nullptr) {
  // 255 * 127 * inputs has to fit int32, and an index of a group 16 bits.
  if (layer.outputs < 1 || layer.inputs < 1 || layer.inputs >= 1 << 16 || layer.outputs >= 1 << 24) {
    throw std::invalid_argument("a linear layer needs 1 to 65535 inputs and 1 to 16777215 outputs");
  }
  const std::size_t row = (static_cast<std::size_t>(layer.inputs) + 7) / 8;
  if (count(layer.bitmask, row * layer.outputs) != layer.nonzeros) {
    throw std::invalid_argument("the bitmask of a linear layer has another number of ones than there are values");
  }
  const double weights = static_cast<double>(layer.outputs) * layer.inputs;
  sparsity_ = 1.0 - static_cast<double>(layer.nonzeros) / weights;
  weights_.outputs = layer.outputs;
  weights_.inputs = layer.inputs;
  weights_.sparse = sparsity_ > (int8_ ? kernels.sparse_above : kernels.sparse_above_float);
  bias_.assign(layer.outputs, 0.0f);
  if (layer.bias != nullptr) bias_.assign(layer.bias, layer.bias + layer.outputs);
  weights_.bias = bias_.data();
  if (int8_) {
    scale_.assign(layer.scale, layer.scale + layer.outputs);
    row_sum_.assign(layer.outputs, 0);
    std::size_t value = 0;
    for (int n = 0; n < layer.outputs; ++n) {
      for (int k = 0; k < layer.inputs; ++k) {
        if (kept(layer, n, k)) row_sum_[n] += layer.codes[value++];
      }
    }
    weights_.scale = scale_.data();
    weights_.row_sum = row_sum_.data();
  }
  if (int8_ && kernels.block_int8 == 0) {
    lay_out_tiles(layer);
  } else {
    lay_out_groups(layer, int8_ ? kernels.group_int8 : 1, int8_ ? kernels.block_int8 : kernels.block_float);
  }
}

void Linear::lay_out_tiles(const PackedLayer& layer) {
  const int chunks = round_up(layer.inputs, 64) / 64;
  const int rows = round_up(layer.outputs, 16) / 16;
  std::vector<std::size_t> first(layer.outputs + 1, 0);  // value of each output
  for (int n = 0; n < layer.outputs; ++n) {
    const std::size_t bytes = (static_cast<std::size_t>(layer.inputs) + 7) / 8;
    first[n + 1] = first[n] + count(layer.bitmask + n * bytes, bytes);
  }
  if (weights_.sparse) {
    masks_ = Aligned<uint64_t>(static_cast<std::size_t>(rows) * chunks * 16);
    values_ = Aligned<int8_t>(layer.nonzeros + 64);  // a vector is read at the last non-zero
    row_start_.assign(rows, 0);
  } else {
    values_ = Aligned<int8_t>(static_cast<std::size_t>(rows) * chunks * 1024);
  }
  std::size_t written = 0;
  for (int row = 0; row < rows; ++row) {
    if (weights_.sparse) row_start_[row] = static_cast<uint32_t>(written);
    std::vector<std::size_t> next(first.begin() + row * 16,
                                  first.begin() + (row * 16 + 16 < layer.outputs ? row * 16 + 16 : layer.outputs));
    for (int c = 0; c < chunks; ++c) {
      for (int r = 0; r < static_cast<int>(next.size()); ++r) {
        const std::size_t tile = static_cast<std::size_t>(row) * chunks + c;
        uint64_t mask = 0;
        for (int k = c * 64; k < c * 64 + 64 && k < layer.inputs; ++k) {
          if (!kept(layer, row * 16 + r, k)) continue;
          const int8_t code = layer.codes[next[r]++];
          if (weights_.sparse) {
            mask |= uint64_t{1} << (k % 64);
            values_[written++] = code;
          } else {
            values_[tile * 1024 + r * 64 + k % 64] = code;
          }
        }
        if (weights_.sparse) masks_[tile * 16 + r] = mask;
      }
    }
  }
  weights_.masks = masks_.data();
  weights_.values = values_.data();
  weights_.value_start = row_start_.data();
}

void Linear::lay_out_groups(const PackedLayer& layer, int group, int block) {
  const int groups = (int8_ ? round_up(layer.inputs, 64) : layer.inputs) / group;
  if (!weights_.sparse) {
    words_ = Aligned<uint32_t>(static_cast<std::size_t>(round_up(layer.outputs, block)) * groups);
    std::size_t value = 0;
    for (int n = 0; n < layer.outputs; ++n) {
      for (int k = 0; k < layer.inputs; ++k) {
        if (!kept(layer, n, k)) continue;
        const std::size_t word = static_cast<std::size_t>(n / block * block) * groups + k / group * block + n % block;
        words_[word] |= part(layer, value++, group, k);
      }
    }
    weights_.words = words_.data();
    return;
  }
  row_start_.assign(layer.outputs + 1, 0);
  std::vector<uint16_t> index;
  std::vector<uint32_t> words;
  std::size_t value = 0;
  for (int n = 0; n < layer.outputs; ++n) {
    int last = -1;
    for (int k = 0; k < layer.inputs; ++k) {
      if (!kept(layer, n, k)) continue;
      if (k / group != last) {
        last = k / group;
        index.push_back(static_cast<uint16_t>(last));
        words.push_back(0);
      }
      words.back() |= part(layer, value++, group, k);
    }
    row_start_[n + 1] = static_cast<uint32_t>(words.size());
  }
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
  char text[96];
  const double limit = int8_ ? kernels_.sparse_above : kernels_.sparse_above_float;
  std::snprintf(text, sizeof text, "%s: sparsity %.3f is %s %.2f, where %s skips enough to pay",
                weights_.sparse ? "sparse" : "dense", sparsity_, weights_.sparse ? "above" : "not above", limit,
                kernels_.isa);
  return text;
}

}  // namespace pruneofa
