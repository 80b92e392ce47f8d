#include "arm/cpu.h"

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#include <cstdint>
#endif

namespace pruneofa {
namespace {

struct Cpu {
  bool dotprod = false, i8mm = false;
};

#if defined(__APPLE__)
bool system_says(const char* name) {
  int32_t value = 0;
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

Cpu detect() {
  Cpu cpu;
#if defined(__linux__)
  constexpr int kDotProd = 20, kI8mm = 13;  // bits HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers lack
  cpu.dotprod = getauxval(AT_HWCAP) >> kDotProd & 1;
  cpu.i8mm = getauxval(AT_HWCAP2) >> kI8mm & 1;
#elif defined(__APPLE__)
  cpu.dotprod = true;  // every Mac with such a CPU; macOS 11 does not answer
  cpu.i8mm = system_says("hw.optional.arm.FEAT_I8MM");
#endif
  cpu.i8mm = cpu.i8mm && cpu.dotprod;
  return cpu;
}

const Cpu& this_cpu() {
  static const Cpu cpu = detect();
  return cpu;
}

}  // namespace

bool cpu_has_dotprod() { return this_cpu().dotprod; }
bool cpu_has_i8mm() { return this_cpu().i8mm; }

}  // namespace pruneofa
