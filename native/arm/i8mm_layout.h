#pragma once

namespace pruneofa {

struct PackedLayer;
struct Kernels;
struct LaidOut;

// lay_out_words; then of dense int8 blocks the words of two groups are interleaved, [groups / 2][outputs][2], so that
// two outputs' weights for eight inputs are consecutive.
void lay_out_pairs(const PackedLayer& layer, const Kernels& kernels, LaidOut& out);

}  // namespace pruneofa
