// Which paths this CPU and operating system can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pruneofa {

// Worst first. Asks the CPU once; for AMX it also asks the kernel for permission to use the tile registers.
const std::vector<const Kernels*>& available_kernels();

// Throws std::invalid_argument, naming what is available, when `isa` is not.
const Kernels& kernels_for(const std::string& isa);

}  // namespace pruneofa
