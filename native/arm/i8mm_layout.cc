#include "arm/i8mm_layout.h"

#include <algorithm>
#include <vector>

#include "layout.h"

namespace pruneofa {

void lay_out_pairs(const PackedLayer& layer, const Kernels& kernels, LaidOut& out) {
  lay_out_words(layer, kernels, out);
  if (layer.codes == nullptr || out.layout != Layout::kDenseWords) return;
  const std::size_t block = kernels.block_int8;
  std::vector<uint32_t> pair(2 * block);
  for (std::size_t at = 0; at < out.words.size(); at += 2 * block) {
    uint32_t* const words = out.words.data() + at;
    for (std::size_t n = 0; n < block; ++n) {
      pair[2 * n] = words[n];
      pair[2 * n + 1] = words[block + n];
    }
    std::copy(pair.begin(), pair.end(), words);
  }
}

}  // namespace pruneofa
