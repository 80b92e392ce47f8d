// <immintrin.h> for CPUs with AVX2, F16C and no more: the intrinsics of native/x86 that need AVX-VNNI, AVX-512 or AMX,
// as loops over elements that follow the vendor's description. CMake's option PRUNEOFA_EMULATE puts it before the
// compiler's own header, so that every path can be tested, though not timed, on such a CPU. What an intrinsic leaves
// undefined is 0 here. Loads and stores of whole registers abort on an address that is not aligned, tile instructions
// without a configuration, as the instructions would fault.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")

namespace emulated {

template <class T, int Bytes = 64>
struct Elements {
  static constexpr int kCount = Bytes / static_cast<int>(sizeof(T));
  T of[kCount] = {};
  T& operator[](int i) { return of[i]; }
  const T& operator[](int i) const { return of[i]; }
};

template <class T, class V>
inline Elements<T, sizeof(V)> from(const V& v) {
  Elements<T, sizeof(V)> elements;
  std::memcpy(elements.of, &v, sizeof v);
  return elements;
}

template <class V, class T, int Bytes>
inline V to(const Elements<T, Bytes>& elements) {
  static_assert(sizeof(V) == Bytes);
  V v;
  std::memcpy(&v, elements.of, sizeof v);
  return v;
}

// V of T: element i is element(i), or 0 where the mask has no one.
template <class V, class T, class Element>
inline V each(uint64_t mask, const Element& element) {
  Elements<T, sizeof(V)> result;
  for (int i = 0; i < result.kCount; ++i) {
    if (mask >> i & 1) result[i] = static_cast<T>(element(i));
  }
  return to<V>(result);
}

constexpr uint64_t kAll = ~uint64_t{0};

template <class V>
__attribute__((noinline)) inline V load(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) std::abort();
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
__attribute__((noinline)) inline void store(void* p, const V& v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) std::abort();
  std::memcpy(p, &v, sizeof v);
}

template <class To, class From>
inline To cast(const From& v) {  // of another type, or the lower half of a register
  To result = {};
  std::memcpy(&result, &v, sizeof v < sizeof result ? sizeof v : sizeof result);
  return result;
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t to_bfloat16(float value) {  // to nearest, half to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class V>
__attribute__((noinline)) inline V dot_bytes(const V& sum, const V& codes, const V& weights) {
  const auto s = from<int32_t>(sum);
  const auto u = from<uint8_t>(codes);
  const auto w = from<int8_t>(weights);
  return each<V, int32_t>(kAll, [&](int i) {
    int32_t total = s[i];
    for (int k = 4 * i; k < 4 * i + 4; ++k) total += u[k] * w[k];
    return total;
  });
}

// Interleaves the lower or upper halves of the 16-byte lanes of a and b.
template <class T>
__attribute__((noinline)) inline __m512i unpack(uint64_t mask, const __m512i& a, const __m512i& b, bool high) {
  const auto x = from<T>(a), y = from<T>(b);
  constexpr int kLane = 16 / sizeof(T);
  return each<__m512i, T>(mask, [&](int i) {
    const int at = i / kLane * kLane + i % kLane / 2 + (high ? kLane / 2 : 0);
    return i % 2 == 0 ? x[at] : y[at];
  });
}

// Elements of a and b together by the lowest bits of an index.
template <class V, class T, class Index>
__attribute__((noinline)) inline V permute(uint64_t mask, const V& a, const __m512i& index, const V& b) {
  const auto x = from<T>(a), y = from<T>(b);
  const auto at = from<Index>(index);
  constexpr int kCount = 64 / sizeof(T);
  return each<V, T>(mask, [&](int i) {
    const int place = static_cast<int>(at[i]) & (2 * kCount - 1);
    return place < kCount ? x[place] : y[place - kCount];
  });
}

__attribute__((noinline)) inline __m512i shuffle_bytes(uint64_t mask, const __m512i& a, const __m512i& order) {
  const auto x = from<uint8_t>(a), at = from<uint8_t>(order);
  return each<__m512i, uint8_t>(mask, [&](int i) { return at[i] & 0x80 ? 0 : x[i / 16 * 16 + at[i] % 16]; });
}

struct Tiles {
  bool configured = false;
  alignas(64) uint8_t of[8][1024] = {};
  uint8_t* operator[](int tile) {
    if (!configured) std::abort();
    return of[tile];
  }
};
inline thread_local Tiles tiles;

__attribute__((noinline)) inline void load_tile(int tile, const void* base, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[tile] + r * 64, static_cast<const char*>(base) + r * stride, 64);
}

__attribute__((noinline)) inline void store_tile(int tile, void* base, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(base) + r * stride, tiles[tile] + r * 64, 64);
}

