// AVX-512 with VNNI and BF16: the path avx512vnni, and attention on bfloat16 (VDPBF16PS) where operands may be rounded to it.
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")

namespace pruneofa {
namespace {
namespace avx512bf16 {
#include "x86/avx512.inc.h"
#include "x86/avx512_gather.inc.h"
#include "x86/avx512_bf16_attention.inc.h"

}  // namespace avx512bf16
}  // namespace

const Kernels avx512bf16_kernels = {
    .isa = "avx512bf16",
    .supported = cpu_has_avx512bf16,
    .lay_out = lay_out_words,
    .group_int8 = 4,
    .block_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.7f,
    .sparse_above_float = 0.6f,
    .gathered = 1.7f,
    .gathered_by_4 = 3.0f,
    .begin = avx512bf16::no_op,
    .end = avx512bf16::no_op,
    .linear_int8 = avx512bf16::linear_or_gathered<avx512bf16::Int8, avx512bf16::Gather>,
    .linear_float = avx512bf16::linear<avx512bf16::Float>,
    .range = avx512bf16::lanes::range,
    .scales = avx512bf16::lanes::scales,
    .encode = avx512bf16::lanes::encode_words<4>,
    .moments = avx512bf16::lanes::moments,
    .normalize = avx512bf16::lanes::normalize,
    .attention = avx512bf16::attention,
    .train_tokens = avx512bf16::kTrainTokens,
    .multiply_entries = avx512bf16::multiply_entries<avx512bf16::Avx>,
    .sample_entries = avx512bf16::sample_rows<avx512bf16::Avx>,
    .multiply_cached_int8 = avx512bf16::multiply_cached<avx512bf16::Int8, 4, 4>,
    .multiply_cached_float = avx512bf16::multiply_cached<avx512bf16::Float, 4, 4>,
    .read_all = avx512bf16::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
