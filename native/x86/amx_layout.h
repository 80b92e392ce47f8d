// Weights for AMX.
#pragma once

#include "kernels.h"

namespace pruneofa {

// int8 weights as tiles, dense or as masks and non-zeros; float weights as words.
void lay_out_amx(const PackedLayer& layer, const Kernels& kernels, LaidOut& out);

}  // namespace pruneofa
