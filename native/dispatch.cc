#include "dispatch.h"

#include <stdexcept>

namespace pruneofa {

const std::vector<const Kernels*>& built_kernels() {
  static const std::vector<const Kernels*> built = {
#define PRUNEOFA_PATH(name) &name##_kernels,
      PRUNEOFA_PATHS
#undef PRUNEOFA_PATH
  };
  return built;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found;
    for (const Kernels* kernels : built_kernels()) {
      if (kernels->supported()) found.push_back(kernels);
    }
    return found;
  }();
  return available;
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
