// The path for any CPU and compiler, and the definition that the others are tested against.
#include "kernels.h"

namespace pruneofa {
namespace {
namespace scalar {
#include "lanes.h"
#include "linear.inc.h"

struct Int8 {
  using Sum = lanes::Ints;
  using Word = uint32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return w; }
  static void add(Sum& sum, const char* x, Word word) {
    for (int k = 0; k < 4; ++k) {
      const int32_t weight = static_cast<int8_t>(word >> (8 * k));
      for (int i = 0; i < kLanes; ++i) sum[i] += weight * static_cast<uint8_t>(x[4 * i + k]);
    }
  }
  static lanes::Ints value(const Sum& sum) { return sum; }
};

struct Float {
  using Sum = lanes::Floats;
  using Word = float;
  static constexpr int kGroup = 1, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = false;
  static Word word(uint32_t w) {
    float value;
    memcpy(&value, &w, sizeof value);
    return value;
  }
  static void add(Sum& sum, const char* x, Word word) { sum += lanes::load(reinterpret_cast<const float*>(x)) * word; }
  static lanes::Floats value(const Sum& sum) { return sum; }
};

void quantize(const float* x, int features, void* codes, float* scale, int32_t* zero) {
  lanes::range(x, features, scale, zero);
  const lanes::Floats inverse = 1.0f / lanes::load(scale), offset = lanes::to_floats(lanes::load(zero));
  uint8_t* out = static_cast<uint8_t*>(codes);
  for (int f = 0; f < round_up(features, 64); ++f) {
    lanes::Ints code = {};
    if (f < features) code = lanes::encode(lanes::load(x + f * kLanes), inverse, offset);
    for (int i = 0; i < kLanes; ++i) out[(f / 4 * kLanes + i) * 4 + f % 4] = static_cast<uint8_t>(code[i]);
  }
}

void nothing() {}

}  // namespace scalar
}  // namespace

const Kernels kScalar = {
    "scalar", 4, 4, 4, 4, 0.3f, 0.3f, scalar::nothing, scalar::nothing, scalar::linear<scalar::Int8>,
    scalar::linear<scalar::Float>, scalar::quantize, scalar::lanes::normalize, scalar::lanes::attention,
};

}  // namespace pruneofa
