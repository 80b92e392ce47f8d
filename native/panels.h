// Conversion between row-major matrices and token panels (kernels.h).
#pragma once

#include <cstddef>

#include "kernels.h"

namespace pruneofa {

// panels: [panels][features][16]; lanes past the last token stay as they are.
inline void rows_to_panels(const float* rows, std::size_t tokens, int features, float* panels) {
  for (std::size_t t = 0; t < tokens; ++t) {
    float* panel = panels + t / kLanes * features * kLanes + t % kLanes;
    for (int f = 0; f < features; ++f) panel[f * kLanes] = rows[t * features + f];
  }
}

template <class T>
void panels_to_rows(const T* panels, std::size_t tokens, int features, T* rows) {
  for (std::size_t t = 0; t < tokens; ++t) {
    const T* panel = panels + t / kLanes * features * kLanes + t % kLanes;
    for (int f = 0; f < features; ++f) rows[t * features + f] = panel[f * kLanes];
  }
}

// codes: words of `group` codes of consecutive inputs, [panels][inputs / group][16][group]; the padding stays as it is.
// `offset` is subtracted from each.
inline void rows_to_codes(const uint8_t* rows, std::size_t tokens, int inputs, int group, int offset, char* codes) {
  const std::size_t bytes = codes_bytes(inputs, group);
  for (std::size_t t = 0; t < tokens; ++t) {
    char* panel = codes + t / kLanes * bytes;
    for (int k = 0; k < inputs; ++k) {
      const std::size_t place = (static_cast<std::size_t>(k / group) * kLanes + t % kLanes) * group + k % group;
      const uint8_t code = rows[t * inputs + k];
      if (group == 2) {
        reinterpret_cast<int16_t*>(panel)[place] = code;
      } else {
        reinterpret_cast<uint8_t*>(panel)[place] = static_cast<uint8_t>(code - offset);
      }
    }
  }
}

}  // namespace pruneofa
