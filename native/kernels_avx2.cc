// AVX2 with FMA. Codes and weights are int16 here: VPMADDWD adds two exact products per 32-bit lane, while the byte
// instruction (VPMADDUBSW) saturates.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace pruneofa {
namespace {
namespace avx2 {
#define PRUNEOFA_REGISTER 32
#define PRUNEOFA_MIN(a, b) _mm256_min_ps((__m256)(a), (__m256)(b))
#define PRUNEOFA_MAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#include "lanes.h"
#include "linear.inc.h"

struct Int8 {
  struct Sum {
    __m256i half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  };
  using Word = __m256i;
  static constexpr int kGroup = 2, kGroupBytes = 64, kBlock = 2, kDensePanels = 2;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static void add(Sum& sum, const char* x, Word word) {
    const __m256i* place = reinterpret_cast<const __m256i*>(x);
    sum.half[0] = _mm256_add_epi32(sum.half[0], _mm256_madd_epi16(_mm256_load_si256(place), word));
    sum.half[1] = _mm256_add_epi32(sum.half[1], _mm256_madd_epi16(_mm256_load_si256(place + 1), word));
  }
  static lanes::Ints value(const Sum& sum) {
    lanes::Ints v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};

struct Float {
  struct Sum {
    __m256 half[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  };
  using Word = __m256;
  static constexpr int kGroup = 1, kGroupBytes = 64, kBlock = 2, kDensePanels = 2;
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

void nothing() {}

}  // namespace avx2
}  // namespace

const Kernels kAvx2 = {
    "avx2",
    2, 2, 2, 0.5f, 0.5f,
    avx2::nothing, avx2::nothing,
    avx2::linear<avx2::Int8>,
    avx2::linear<avx2::Float>,
    avx2::lanes::range,
    avx2::lanes::scales,
    avx2::lanes::encode_words<2>,
    avx2::lanes::add,
    avx2::lanes::normalize,
    avx2::lanes::attention,
};

}  // namespace pruneofa
#pragma GCC pop_options
#endif
