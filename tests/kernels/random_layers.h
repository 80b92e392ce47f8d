// Random layers and numbers for paths_check.cc.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace {

using namespace pruneofa;

std::mt19937 random_bits;

int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }
float normal() { return std::normal_distribution<float>()(random_bits); }
int one_of(std::initializer_list<int> values) { return values.begin()[whole(0, static_cast<int>(values.size()) - 1)]; }

void expect(bool holds, const Kernels& path, const char* what, const std::string& where = "") {
  if (holds) return;
  std::fprintf(stderr, "%s: %s %s\n", path.isa, what, where.c_str());
  std::exit(1);
}

bool same_bits(const void* a, const void* b, std::size_t bytes) { return std::memcmp(a, b, bytes) == 0; }

template <class T>
Aligned<T> filled(std::size_t count, const std::function<T()>& value) {
  Aligned<T> made(count);
  for (std::size_t i = 0; i < count; ++i) made[i] = value();
  return made;
}

template <class T>
Aligned<T> copy(const Aligned<T>& from) {
  Aligned<T> made(from.size());
  std::memcpy(made.data(), from.data(), from.size() * sizeof(T));
  return made;
}

// A layer as the packed file has it. A kept weight may be 0.
struct Layer {
  enum Fill { kRandom, kExtremes, kFour, kInFour, kEmptyRows, kFills };

  Layer(int outputs, int inputs, float sparsity, int fill, bool int8, StaticInput input = {})
      : n(outputs), k(inputs), weight(std::size_t{1} * n * k), bitmask(std::size_t{1} * n * ((k + 7) / 8)) {
    std::vector<bool> dropped(static_cast<std::size_t>(n) * k);
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c < k; ++c) {
        const bool first = (fill != kFour || r % 4 == 0) && (fill != kInFour || c % 4 == 0);
        const std::size_t at = static_cast<std::size_t>(r) * k + c;
        dropped[at] = first ? real(0, 1) < sparsity : fill == kFour ? dropped[at - k] : dropped[at - 1];
        if (fill == kEmptyRows && r % 2 == 0) dropped[at] = true;
        if (dropped[at]) continue;
        bitmask[static_cast<std::size_t>(r) * ((k + 7) / 8) + c / 8] |= 1 << c % 8;
        codes.push_back(static_cast<int8_t>(fill == kExtremes ? one_of({-128, 0, 127}) : whole(-128, 127)));
        values.push_back(normal());
        weight[at] = int8 ? codes.back() : values.back();
      }
    }
    for (int r = 0; r < n; ++r) scale.push_back(real(0.5f, 1.5f) / 127), bias.push_back(normal());
    packed = {n, k, bitmask.data(), int8 ? codes.data() : nullptr, int8 ? scale.data() : nullptr,
              int8 ? nullptr : values.data(), bias.data(), values.size(), input};
  }
  Layer(const Layer&) = delete;  // `packed` points into it

  int n, k;
  std::vector<double> weight;  // [n][k]
  std::vector<uint8_t> bitmask;
  std::vector<int8_t> codes;
  std::vector<float> values, scale, bias;
  PackedLayer packed;
};

// The path, made to choose a layout, where it has it.
Kernels choosing(Kernels kernels, Layout layout) {
  kernels.sparse_above = kernels.sparse_above_float = layout == Layout::kDenseWords ? 1.0f : 0.0f;
  if (kernels.gathered > 0) kernels.gathered = layout == Layout::kGatheredWords ? 1e-6f : 0.0f;
  if (kernels.gathered_by_4 > 0) kernels.gathered_by_4 = layout == Layout::kGatheredBy4 ? 1e-6f : 0.0f;
  return kernels;
}
constexpr Layout kLayouts[] = {Layout::kDenseWords, Layout::kSparseWords, Layout::kGatheredWords, Layout::kGatheredBy4};
constexpr const char* kLayoutNames[] = {"dense", "words", "gathered", "by4"};

}  // namespace
