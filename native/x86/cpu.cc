#include "x86/cpu.h"

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace pruneofa {
namespace {

struct Cpu {
  bool avx2 = false, avxvnni = false, avx512vnni = false, avx512bf16 = false, amx = false;
};

// Register state that the operating system saves: without it an instruction faults although cpuid lists it.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = c >> 12 & 1, os_saves = c >> 27 & 1, popcnt = c >> 23 & 1;
  if (!os_saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const uint32_t subleaves = a;  // of leaf 7, beside this one
  cpu.avx2 = ymm && fma && (b >> 5 & 1);
#if defined(PRUNEOFA_EMULATE)
  cpu.avxvnni = cpu.avx512vnni = cpu.avx512bf16 = cpu.amx = cpu.avx2;
  return cpu;
#endif
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  cpu.avx512vnni = cpu.avx2 && zmm && f && dq && bw && vl && vnni;
  const bool vbmi = c >> 1 & 1, vbmi2 = c >> 6 & 1, amx_bf16 = d >> 22 & 1, fp16 = d >> 23 & 1, tile = d >> 24 & 1,
             int8 = d >> 25 & 1;
  bool bf16 = false;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    cpu.avxvnni = cpu.avx2 && (a >> 4 & 1);
    bf16 = a >> 5 & 1;
  }
  cpu.avx512bf16 = cpu.avx512vnni && bf16;
  cpu.amx = cpu.avx512bf16 && tiles && popcnt && vbmi && vbmi2 && amx_bf16 && fp16 && tile && int8 && may_use_tiles();
  return cpu;
}

const Cpu& this_cpu() {
  static const Cpu cpu = detect();
  return cpu;
}

}  // namespace

bool cpu_has_avx2() { return this_cpu().avx2; }
bool cpu_has_avxvnni() { return this_cpu().avxvnni; }
bool cpu_has_avx512vnni() { return this_cpu().avx512vnni; }
bool cpu_has_avx512bf16() { return this_cpu().avx512bf16; }
bool cpu_has_amx() { return this_cpu().amx; }

}  // namespace pruneofa