__attribute__((noinline)) inline void multiply_bytes(int sum, int left, int right) {
  int32_t s[16][16];
  std::memcpy(s, tiles[sum], sizeof s);
  const int8_t* a = reinterpret_cast<const int8_t*>(tiles[left]);
  const uint8_t* b = tiles[right];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int j = 0; j < 4; ++j) s[m][n] += a[m * 64 + k * 4 + j] * b[k * 64 + n * 4 + j];
      }
    }
  }
  std::memcpy(tiles[sum], s, sizeof s);
}

// Even and odd products are added up apart, as the instruction does.
__attribute__((noinline)) inline void multiply_bfloat16(int sum, int left, int right) {
  float s[16][16];
  uint16_t a[16][32], b[16][32];
  std::memcpy(s, tiles[sum], sizeof s);
  std::memcpy(a, tiles[left], sizeof a);
  std::memcpy(b, tiles[right], sizeof b);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; ++k) {
      const float first = from_bfloat16(a[m][2 * k]), second = from_bfloat16(a[m][2 * k + 1]);
      for (int n = 0; n < 16; ++n) {
        even[n] = fmaf(first, from_bfloat16(b[k][2 * n]), even[n]);
        odd[n] = fmaf(second, from_bfloat16(b[k][2 * n + 1]), odd[n]);
      }
    }
    for (int n = 0; n < 16; ++n) s[m][n] += even[n] + odd[n];
  }
  std::memcpy(tiles[sum], s, sizeof s);
}

}  // namespace emulated

#define EMULATED static __attribute__((unused, noinline))

// Loads, stores, casts and constants.
EMULATED __m512 emulated_load_ps(const void* p) { return emulated::load<__m512>(p); }
EMULATED __m512i emulated_load_si512(const void* p) { return emulated::load<__m512i>(p); }
EMULATED __m512i emulated_loadu_si512(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
EMULATED __m256h emulated_load_ph256(const void* p) { return emulated::load<__m256h>(p); }
EMULATED void emulated_store_si512(void* p, __m512i v) { emulated::store(p, v); }
EMULATED void emulated_store_ph(void* p, __m512h v) { emulated::store(p, v); }
EMULATED __m512 emulated_maskz_load_ps(__mmask16 mask, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) std::abort();
  return emulated::each<__m512, float>(mask, [&](int i) { return static_cast<const float*>(p)[i]; });
}
EMULATED void emulated_mask_store_ps(void* p, __mmask16 mask, __m512 v) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) std::abort();
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(p)[i] = v[i];
  }
}
EMULATED void emulated_mask_storeu_epi16(void* p, __mmask32 mask, __m512i v) {
  const auto x = emulated::from<int16_t>(v);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + 2 * i, &x.of[i], 2);
  }
}
EMULATED __m512i emulated_mask_load_epi32(__m512i source, __mmask16 mask, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) std::abort();
  auto x = emulated::from<int32_t>(source);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(&x[i], static_cast<const char*>(p) + 4 * i, 4);
  }
  return emulated::to<__m512i>(x);
}
EMULATED __m512i emulated_set1_epi32(int value) {
  return emulated::each<__m512i, int32_t>(emulated::kAll, [&](int) { return value; });
}
EMULATED __m512 emulated_set1_ps(float value) {
  return emulated::each<__m512, float>(emulated::kAll, [&](int) { return value; });
}
EMULATED __m512h emulated_set1_ph(_Float16 value) {
  return emulated::each<__m512h, _Float16>(emulated::kAll, [&](int) { return value; });
}
template <class... Values>
EMULATED __m512i emulated_set_epi32(Values... values) {  // the highest first
  const int32_t of[16] = {values...};
  return emulated::each<__m512i, int32_t>(emulated::kAll, [&](int i) { return of[15 - i]; });
}
EMULATED __m512i emulated_set4_epi32(int d, int c, int b, int a) {
  return emulated_set_epi32(d, c, b, a, d, c, b, a, d, c, b, a, d, c, b, a);
}
EMULATED __m512i emulated_broadcast_i32x4(__mmask16 mask, __m128i v) {
  const auto x = emulated::from<int32_t>(v);
  return emulated::each<__m512i, int32_t>(mask, [&](int i) { return x[i % 4]; });
}
template <class Half, class V>
EMULATED Half emulated_extract(V v, int upper) {
  Half half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + upper * 32, sizeof half);
  return half;
}
EMULATED __m512d emulated_insertf64x4(__m512d v, __m256d half, int upper) {
  std::memcpy(reinterpret_cast<char*>(&v) + upper * 32, &half, sizeof half);
  return v;
}

