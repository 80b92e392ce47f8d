// What the AVX2 path and the AVX-VNNI path share: vectors of 32 bytes and products of floats. Included as lanes.inc.h is.
#define PRUNEOFA_REGISTER 32
#define PRUNEOFA_MIN(a, b) _mm256_min_ps((__m256)(a), (__m256)(b))
#define PRUNEOFA_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#include "portable/lanes.inc.h"
#include "portable/math.inc.h"
#include "portable/layers.inc.h"
#include "portable/linear.inc.h"
#include "portable/ceilings.inc.h"
#include "portable/training.inc.h"
#include "x86/training.inc.h"

struct Float {
  struct Sum {
    __m256 half[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  };
  using Word = __m256;
  using Number = float;
  static constexpr int kGroup = 1, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = false;
  static Word word(uint32_t w) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(w))); }
  static void add(Sum& sum, const char* x, Word word) {
    const float* place = reinterpret_cast<const float*>(x);
    sum.half[0] = _mm256_fmadd_ps(_mm256_load_ps(place), word, sum.half[0]);
    sum.half[1] = _mm256_fmadd_ps(_mm256_load_ps(place + 8), word, sum.half[1]);
  }
  static lanes::Floats value(const Sum& sum) {
    lanes::Floats v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};
