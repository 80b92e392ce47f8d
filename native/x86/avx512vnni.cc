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
#include "x86/avx512_vnni.inc.h"

}  // namespace avx512vnni
}  // namespace

constinit const Kernels avx512vnni_kernels =
    avx512vnni::path("avx512vnni", cpu_has_avx512vnni, avx512vnni::lanes::attention);

}  // namespace pruneofa
PRUNEOFA_TARGET_END
