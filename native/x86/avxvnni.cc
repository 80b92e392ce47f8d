// AVX-VNNI: the four products of VPDPBUSD per 32-bit lane in registers of 32 bytes, for CPUs without AVX-512. The
// instructions are those of the VEX encoding; AVX-512 has them in another.
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN("avx2,fma,avxvnni")

namespace pruneofa {
namespace {
namespace avxvnni {
#include "x86/avx2.inc.h"

struct Int8 {
  struct Sum {
    lanes::IntRegister half[2];  // not __m256i, a vector of 64-bit integers: compilers would copy between the two
  };
  using Word = __m256i;
  using Number = int32_t;
  static constexpr int kGroup = 4, kGroupBytes = 64, kBlock = 4, kDensePanels = 1;
  static constexpr bool kPadded = true;
  static Word word(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static void add(lanes::IntRegister& sum, __m256i codes, Word word) {
    sum = reinterpret_cast<lanes::IntRegister>(
        _mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), codes, word));
  }
  static void add(Sum& sum, const char* x, Word word) {
    const __m256i* codes = reinterpret_cast<const __m256i*>(x);
    add(sum.half[0], _mm256_load_si256(codes), word);
    add(sum.half[1], _mm256_load_si256(codes + 1), word);
  }
  static lanes::Ints value(const Sum& sum) {
    lanes::Ints v;
    memcpy(&v, &sum, sizeof v);
    return v;
  }
};

// Gathered words from rows of 32 bytes per input, 16 tokens of each of two panels. Four rows are interleaved to the
// codes of both panels by eight shuffles, or of one by four. Bytes 4 i .. 4 i + 3 of half h of a row belong to
// tokens 8 (i % 2) + 4 h .. + 3 of panel i / 2, which makes them come out in order.
struct Gather {
  static constexpr int kGroup = 4, kGroupBytes = 64, kPanels = 2;

  static void transpose_codes(const char* x, std::ptrdiff_t panel_bytes, int groups, int count, char* rows) {
    const __m256i by_input = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const char* panel[2] = {x, count > 1 ? x + panel_bytes : x};
    for (int g = 0; g < groups; ++g, rows += 4 * 32) {
      __m256i codes[4];
      PRUNEOFA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const __m256i* half = reinterpret_cast<const __m256i*>(panel[i / 2] + std::ptrdiff_t{g} * 64) + i % 2;
        codes[i] = _mm256_shuffle_epi8(_mm256_load_si256(half), by_input);
      }
      const __m256i a = _mm256_unpacklo_epi32(codes[0], codes[1]), b = _mm256_unpacklo_epi32(codes[2], codes[3]);
      const __m256i c = _mm256_unpackhi_epi32(codes[0], codes[1]), d = _mm256_unpackhi_epi32(codes[2], codes[3]);
      __m256i* row = reinterpret_cast<__m256i*>(rows);
      _mm256_store_si256(row, _mm256_unpacklo_epi64(a, b));
      _mm256_store_si256(row + 1, _mm256_unpackhi_epi64(a, b));
      _mm256_store_si256(row + 2, _mm256_unpacklo_epi64(c, d));
      _mm256_store_si256(row + 3, _mm256_unpackhi_epi64(c, d));
    }
  }

  // Panels p + First .. p + First + Panels - 1.
  template <int Shared, int First, int Panels>
  static void block(const Weights& w, const Operands& o, int n, int p, const char* rows) {
    Int8::Sum sum[Shared][Panels] = {};
    const uint32_t end = w.row_start[n / Shared + 1];
    for (uint32_t e = w.row_start[n / Shared]; e < end; ++e) {
      const uint16_t* index = w.index + std::size_t{e} * 4;
      const uint32_t* words = w.words + std::size_t{e} * Shared;
      __m256i row[4], codes[Panels][2];
      PRUNEOFA_UNROLL
      for (int k = 0; k < 4; ++k) {
        row[k] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rows + std::size_t{index[k]} * 32));
      }
      PRUNEOFA_UNROLL
      for (int i = 0; i < Panels; ++i) {
        const bool low = First + i == 0;
        const __m256i a = low ? _mm256_unpacklo_epi8(row[0], row[1]) : _mm256_unpackhi_epi8(row[0], row[1]);
        const __m256i b = low ? _mm256_unpacklo_epi8(row[2], row[3]) : _mm256_unpackhi_epi8(row[2], row[3]);
        codes[i][0] = _mm256_unpacklo_epi16(a, b);
        codes[i][1] = _mm256_unpackhi_epi16(a, b);
      }
      PRUNEOFA_UNROLL
      for (int r = 0; r < Shared; ++r) {
        const __m256i word = Int8::word(words[r]);
        PRUNEOFA_UNROLL
        for (int i = 0; i < Panels; ++i) {
          Int8::add(sum[r][i].half[0], codes[i][0], word);
          Int8::add(sum[r][i].half[1], codes[i][1], word);
        }
      }
    }
    StoredSums<Int8, Shared, Panels> stored;
    store_sums(stored, sum);
    epilogue(w, o, n, p + First, stored);
  }

  static void multiply(const Weights& w, const Operands& o, int n, int p, int count, const char* rows) {
    if (w.shared == 1) return count == 2 ? block<1, 0, 2>(w, o, n, p, rows) : block<1, 0, 1>(w, o, n, p, rows);
    // The sums of two panels would not fit the registers.
    block<4, 0, 1>(w, o, n, p, rows);
    if (count == 2) block<4, 1, 1>(w, o, n, p, rows);
  }
};

}  // namespace avxvnni
}  // namespace

// The limits and relative times are counts of instructions by execution port, not measured.
const Kernels avxvnni_kernels = {
    .isa = "avxvnni",
    .supported = cpu_has_avxvnni,
    .lay_out = lay_out_words,
    .group_int8 = 4,
    .block_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.6f,
    .sparse_above_float = 0.5f,
    .gathered = 2.0f,
    .gathered_by_4 = 4.0f,
    .begin = avxvnni::no_op,
    .end = avxvnni::no_op,
    .linear_int8 = avxvnni::linear_or_gathered<avxvnni::Int8, avxvnni::Gather>,
    .linear_float = avxvnni::linear<avxvnni::Float>,
    .range = avxvnni::lanes::range,
    .scales = avxvnni::lanes::scales,
    .encode = avxvnni::lanes::encode_words<4>,
    .moments = avxvnni::lanes::moments,
    .normalize = avxvnni::lanes::normalize,
    .attention = avxvnni::lanes::attention,
    .train_tokens = avxvnni::kTrainTokens,
    .multiply_entries = avxvnni::multiply_entries<avxvnni::Avx>,
    .sample_entries = avxvnni::sample_rows<avxvnni::Avx>,
    .multiply_cached_int8 = avxvnni::multiply_cached<avxvnni::Int8, 6, 1>,
    .multiply_cached_float = avxvnni::multiply_cached<avxvnni::Float, 6, 1>,
    .read_all = avxvnni::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