// Integers.
EMULATED __m512i emulated_expand_epi8(__mmask64 mask, __m512i v) {
  const auto x = emulated::from<int8_t>(v);
  int next = 0;
  return emulated::each<__m512i, int8_t>(mask, [&](int) { return x[next++]; });
}
EMULATED __m512i emulated_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
  const auto x = emulated::from<int16_t>(a), y = emulated::from<int16_t>(b);
  return emulated::each<__m512i, int16_t>(emulated::kAll, [&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}
EMULATED __mmask32 emulated_cmpgt_epi16_mask(__m512i a, __m512i b) {
  const auto x = emulated::from<int16_t>(a), y = emulated::from<int16_t>(b);
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>(x[i] > y[i]) << i;
  return mask;
}
EMULATED __m512i emulated_cvtepu16_epi32(__mmask16 mask, __m256i v) {
  const auto x = emulated::from<uint16_t>(v);
  return emulated::each<__m512i, int32_t>(mask, [&](int i) { return x[i]; });
}
EMULATED __m512i emulated_min_epu16(__mmask32 mask, __m512i a, __m512i b) {
  const auto x = emulated::from<uint16_t>(a), y = emulated::from<uint16_t>(b);
  return emulated::each<__m512i, uint16_t>(mask, [&](int i) { return x[i] < y[i] ? x[i] : y[i]; });
}
EMULATED __m512i emulated_packus_epi32(__mmask32 mask, __m512i a, __m512i b) {
  const auto x = emulated::from<int32_t>(a), y = emulated::from<int32_t>(b);
  return emulated::each<__m512i, uint16_t>(mask, [&](int i) {
    const int at = i / 8 * 4 + i % 4, v = i % 8 < 4 ? x[at] : y[at];
    return v < 0 ? 0 : v > 0xffff ? 0xffff : v;
  });
}
EMULATED __m512i emulated_permutexvar_epi16(__mmask32 mask, __m512i index, __m512i v) {
  const auto x = emulated::from<uint16_t>(v), at = emulated::from<uint16_t>(index);
  return emulated::each<__m512i, uint16_t>(mask, [&](int i) { return x[at[i] % 32]; });
}
EMULATED __m512i emulated_slli_epi32(__mmask16 mask, __m512i v, unsigned count) {
  const auto x = emulated::from<uint32_t>(v);
  return emulated::each<__m512i, uint32_t>(mask, [&](int i) { return count > 31 ? 0 : x[i] << count; });
}
EMULATED __m512i emulated_srli_epi32(__mmask16 mask, __m512i v, unsigned count) {
  const auto x = emulated::from<uint32_t>(v);
  return emulated::each<__m512i, uint32_t>(mask, [&](int i) { return count > 31 ? 0 : x[i] >> count; });
}
EMULATED __m512i emulated_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  const auto x = emulated::from<uint32_t>(a), y = emulated::from<uint32_t>(b), z = emulated::from<uint32_t>(c);
  return emulated::each<__m512i, uint32_t>(emulated::kAll, [&](int i) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int row = (x[i] >> bit & 1) << 2 | (y[i] >> bit & 1) << 1 | (z[i] >> bit & 1);
      result |= static_cast<uint32_t>(table >> row & 1) << bit;
    }
    return result;
  });
}

