// What this machine can do at the moment, with the instructions of one path: the limits that a measurement is compared
// with, as other programs, a lower clock or another processor leave them.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace pruneofa {

// Operations per second of all threads together, a multiplication and an addition being two, on operands that stay in
// registers and the first-level cache. int8: of the int8 products, otherwise of floats.
double arithmetic_peak(const Kernels& kernels, bool int8, int threads);

// Bytes per second that all threads together read, each its own `bytes`, over and over.
double read_bandwidth(const Kernels& kernels, std::size_t bytes, int threads);

}  // namespace pruneofa
