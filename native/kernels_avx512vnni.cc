// AVX-512 with VNNI: four products of a uint8 code and an int8 weight per 32-bit lane and instruction (VPDPBUSD,
// which does not saturate between them).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

namespace pruneofa {
namespace {
namespace avx512vnni {
#define PRUNEOFA_REGISTER 64
#define PRUNEOFA_MIN(a, b) _mm512_maskz_min_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_MAX(a, b) _mm512_maskz_max_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_LOOKUP(table, index) \
  (FloatRegister) _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)(index), _mm512_load_ps((table) + 16))
#include "lanes.h"
#include "linear.inc.h"
#include "avx512.inc.h"

void nothing() {}

}  // namespace avx512vnni
}  // namespace

const Kernels kAvx512Vnni = {
    "avx512vnni",
    4, 4, 4, 0.6f, 0.5f,
    avx512vnni::nothing, avx512vnni::nothing,
    avx512vnni::linear<avx512vnni::Int8>,
    avx512vnni::linear<avx512vnni::Float>,
    avx512vnni::lanes::range,
    avx512vnni::lanes::scales,
    avx512vnni::lanes::encode_words<4>,
    avx512vnni::lanes::add,
    avx512vnni::lanes::normalize,
    avx512vnni::lanes::attention,
};

}  // namespace pruneofa
#pragma GCC pop_options
#endif
