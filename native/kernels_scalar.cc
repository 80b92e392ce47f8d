// The path for any CPU and compiler, and the definition that the others are tested against.
#include "kernels.h"

namespace pruneofa {
namespace {
namespace scalar {
#define PRUNEOFA_REGISTER 16
#include "lanes.h"
#include "linear.inc.h"

struct Int8 {
  struct alignas(64) Sum {
    int32_t of[kLanes] = {};
  };
  using Word = uint32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return w; }
  static void add(Sum& sum, const char* x, Word word) {
    for (int k = 0; k < 4; ++k) {
      const int32_t weight = static_cast<int8_t>(word >> (8 * k));
      for (int i = 0; i < kLanes; ++i) sum.of[i] += weight * static_cast<uint8_t>(x[4 * i + k]);
    }
  }
  static lanes::Ints value(const Sum& sum) { return lanes::load(sum.of); }
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
  static void add(Sum& sum, const char* x, Word word) { sum = sum + lanes::load(reinterpret_cast<const float*>(x)) * word; }
  static lanes::Floats value(const Sum& sum) { return sum; }
};

void nothing() {}

}  // namespace scalar
}  // namespace

const Kernels kScalar = {
    "scalar",
    4, 4, 4, 0.3f, 0.3f,
    scalar::nothing, scalar::nothing,
    scalar::linear<scalar::Int8>,
    scalar::linear<scalar::Float>,
    scalar::lanes::range,
    scalar::lanes::scales,
    scalar::lanes::encode_words<4>,
    scalar::lanes::add,
    scalar::lanes::normalize,
    scalar::lanes::attention,
};

}  // namespace pruneofa
