// AVX-512 with VNNI: four products of a uint8 code and an int8 weight per 32-bit lane and instruction (VPDPBUSD,
// which does not saturate between them).
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

namespace pruneofa {
namespace {
namespace avx512vnni {
#include "x86/avx512.inc.h"
#include "x86/avx512_gather.inc.h"

}  // namespace avx512vnni
}  // namespace

const Kernels avx512vnni_kernels = {
    .isa = "avx512vnni",
    .supported = cpu_has_avx512vnni,
    .lay_out = lay_out_words,
    .group_int8 = 4,
    .block_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.7f,
    .sparse_above_float = 0.6f,
    .gathered = 1.7f,
    .gathered_by_4 = 3.0f,
    .begin = avx512vnni::no_op,
    .end = avx512vnni::no_op,
    .linear_int8 = avx512vnni::linear_or_gathered<avx512vnni::Int8, avx512vnni::Gather>,
    .linear_float = avx512vnni::linear<avx512vnni::Float>,
    .range = avx512vnni::lanes::range,
    .scales = avx512vnni::lanes::scales,
    .encode = avx512vnni::lanes::encode_words<4>,
    .moments = avx512vnni::lanes::moments,
    .normalize = avx512vnni::lanes::normalize,
    .attention = avx512vnni::lanes::attention,
    .train_tokens = avx512vnni::kTrainTokens,
    .multiply_entries = avx512vnni::multiply_entries<avx512vnni::Avx>,
    .sample_entries = avx512vnni::sample_rows<avx512vnni::Avx>,
    .multiply_cached_int8 = avx512vnni::multiply_cached<avx512vnni::Int8, 4, 4>,
    .multiply_cached_float = avx512vnni::multiply_cached<avx512vnni::Float, 4, 4>,
    .read_all = avx512vnni::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
