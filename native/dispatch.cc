#include "dispatch.h"

#include <stdexcept>

#if defined(PRUNEOFA_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pruneofa {
namespace {

#if defined(PRUNEOFA_X86)

struct Cpu {
  bool avx2 = false, avx512vnni = false, amx = false;
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
  cpu.avx2 = ymm && fma && (b >> 5 & 1);
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  cpu.avx512vnni = cpu.avx2 && zmm && f && dq && bw && vl && vnni;
  const bool vbmi = c >> 1 & 1, vbmi2 = c >> 6 & 1, bf16 = d >> 22 & 1, fp16 = d >> 23 & 1, tile = d >> 24 & 1,
             int8 = d >> 25 & 1;
  cpu.amx = cpu.avx512vnni && tiles && popcnt && vbmi && vbmi2 && bf16 && fp16 && tile && int8 && may_use_tiles();
  return cpu;
}

#endif

std::vector<const Kernels*> find() {
  std::vector<const Kernels*> found = {&kScalar};
#if defined(PRUNEOFA_X86)
  const Cpu cpu = detect();
  if (cpu.avx2) found.push_back(&kAvx2);
  if (cpu.avx512vnni) found.push_back(&kAvx512Vnni);
  if (cpu.amx) found.push_back(&kAmx);
#endif
  return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find();
  return found;
}

const Kernels& kernels_for(const std::string& isa) {
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (isa == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("isa is '" + isa + "', but this CPU and build have: " + names);
}

}  // namespace pruneofa
