// NEON with the matrix instructions for int8: USDOT multiplies codes and weights as they are, and USMMLA makes the four
// sums of two tokens and two outputs over eight inputs, twice as many products per instruction.
#include <arm_neon.h>

#include "arm/cpu.h"
#include "arm/features.h"
#include "arm/i8mm_layout.h"
#include "kernels.h"

PRUNEOFA_TARGET_BEGIN(PRUNEOFA_I8MM)

namespace pruneofa {
namespace {
namespace neon_i8mm {
#define PRUNEOFA_DOT(sum, codes, words) vusdotq_s32(sum, codes, words)
#define PRUNEOFA_DOT_LANE(sum, codes, words, lane) vusdotq_laneq_s32(sum, codes, words, lane)
#include "arm/neon.inc.h"

constexpr int kOutputs = 8;  // of a dense block

// Sums of eight outputs for half a panel, stored at `stored` [outputs][16]. Of two groups of codes, interleaving makes
// the eight inputs of two tokens; weights are laid out so.
inline void half_panel(const char* x, const uint32_t* words, int groups, int32_t* stored) {
  int32x4_t sum[4][4];  // [pairs of tokens][pairs of outputs], of each two tokens with two outputs
  PRUNEOFA_UNROLL
  for (int t = 0; t < 4; ++t) {
    PRUNEOFA_UNROLL
    for (int r = 0; r < 4; ++r) sum[t][r] = vdupq_n_s32(0);
  }
  for (int g = 0; g < groups; g += 2, x += 128, words += 2 * kOutputs) {
    uint8x16_t codes[4];
    PRUNEOFA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32x4_t first = vreinterpretq_u32_u8(Int8::load(x + 16 * i));
      const uint32x4_t second = vreinterpretq_u32_u8(Int8::load(x + 64 + 16 * i));
      codes[2 * i] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
      codes[2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    }
    PRUNEOFA_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int8x16_t weights = Int8::words(words + 4 * r);
      PRUNEOFA_UNROLL
      for (int t = 0; t < 4; ++t) sum[t][r] = vusmmlaq_s32(sum[t][r], codes[t], weights);
    }
  }
  PRUNEOFA_UNROLL
  for (int r = 0; r < 4; ++r) {
    PRUNEOFA_UNROLL
    for (int t = 0; t < 4; t += 2) {
      vst1q_s32(stored + 2 * r * kLanes + 2 * t, vuzp1q_s32(sum[t][r], sum[t + 1][r]));
      vst1q_s32(stored + (2 * r + 1) * kLanes + 2 * t, vuzp2q_s32(sum[t][r], sum[t + 1][r]));
    }
  }
}

void dense_int8(const Weights& w, const Operands& o, int begin, int end) {
  const int groups = round_up(w.inputs, 64) / 4;
  for (int n = begin; n < end; n += kOutputs) {
    const uint32_t* const words = w.words + static_cast<std::ptrdiff_t>(n) * groups;
    for (int p = 0; p < o.panels; ++p) {
      const char* x = static_cast<const char*>(o.x) + static_cast<std::ptrdiff_t>(p) * groups * 64;
      StoredSums<Int8, kOutputs, 1> stored;
      half_panel(x, words, groups, stored.of[0][0]);
      half_panel(x + 32, words, groups, stored.of[0][0] + 8);
      epilogue(w, o, n, p, stored);
    }
  }
}

void linear_int8(const Weights& w, const Operands& o, int begin, int end) {
  if (w.shared) return gathered_linear<Gather>(w, o, begin, end);
  w.sparse ? sparse_linear<Int8>(w, o, begin, end) : dense_int8(w, o, begin, end);
}

// Four tokens' registers of codes by four of weights, as in `half_panel`: 32 products each.
int64_t multiply_cached_matrices(CachedOperands& o, int turns) {
  int32x4_t sum[4][4];
  PRUNEOFA_UNROLL
  for (int t = 0; t < 4; ++t) {
    PRUNEOFA_UNROLL
    for (int r = 0; r < 4; ++r) sum[t][r] = vdupq_n_s32(0);
  }
  for (int turn = 0; turn < turns; ++turn) {
    const int step = turn % CachedOperands::kSteps;
    uint8x16_t codes[4];
    PRUNEOFA_UNROLL
    for (int t = 0; t < 4; ++t) codes[t] = Int8::load(o.x[0][step] + 16 * t);
    PRUNEOFA_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int8x16_t weights = Int8::words(o.words[step] + 4 * r);
      PRUNEOFA_UNROLL
      for (int t = 0; t < 4; ++t) sum[t][r] = vusmmlaq_s32(sum[t][r], codes[t], weights);
    }
  }
  int32_t* const sums = reinterpret_cast<int32_t*>(o.sums);
  PRUNEOFA_UNROLL
  for (int t = 0; t < 4; ++t) {
    PRUNEOFA_UNROLL
    for (int r = 0; r < 4; ++r) vst1q_s32(sums + (t * 4 + r) * 4, sum[t][r]);
  }
  return int64_t{2} * 16 * 32 * turns;
}

}  // namespace neon_i8mm
}  // namespace

// The limits and relative times are counts of instructions, not measured.
const Kernels neon_i8mm_kernels = {
    .isa = "neon_i8mm",
    .supported = cpu_has_i8mm,
    .lay_out = lay_out_pairs,
    .group_int8 = 4,
    .block_int8 = neon_i8mm::kOutputs,
    .block_float = 4,
    .sparse_above = 0.81f,
    .sparse_above_float = 0.4f,
    .gathered = 2.3f,
    .gathered_by_4 = 4.6f,
    .begin = neon_i8mm::no_op,
    .end = neon_i8mm::no_op,
    .linear_int8 = neon_i8mm::linear_int8,
    .linear_float = neon_i8mm::linear_float,
    .range = neon_i8mm::lanes::range,
    .scales = neon_i8mm::lanes::scales,
    .encode = neon_i8mm::lanes::encode_words<4>,
    .moments = neon_i8mm::lanes::moments,
    .normalize = neon_i8mm::lanes::normalize,
    .attention = neon_i8mm::lanes::attention,
    .train_tokens = neon_i8mm::kTrainTokens,
    .multiply_entries = neon_i8mm::multiply_entries<neon_i8mm::Neon>,
    .sample_entries = neon_i8mm::sample_rows<neon_i8mm::Neon>,
    .multiply_cached_int8 = neon_i8mm::multiply_cached_matrices,
    .multiply_cached_float = neon_i8mm::multiply_cached<neon_i8mm::Float, 4, 1>,
    .read_all = neon_i8mm::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
