#include "linear.h"

#include <algorithm>

#include "expect.h"
#include "panels.h"

namespace pruneofa {
namespace {

// Buffers of one call of a single layer, all tokens padded to panels.
struct Buffers {
  Buffers(const Linear& linear, std::size_t tokens)
      : panels(round_up(static_cast<int>(tokens), kLanes) / kLanes),
        x(static_cast<std::size_t>(panels) * linear.inputs() * kLanes),
        y(static_cast<std::size_t>(panels) * linear.outputs() * kLanes),
        codes(panels * codes_bytes(linear.inputs(), linear.kernels().group_int8)),
        scale(static_cast<std::size_t>(panels) * kLanes),
        zero(static_cast<std::size_t>(panels) * kLanes),
        scratch(scratch_bytes(linear.inputs(), panels * kLanes, 0)) {
    operands.x = linear.is_int8() ? static_cast<const void*>(codes.data()) : x.data();
    operands.scale = scale.data();
    operands.zero = zero.data();
    operands.panels = panels;
    operands.y = y.data();
    operands.y_stride = static_cast<std::ptrdiff_t>(linear.outputs()) * kLanes;
    operands.scratch = scratch.data();
  }

  void run(const Linear& linear) {
    linear.kernels().begin();
    linear.run(operands, 0, linear.outputs());
    linear.kernels().end();
  }

  int panels;
  Aligned<float> x, y;
  Aligned<char> codes;
  Aligned<float> scale;
  Aligned<int32_t> zero;
  Aligned<char> scratch;
  Operands operands;
};

// Codes of x, with the layer's static scale or each token's own.
void quantize(const Linear& linear, Buffers& buffers) {
  const Kernels& kernels = linear.kernels();
  const std::size_t bytes = codes_bytes(linear.inputs(), kernels.group_int8);
  for (int p = 0; p < buffers.panels; ++p) {
    const float* panel = buffers.x.data() + static_cast<std::size_t>(p) * linear.inputs() * kLanes;
    float* scale = buffers.scale.data() + p * kLanes;
    int32_t* zero = buffers.zero.data() + p * kLanes;
    if (linear.is_static()) {
      std::fill(scale, scale + kLanes, linear.input().scale);
      std::fill(zero, zero + kLanes, linear.input().zero);
    } else {
      alignas(64) float range[2 * kLanes] = {};
      kernels.range(panel, linear.inputs(), range);
      kernels.scales(range, 1, 0, scale, zero);
    }
    kernels.encode(panel, 0, linear.inputs(), linear.inputs(), scale, zero, buffers.codes.data() + p * bytes);
  }
}

}  // namespace

Linear::Linear(const PackedLayer& layer, const Kernels& kernels)
    : kernels_(kernels), int8_(layer.codes != nullptr), input_(layer.input) {
  // 255 * 128 * inputs has to fit int32, and an index of a group 16 bits.
  expect(layer.outputs >= 1 && layer.inputs >= 1 && layer.inputs < 1 << 16 && layer.outputs < 1 << 24,
         "a linear layer needs 1 to 65535 inputs and 1 to 16777215 outputs");
  expect(layer.nonzeros >> 32 == 0, "a linear layer can have at most 2^32 - 1 non-zeros");
  const std::vector<std::size_t> begin = row_begins(layer);
  expect(begin.back() == layer.nonzeros,
         "the bitmask of a linear layer has another number of ones than there are values");
  laid_out_.sparsity = 1.0 - static_cast<double>(layer.nonzeros) / (static_cast<double>(layer.outputs) * layer.inputs);
  Weights& weights = laid_out_.weights;
  weights.outputs = layer.outputs;
  weights.inputs = layer.inputs;
  bias_.assign(layer.outputs, 0.0f);
  if (layer.bias != nullptr) bias_.assign(layer.bias, layer.bias + layer.outputs);
  weights.bias = bias_.data();
  if (int8_) {
    scale_.assign(layer.scale, layer.scale + layer.outputs);
    row_sum_.assign(layer.outputs, 0.0f);
    for (int n = 0; n < layer.outputs; ++n) {
      int32_t sum = 0;
      for (std::size_t i = begin[n]; i < begin[n + 1]; ++i) sum += layer.codes[i];
      row_sum_[n] = static_cast<float>(sum);
    }
    weights.scale = scale_.data();
    weights.row_sum = row_sum_.data();
  }
  kernels.lay_out(layer, kernels, laid_out_);
}

void Linear::forward(const float* x, std::size_t tokens, float* out) const {
  Buffers buffers(*this, tokens);
  rows_to_panels(x, tokens, inputs(), buffers.x.data());
  if (int8_) quantize(*this, buffers);
  buffers.run(*this);
  panels_to_rows(buffers.y.data(), tokens, outputs(), out);
}

void Linear::accumulate(const uint8_t* x, std::size_t tokens, int32_t* out) const {
  Buffers buffers(*this, tokens);
  rows_to_codes(x, tokens, inputs(), kernels_.group_int8, kernels_.code_offset, buffers.codes.data());
  Aligned<int32_t> sums(static_cast<std::size_t>(buffers.panels) * outputs() * kLanes);
  buffers.operands.sums = sums.data();
  buffers.run(*this);
  panels_to_rows(sums.data(), tokens, outputs(), out);
}

}  // namespace pruneofa
