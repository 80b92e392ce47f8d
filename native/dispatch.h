// The ISA paths of this build, and those that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pruneofa {

// The paths of this build, slowest first.
const std::vector<const Kernels*>& built_kernels();

// Those that this CPU and operating system can run, slowest first.
const std::vector<const Kernels*>& available_kernels();

// Throws std::invalid_argument, which names the available ones, if `isa` is not available.
const Kernels& kernels_for(const std::string& isa);

}  // namespace pruneofa
