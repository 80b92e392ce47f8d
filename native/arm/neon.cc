// NEON with SDOT, the four products of int8 per 32-bit lane that most ARM CPUs since 2018 have. Codes are stored minus
// 128, because UDOT and SDOT multiply equal signs; the epilogue adds what is then missing, 128 times the sum of a row.
#include <arm_neon.h>

#include "arm/cpu.h"
#include "arm/features.h"
#include "kernels.h"

PRUNEOFA_TARGET_BEGIN(PRUNEOFA_DOTPROD)

namespace pruneofa {
namespace {
namespace neon {
#define PRUNEOFA_CODE_OFFSET 128
#define PRUNEOFA_DOT(sum, codes, words) vdotq_s32(sum, vreinterpretq_s8_u8(codes), words)
#define PRUNEOFA_DOT_LANE(sum, codes, words, lane) vdotq_laneq_s32(sum, vreinterpretq_s8_u8(codes), words, lane)
#include "arm/neon.inc.h"

void linear_int8(const Weights& w, const Operands& o, int begin, int end) {
  if (w.shared) return gathered_linear<Gather>(w, o, begin, end);
  w.sparse ? sparse_linear<Int8>(w, o, begin, end) : dense_by_lane<Int8>(w, o, begin, end);
}

}  // namespace neon
}  // namespace

// The limits and relative times are counts of instructions, not measured.
const Kernels neon_kernels = {
    .isa = "neon",
    .supported = cpu_has_dotprod,
    .lay_out = lay_out_words,
    .group_int8 = 4,
    .code_offset = PRUNEOFA_CODE_OFFSET,
    .block_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.72f,
    .sparse_above_float = 0.4f,
    .gathered = 2.3f,
    .gathered_by_4 = 4.6f,
    .begin = neon::no_op,
    .end = neon::no_op,
    .linear_int8 = neon::linear_int8,
    .linear_float = neon::linear_float,
    .range = neon::lanes::range,
    .scales = neon::lanes::scales,
    .encode = neon::lanes::encode_words<4>,
    .moments = neon::lanes::moments,
    .normalize = neon::lanes::normalize,
    .attention = neon::lanes::attention,
    .train_tokens = neon::kTrainTokens,
    .multiply_entries = neon::multiply_entries<neon::Neon>,
    .sample_entries = neon::sample_rows<neon::Neon>,
    .multiply_cached_int8 = neon::multiply_cached<neon::Int8, 4, 1>,
    .multiply_cached_float = neon::multiply_cached<neon::Float, 4, 1>,
    .read_all = neon::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
