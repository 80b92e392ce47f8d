// A random encoder of two equal layers for paths_check.cc.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "encoder.h"
#include "random_layers.h"

namespace {

using namespace pruneofa;

struct Model {
  Model(int hidden, int heads, int inner, float sparsity, bool int8, bool fixed) : hidden(hidden), heads(heads) {
    const auto linear = [&](int n, int k) {
      const StaticInput input = fixed ? StaticInput{0.025f, 121} : StaticInput{};
      layers.push_back(std::make_unique<Layer>(n, k, sparsity, Layer::kRandom, int8, input));
      const float size = 1 / std::sqrt(std::max(k * (1 - sparsity), 1.0f));
      for (float& value : layers.back()->values) value *= size;
      for (float& value : layers.back()->scale) value *= 2 * size;
      for (float& value : layers.back()->bias) value *= 0.1f;
    };
    for (int i = 0; i < 4; ++i) linear(hidden, hidden);
    linear(inner, hidden);
    linear(hidden, inner);
    for (int i = 0; i < 60 * hidden; ++i) words.push_back(normal());
    for (int i = 0; i < hidden; ++i) norm.gamma.push_back(real(0.5f, 1.5f)), norm.beta.push_back(0.1f * normal());
    for (int i = 0; i < heads * (2 * 33 - 1); ++i) distances.push_back(normal());
  }

  Encoder build(const Kernels& kernels) const {
    pruneofa::Layer made;
    std::shared_ptr<const Linear>* parts[] = {&made.query, &made.key, &made.value, &made.attention_output,
                                              &made.intermediate, &made.output};
    for (int i = 0; i < 6; ++i) *parts[i] = std::make_shared<const Linear>(layers[i]->packed, kernels);
    made.attention_norm = made.output_norm = norm;
    Table table;
    table.values = words.data(), table.rows = 60;
    EncoderOptions options;
    options.hidden = hidden, options.heads = heads, options.epsilon = 1e-12f;
    RelativeBias bias = heads > 3 ? RelativeBias(distances.data(), heads, 33) : RelativeBias();
    return Encoder(options, table, table, Table(), norm, std::move(bias), {made, made}, kernels);
  }

  int hidden, heads;
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<float> words, distances;
  Norm norm;
};

}  // namespace
