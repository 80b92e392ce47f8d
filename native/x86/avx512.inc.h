// What the AVX-512 paths and the AMX path share: vectors of 64 bytes and products of words. Included as lanes.inc.h is.
#define PRUNEOFA_REGISTER 64
#define PRUNEOFA_MIN(a, b) _mm512_maskz_min_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_MAX(a, b) _mm512_maskz_max_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_LOOKUP(table, index) \
  (FloatRegister) _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)(index), _mm512_load_ps((table) + 16))
#include "portable/lanes.inc.h"
#include "portable/math.inc.h"
#include "portable/layers.inc.h"
#include "portable/linear.inc.h"
#include "portable/ceilings.inc.h"
#include "portable/training.inc.h"
#include "x86/training.inc.h"

struct Int8 {
  using Sum = lanes::Ints;  // not __m512i, a vector of 64-bit integers: compilers would copy between the two
  using Word = __m512i;
  using Number = int32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64, kBlock = 4, kDensePanels = 4;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static void add(Sum& sum, __m512i codes, Word word) {
    sum = reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), codes, word));
  }
  static void add(Sum& sum, const char* x, Word word) { add(sum, _mm512_load_si512(x), word); }
  static lanes::Ints value(Sum sum) { return sum; }
};

struct Float {
  using Sum = __m512;
  using Word = __m512;
  using Number = float;
  static constexpr int kGroup = 1, kGroupBytes = 64, kBlock = 4, kDensePanels = 4;
  static constexpr bool kPadded = false;
  static Word word(uint32_t w) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(w))); }
  static void add(Sum& sum, const char* x, Word word) { sum = _mm512_fmadd_ps(_mm512_load_ps(x), word, sum); }
  static lanes::Floats value(Sum sum) { return reinterpret_cast<lanes::Floats>(sum); }
};