// Floats. Of two equal numbers, or where one is NaN, the second is taken.
EMULATED __m512 emulated_min_ps(__mmask16 mask, __m512 a, __m512 b) {
  return emulated::each<__m512, float>(mask, [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
EMULATED __m512 emulated_max_ps(__mmask16 mask, __m512 a, __m512 b) {
  return emulated::each<__m512, float>(mask, [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
EMULATED __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::each<__m512, float>(emulated::kAll, [&](int i) { return fmaf(a[i], b[i], c[i]); });
}
EMULATED __mmask16 emulated_cmp_le_ps(__m512 a, __m512 b) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = static_cast<__mmask16>(mask | static_cast<int>(a[i] <= b[i]) << i);
  return mask;
}
EMULATED __m512 emulated_fraction_ps(__mmask16 mask, __m512 v) {
  return emulated::each<__m512, float>(mask, [&](int i) { return v[i] - floorf(v[i]); });
}
EMULATED __m512 emulated_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return emulated::each<__m512, float>(mask, [&](int i) {
    const float power = floorf(b[i]) > 1000 ? 1000 : floorf(b[i]) < -1000 ? -1000 : floorf(b[i]);
    return std::ldexp(a[i], static_cast<int>(power));
  });
}
EMULATED __m512bh emulated_cvtne2ps_pbh(__mmask32 mask, __m512 high, __m512 low) {
  return emulated::each<__m512bh, uint16_t>(
      mask, [&](int i) { return emulated::to_bfloat16(i < 16 ? low[i] : high[i - 16]); });
}
EMULATED __m512 emulated_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = emulated::from<uint16_t>(a), y = emulated::from<uint16_t>(b);
  return emulated::each<__m512, float>(emulated::kAll, [&](int i) {
    const auto value = emulated::from_bfloat16;
    const float odd = fmaf(value(x[2 * i + 1]), value(y[2 * i + 1]), sum[i]);
    return fmaf(value(x[2 * i]), value(y[2 * i]), odd);
  });
}

// Halves. Products and sums of two are exact as double, so that there is one rounding.
EMULATED __m512h emulated_abs_ph(__m512h v) {
  const auto x = emulated::from<uint16_t>(v);
  return emulated::each<__m512h, uint16_t>(emulated::kAll, [&](int i) { return x[i] & 0x7fff; });
}
EMULATED __m512h emulated_min_ph(__mmask32 mask, __m512h a, __m512h b) {
  return emulated::each<__m512h, _Float16>(mask, [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
EMULATED __m512h emulated_max_ph(__mmask32 mask, __m512h a, __m512h b) {
  return emulated::each<__m512h, _Float16>(mask, [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
EMULATED __m512h emulated_fmadd_ph(__m512h a, __m512h b, __m512h c) {
  return emulated::each<__m512h, _Float16>(emulated::kAll, [&](int i) {
    return static_cast<_Float16>(static_cast<double>(a[i]) * static_cast<double>(b[i]) + static_cast<double>(c[i]));
  });
}
EMULATED __m512h emulated_mask_add_ph(__m512h source, __mmask32 mask, __m512h a, __m512h b) {
  return emulated::each<__m512h, _Float16>(emulated::kAll, [&](int i) {
    const double sum = static_cast<double>(a[i]) + static_cast<double>(b[i]);
    return mask >> i & 1 ? static_cast<_Float16>(sum) : source[i];
  });
}
EMULATED __m512 emulated_cvtxph_ps(__mmask16 mask, __m256h v) {
  return emulated::each<__m512, float>(mask, [&](int i) { return static_cast<float>(v[i]); });
}
EMULATED __m256h emulated_cvtxps_ph(__mmask16 mask, __m512 v) {
  return emulated::each<__m256h, _Float16>(mask, [&](int i) { return static_cast<_Float16>(v[i]); });
}

#pragma GCC pop_options

#undef _mm512_cmp_ps_mask
#undef _mm512_maskz_extractf64x4_pd
#undef _mm512_maskz_extracti64x4_epi64
#undef _mm512_maskz_insertf64x4
#undef _mm512_maskz_reduce_ps
#undef _mm512_maskz_scalef_ps
#undef _mm512_maskz_slli_epi32
#undef _mm512_maskz_srli_epi32
#undef _mm512_set4_epi32
#undef _mm512_set_epi32
#undef _mm512_ternarylogic_epi32
#undef _mm512_maskz_cvtxph_ps
#undef _mm512_maskz_cvtxps_ph
#undef _mm512_maskz_min_ps
#undef _mm512_maskz_max_ps
#undef _mm512_maskz_min_ph
#undef _mm512_maskz_max_ph
#undef _mm512_fmadd_ps
#undef _mm512_fmadd_ph
#undef _mm512_mask_add_ph
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_release
#undef _tile_stored
#undef _tile_stream_loadd
#undef _tile_zero

#define _mm256_dpbusd_avx_epi32 emulated::dot_bytes<__m256i>
#define _mm512_dpbusd_epi32 emulated::dot_bytes<__m512i>

#define _mm256_castpd_ph emulated::cast<__m256h, __m256d>
#define _mm256_castph_pd emulated::cast<__m256d, __m256h>
#define _mm512_castpd256_pd512 emulated::cast<__m512d, __m256d>
#define _mm512_castpd_ph emulated::cast<__m512h, __m512d>
#define _mm512_castph_pd emulated::cast<__m512d, __m512h>
#define _mm512_castph_si512 emulated::cast<__m512i, __m512h>
#define _mm512_castsi256_si512 emulated::cast<__m512i, __m256i>
#define _mm512_castsi512_ph emulated::cast<__m512h, __m512i>
#define _mm512_castsi512_ps emulated::cast<__m512, __m512i>

#define _mm256_load_ph emulated_load_ph256
#define _mm512_load_ps emulated_load_ps
#define _mm512_maskz_load_ps emulated_maskz_load_ps
#define _mm512_load_si512 emulated_load_si512
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_store_si512 emulated_store_si512
#define _mm512_store_ph emulated_store_ph
#define _mm512_mask_store_ps emulated_mask_store_ps
#define _mm512_mask_storeu_epi16 emulated_mask_storeu_epi16
#define _mm512_mask_load_epi32 emulated_mask_load_epi32
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_set1_ph emulated_set1_ph
#define _mm512_set4_epi32 emulated_set4_epi32
#define _mm512_set_epi32 emulated_set_epi32
#define _mm512_setzero_si512() emulated_set1_epi32(0)
#define _mm512_maskz_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_maskz_extractf64x4_pd(mask, v, upper) emulated_extract<__m256d>(v, upper)
#define _mm512_maskz_extracti64x4_epi64(mask, v, upper) emulated_extract<__m256i>(v, upper)
#define _mm512_maskz_insertf64x4(mask, v, half, upper) emulated_insertf64x4(v, half, upper)

#define _mm512_maskz_expand_epi8 emulated_expand_epi8
#define _mm512_mask_blend_epi16 emulated_mask_blend_epi16
#define _mm512_cmpgt_epi16_mask emulated_cmpgt_epi16_mask
#define _mm512_maskz_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_maskz_min_epu16 emulated_min_epu16
#define _mm512_maskz_packus_epi32 emulated_packus_epi32
#define _mm512_maskz_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_permutex2var_epi8(a, index, b) emulated::permute<__m512i, uint8_t, uint8_t>(emulated::kAll, a, index, b)
#define _mm512_permutex2var_epi32(a, index, b) \
  emulated::permute<__m512i, int32_t, uint32_t>(emulated::kAll, a, index, b)
#define _mm512_permutex2var_ps(a, index, b) emulated::permute<__m512, float, uint32_t>(emulated::kAll, a, index, b)
#define _mm512_maskz_permutex2var_ps emulated::permute<__m512, float, uint32_t>
#define _mm512_shuffle_epi8(v, order) emulated::shuffle_bytes(emulated::kAll, v, order)
#define _mm512_maskz_shuffle_epi8 emulated::shuffle_bytes
#define _mm512_maskz_slli_epi32 emulated_slli_epi32
#define _mm512_maskz_srli_epi32 emulated_srli_epi32
#define _mm512_ternarylogic_epi32 emulated_ternarylogic_epi32
#define _mm512_unpacklo_epi8(a, b) emulated::unpack<int8_t>(emulated::kAll, a, b, false)
#define _mm512_unpackhi_epi8(a, b) emulated::unpack<int8_t>(emulated::kAll, a, b, true)
#define _mm512_unpacklo_epi16(a, b) emulated::unpack<int16_t>(emulated::kAll, a, b, false)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack<int16_t>(emulated::kAll, a, b, true)
#define _mm512_maskz_unpacklo_epi32(mask, a, b) emulated::unpack<int32_t>(mask, a, b, false)
#define _mm512_maskz_unpackhi_epi32(mask, a, b) emulated::unpack<int32_t>(mask, a, b, true)
#define _mm512_maskz_unpacklo_epi64(mask, a, b) emulated::unpack<int64_t>(mask, a, b, false)
#define _mm512_maskz_unpackhi_epi64(mask, a, b) emulated::unpack<int64_t>(mask, a, b, true)

#define _mm512_maskz_min_ps emulated_min_ps
#define _mm512_maskz_max_ps emulated_max_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_cmp_ps_mask(a, b, predicate) emulated_cmp_le_ps(a, b)     // _CMP_LE_OQ
#define _mm512_maskz_reduce_ps(mask, v, how) emulated_fraction_ps(mask, v)  // how: 1, no bits after the point, down
#define _mm512_maskz_scalef_ps emulated_scalef_ps
#define _mm512_maskz_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_abs_ph emulated_abs_ph
#define _mm512_maskz_min_ph emulated_min_ph
#define _mm512_maskz_max_ph emulated_max_ph
#define _mm512_fmadd_ph emulated_fmadd_ph
#define _mm512_mask_add_ph emulated_mask_add_ph
#define _mm512_maskz_cvtxph_ps emulated_cvtxph_ps
#define _mm512_maskz_cvtxps_ph emulated_cvtxps_ph

#define _tile_loadconfig(config) (void)(config), emulated::tiles.configured = true
#define _tile_release() emulated::tiles.configured = false
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, 1024)
#define _tile_loadd emulated::load_tile
#define _tile_stream_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbsud emulated::multiply_bytes
#define _tile_dpbf16ps emulated::multiply_bfloat16
