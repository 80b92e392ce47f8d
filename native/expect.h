// Arguments that do not fit are std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <stdexcept>

namespace pruneofa {

inline void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

}  // namespace pruneofa
