// AVX2 with FMA. Codes and weights are int16 here: VPMADDWD adds two exact products per 32-bit lane, while the byte
// instruction (VPMADDUBSW) saturates.
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN("avx2,fma")

namespace pruneofa {
namespace {
namespace avx2 {
#include "x86/avx2.inc.h"

struct Int8 {
  struct Sum {
    lanes::IntRegister half[2];  // not __m256i, a vector of 64-bit integers: compilers would copy between the two
  };
  using Word = __m256i;
  using Number = int32_t;
  static constexpr int kGroup = 2, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static void add(Sum& sum, __m256i low, __m256i high, Word word) {
    sum.half[0] += reinterpret_cast<lanes::IntRegister>(_mm256_madd_epi16(low, word));
    sum.half[1] += reinterpret_cast<lanes::IntRegister>(_mm256_madd_epi16(high, word));
  }
  static void add(Sum& sum, const char* x, Word word) {
    const __m256i* place = reinterpret_cast<const __m256i*>(x);
    add(sum, _mm256_load_si256(place), _mm256_load_si256(place + 1), word);
  }
  static lanes::Ints value(const Sum& sum) {
    lanes::Ints v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};

// Gathered words from rows of 64 bytes per input, 32 of each of two panels: tokens 0 .. 3, 8 .. 11, 4 .. 7, 12 .. 15,
// so that interleaving two rows gives the tokens in order.
struct Gather {
  static constexpr int kGroup = 2, kGroupBytes = 64, kPanels = 2;

  static void transpose_codes(const char* x, std::ptrdiff_t panel_bytes, int groups, int count, char* rows) {
    const __m256i by_input = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    for (int i = 0; i < count; ++i) {
      const __m256i* codes = reinterpret_cast<const __m256i*>(x + i * panel_bytes);
      __m256i* row = reinterpret_cast<__m256i*>(rows) + i;
      for (int g = 0; g < groups; ++g, codes += 2, row += 4) {
        const __m256i low = _mm256_shuffle_epi8(_mm256_load_si256(codes), by_input);
        const __m256i high = _mm256_shuffle_epi8(_mm256_load_si256(codes + 1), by_input);
        _mm256_store_si256(row, _mm256_unpacklo_epi64(low, high));
        _mm256_store_si256(row + 2, _mm256_unpackhi_epi64(low, high));
      }
    }
  }

  template <int Shared, int Panels>
  static void block(const Weights& w, const Operands& o, int n, int p, const char* rows) {
    Int8::Sum sum[Shared][Panels] = {};
    const uint32_t end = w.row_start[n / Shared + 1];
    for (uint32_t e = w.row_start[n / Shared]; e < end; ++e) {
      const uint16_t* index = w.index + std::size_t{e} * 2;
      const uint32_t* words = w.words + std::size_t{e} * Shared;
      PRUNEOFA_UNROLL
      for (int i = 0; i < Panels; ++i) {
        const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows + std::size_t{index[0]} * 64) + i);
        const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows + std::size_t{index[1]} * 64) + i);
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        PRUNEOFA_UNROLL
        for (int r = 0; r < Shared; ++r) Int8::add(sum[r][i], low, high, Int8::word(words[r]));
      }
    }
    StoredSums<Int8, Shared, Panels> stored;
    store_sums(stored, sum);
    epilogue(w, o, n, p, stored);
  }

  static void multiply(const Weights& w, const Operands& o, int n, int p, int count, const char* rows) {
    if (w.shared == 1) return count == 2 ? block<1, 2>(w, o, n, p, rows) : block<1, 1>(w, o, n, p, rows);
    // The sums of two panels would not fit the registers.
    for (int i = 0; i < count; ++i) block<4, 1>(w, o, n, p + i, rows + i * 32);
  }
};

}  // namespace avx2
}  // namespace

const Kernels avx2_kernels = {
    .isa = "avx2",
    .supported = cpu_has_avx2,
    .lay_out = lay_out_words,
    .group_int8 = 2,
    .block_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.52f,
    .sparse_above_float = 0.5f,
    .gathered = 1.3f,
    .gathered_by_4 = 3.0f,
    .begin = avx2::no_op,
    .end = avx2::no_op,
    .linear_int8 = avx2::linear_or_gathered<avx2::Int8, avx2::Gather>,
    .linear_float = avx2::linear<avx2::Float>,
    .range = avx2::lanes::range,
    .scales = avx2::lanes::scales,
    .encode = avx2::lanes::encode_words<2>,
    .moments = avx2::lanes::moments,
    .normalize = avx2::lanes::normalize,
    .attention = avx2::lanes::attention,
    .train_tokens = avx2::kTrainTokens,
    .multiply_entries = avx2::multiply_entries<avx2::Avx>,
    .sample_entries = avx2::sample_rows<avx2::Avx>,
    .multiply_cached_int8 = avx2::multiply_cached<avx2::Int8, 4, 1>,
    .multiply_cached_float = avx2::multiply_cached<avx2::Float, 6, 1>,
    .read_all = avx2::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
