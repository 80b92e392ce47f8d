// AVX-512 with VNNI and BF16: the path avx512vnni, and attention on bfloat16 (VDPBF16PS) where operands may be rounded
// to it.
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma")

namespace pruneofa {
namespace {
namespace avx512bf16 {
#include "x86/avx512.inc.h"
#include "x86/avx512_vnni.inc.h"
#include "x86/avx512_bf16_attention.inc.h"

}  // namespace avx512bf16
}  // namespace

constinit const Kernels avx512bf16_kernels = avx512bf16::path("avx512bf16", cpu_has_avx512bf16, avx512bf16::attention);

}  // namespace pruneofa
PRUNEOFA_TARGET_END
