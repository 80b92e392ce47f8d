// The path for any CPU, and the definition that the others are tested against.
#include "kernels.h"

namespace pruneofa {
namespace {
namespace scalar {
#define PRUNEOFA_REGISTER 16
#include "portable/lanes.inc.h"
#include "portable/math.inc.h"
#include "portable/layers.inc.h"
#include "portable/linear.inc.h"
#include "portable/ceilings.inc.h"
#include "portable/training.inc.h"

struct Int8 {
  struct alignas(64) Sum {
    int32_t of[kLanes] = {};
  };
  using Word = uint32_t;
  using Number = int32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64, kBlock = 1, kDensePanels = 1;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return w; }
  static void add(Sum& sum, const char* x, Word word) {
    // Shifts of whole words, which compilers turn into vectors of any size; bytes 4 apart they do not.
    uint32_t codes[kLanes];
    memcpy(codes, x, sizeof codes);
    const int32_t a = static_cast<int8_t>(word), b = static_cast<int8_t>(word >> 8);
    const int32_t c = static_cast<int8_t>(word >> 16), d = static_cast<int8_t>(word >> 24);
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t v = codes[i];
      sum.of[i] += a * static_cast<int32_t>(v & 255) + b * static_cast<int32_t>(v >> 8 & 255) +
                   c * static_cast<int32_t>(v >> 16 & 255) + d * static_cast<int32_t>(v >> 24);
    }
  }
  static lanes::Ints value(const Sum& sum) { return lanes::load(sum.of); }
};

struct Float {
  using Sum = lanes::Floats;
  using Word = float;
  using Number = float;
  static constexpr int kGroup = 1, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = false;
  static Word word(uint32_t w) {
    float value;
    memcpy(&value, &w, sizeof value);
    return value;
  }
  static void add(Sum& sum, const char* x, Word word) {
    sum = sum + lanes::load(reinterpret_cast<const float*>(x)) * word;
  }
  static lanes::Floats value(const Sum& sum) { return sum; }
};

bool always() { return true; }

}  // namespace scalar
}  // namespace

const Kernels scalar_kernels = {
    .isa = "scalar",
    .supported = scalar::always,
    .lay_out = lay_out_words,
    .group_int8 = 4,
    .block_int8 = 1,
    .block_float = 4,
    .sparse_above = 0.4f,
    .sparse_above_float = 0.3f,
    .begin = scalar::no_op,
    .end = scalar::no_op,
    .linear_int8 = scalar::linear<scalar::Int8>,
    .linear_float = scalar::linear<scalar::Float>,
    .range = scalar::lanes::range,
    .scales = scalar::lanes::scales,
    .encode = scalar::lanes::encode_words<4>,
    .moments = scalar::lanes::moments,
    .normalize = scalar::lanes::normalize,
    .attention = scalar::lanes::attention,
    .train_tokens = scalar::kTrainTokens,
    .multiply_entries = scalar::multiply_entries<scalar::GenericVector>,
    .sample_entries = scalar::sample_rows<scalar::GenericVector>,
    .multiply_cached_int8 = scalar::multiply_cached<scalar::Int8, 4, 1>,
    .multiply_cached_float = scalar::multiply_cached<scalar::Float, 3, 1>,
    .read_all = scalar::read_all,
};

}  // namespace pruneofa
