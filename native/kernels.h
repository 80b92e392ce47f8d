// The contract between the encoder and the kernels of one instruction set ("ISA path").
//
// Token panels. The tokens of a chunk of sequences, end to end, are cut into panels of 16; the last panel is padded.
// Everything between layers is stored panel by panel with the 16 tokens innermost, so that vector lanes run over
// tokens and nothing is ever reduced across lanes:
//
//   float activations   float [panels][features][16]          each thread stores those of its own features
//   codes, int8 paths   uint8 [panels][inputs / 4][16][4]      four consecutive inputs of a token are one 32-bit word
//   codes, avx2         int16 [panels][inputs / 2][16][2]      the same with two inputs, because AVX2 multiplies pairs
//   codes, neon         int8  [panels][inputs / 4][16][4]      the code minus 128, because SDOT multiplies int8 by int8
//
// `inputs` is rounded up to 64 for codes; the padding is the code 0. All buffers are aligned to 64 bytes.
//
// A linear layer is y[n] = sum_k w[n][k] * x[k] for every token. int8: x is quantized, per token or by the layer's
// static scale, x = scale * (code - zero), codes in 0..255, weights in -128..127, so |sum| <= 255 * 128 * inputs fits
// int32 for inputs < 2^16; the sums are exact and therefore the same on every path. The floats made from them, and all
// other float operations, may differ between paths by rounding (tests/kernels/test_encoder.py states the tolerance).
//
// Nothing here allocates, throws or locks. Rows [begin, end) may be computed by different threads at the same time.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>

// Loops over sums in registers must be unrolled at every optimisation level.
#if defined(__clang__)
#define PRUNEOFA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define PRUNEOFA_UNROLL _Pragma("GCC unroll 16")
#else
#error "GCC or Clang is needed: vectors are their vector types"
#endif

namespace pruneofa {

struct PackedLayer;  // layout.h
struct LaidOut;

constexpr int kLanes = 16;
// LayerNorm's mean and variance are made from those of blocks of so many features, whoever computes a block.
constexpr int kNormBlock = 32;

// kGeluHalf: GELU in half precision, for activations that are quantized per token next, on a path that has
// `encode_half`. The result is float16, [features][16] in the first half of each panel, exact to about 5e-4 of the
// token's range.
enum class Activation { kNone, kGelu, kGeluHalf, kGeluTanh, kRelu };

// Weights of one linear layer in the layout of one path. AMX uses tiles, dense or as bitmasks and non-zeros. The other
// paths use groups: a group is a 32-bit word of 4 int8, 2 int16 or 1 float weights of consecutive inputs, which is
// broadcast to 16 tokens.
struct Weights {
  int outputs = 0;
  int inputs = 0;
  // Sparse groups: row n has the groups [row_start[n], row_start[n + 1]); `index` is the position of a group along the
  // inputs.
  const uint32_t* row_start = nullptr;
  const uint16_t* index = nullptr;
  const uint32_t* words = nullptr;  // dense: [outputs / block][groups][block]
  // Gathered words: `shared` outputs have one list, the entries [row_start[n / shared], row_start[n / shared + 1]).
  // Entry e has a group of any inputs, index[group * e ...] (inputs, not groups), and one word per output,
  // words[shared * e ...].
  int shared = 0;  // 1 or 4; 0: not gathered
  // AMX, per tile of 16 outputs x 64 inputs, tiles of one row of tiles consecutive.
  const uint64_t* masks = nullptr;        // sparse: [outputs / 16][inputs / 64][16]
  const uint32_t* value_start = nullptr;  // sparse: [outputs / 16 + 1]
  const int8_t* values = nullptr;         // sparse: non-zeros in the order of the masks; dense: whole tiles
  bool short_runs = false;  // no mask has more than 32 ones
  // int8 only.
  const float* scale = nullptr;      // [outputs]
  const float* row_sum = nullptr;    // [outputs], whole numbers up to 128 * 2^16 = 2^23
  const float* bias = nullptr;       // [outputs], zeros where the layer has none
  bool sparse = false;
};

// Running minimum and maximum of each token, [panels][2][16]. Each thread has one for its own features; `scales`
// reduces them over the threads.
using Ranges = float*;

// Inputs and outputs of a linear layer.
struct Operands {
  const void* x = nullptr;         // codes, or floats for float weights
  const float* scale = nullptr;    // [panels][16], int8 only
  const int32_t* zero = nullptr;   // [panels][16], int8 only
  int panels = 0;
  float* y = nullptr;              // [panels][.][16], from row `first` on, `y_stride` floats from panel to panel
  std::ptrdiff_t y_stride = 0;
  int first = 0;
  Ranges ranges = nullptr;         // if set, updated with what is written to y
  bool add = false;                // results are added to y, without activation or ranges
  int32_t* sums = nullptr;         // if set, the raw int32 sums are stored, [panels][outputs][16], and y is not written
  Activation activation = Activation::kNone;
  void* scratch = nullptr;         // scratch memory of this thread, `scratch_bytes` long
};

// The type that attention operands may be rounded to, on paths where that is faster.
enum class Rounding { kNone, kTwoBfloat16, kBfloat16 };

// A row of 16 queries and a key of the panels that a sequence shares with others are up to so much further apart than the
// sequence's own tokens.
constexpr int kBiasMargin = 2 * kLanes;

// Attention of one head of one sequence. Up to 16 features past the head may be read.
struct Attention {
  float* query = nullptr;  // float activations holding the head's rows, panel 0; the output replaces them
  const float* key = nullptr;
  const float* value = nullptr;
  std::ptrdiff_t stride = 0;         // floats between panels
  int size = 0;                      // of a head
  float scale = 0;                   // of the scores
  // Added to the scaled score of a query and a key: bias[query - key]; null: nothing is. kBiasMargin values before and
  // after those of the sequence's own distances may be read.
  const float* bias = nullptr;
  int begin = 0, end = 0;            // tokens of the sequence
  Rounding rounding = Rounding::kNone;
  void* scratch = nullptr;
};

// Operands that fit the first-level cache, for the limit of a path's products (ceilings.h).
struct CachedOperands {
  static constexpr int kSteps = 16, kWords = 32;
  alignas(64) char x[4][kSteps][64];                // of four panels: codes, or floats
  alignas(64) uint32_t words[kSteps][kWords];       // int8 or float weights
  alignas(64) char sums[4096];
};

// Entries that come so much later are prefetched.
constexpr int kEntriesAhead = 8;

// The positions of the entries of a sparse matrix: row n has the columns index[e] of the entries row_start[n] <= e <
// row_start[n + 1]. After the last entry there are four and kEntriesAhead more columns, which are read but not used.
struct Entries {
  int rows = 0, columns = 0;
  const uint32_t* row_start = nullptr;
  const uint16_t* index = nullptr;
};

// The kernels of one path. Rows of a linear layer and features of activations are divided among threads in multiples of
// 16, so that floats stay in the cache of the core that wrote them; threads exchange only ranges, moments and codes. What is
// computed of a token depends neither on the other tokens nor on the division: the same bits in any batch.
struct Kernels {
  const char* isa;
  bool (*supported)();  // whether this CPU and operating system can run the path
  // Chooses the layout of a layer and fills `out`, whose `sparsity`, sizes, scales and bias are set.
  void (*lay_out)(const PackedLayer& layer, const Kernels& kernels, LaidOut& out);
  int group_int8;            // inputs in a word of int8 weights and of codes: 4, or 2 on AVX2
  int code_offset = 0;       // subtracted from codes where they are stored: 128 makes them int8
  int block_int8 = 0;        // outputs per block of dense int8 words, divides 16; unused where int8 weights are tiles
  int block_float;           // the same for float words
  float sparse_above;        // int8: sparsity above which the sparse layout is faster (docs/kernels.md)
  float sparse_above_float;  // the same for floats
  // Time per entry of a gathered int8 list, relative to an entry of a plain list: for lists of one output, and for
  // lists shared by four outputs. 0: the path has no such kernel.
  float gathered = 0, gathered_by_4 = 0;

  void (*begin)();  // called once per thread and forward pass
  void (*end)();
  void (*linear_int8)(const Weights&, const Operands&, int begin, int end);
  void (*linear_float)(const Weights&, const Operands&, int begin, int end);

  // The following functions process one panel; x, [count][16], has the features of this thread.
  // Updates the panel's range, [2][16].
  void (*range)(const float* x, int count, Ranges range);
  // Scale and zero point of 16 tokens from `count` ranges, which are `stride` floats apart.
  void (*scales)(const float* ranges, int count, std::ptrdiff_t stride, float* scale, int32_t* zero);
  // Codes of x, the features begin .. end - 1 of `features`; the thread with the last feature also clears the padding.
  void (*encode)(const float* x, int begin, int end, int features, const float* scale, const int32_t* zero,
                 void* codes);
  // Of each block of kNormBlock features of x, of which the last may be shorter: the mean, and the sum of the squared
  // differences from it, [blocks][2][16].
  void (*moments)(const float* x, int count, float* moments);
  // x = gamma * (x - mean) / deviation + beta. Mean and variance are over all `features`, from the moments of all their
  // blocks; gamma and beta are those of the features in x. Updates the range if one is given.
  void (*normalize)(float* x, int count, int features, const float* moments, const float* gamma, const float* beta,
                    float epsilon, Ranges range);
  void (*attention)(const Attention&);

  // Training in float32 (pattern.h), of up to `train_tokens` tokens: rows of x [tokens][columns], and of y or dy
  // [tokens][rows]. `scratch` has train_scratch floats. What is computed of a token depends on no other token.
  int train_tokens;
  // y[t][n] = bias[n] + the sum of values[e] * x[t][index[e]] over the entries e of row n. No bias: null.
  void (*multiply_entries)(const Entries&, const float* values, const float* bias, const float* x, int tokens, float* y,
                           float* scratch);
  // sums[e] += the sum of dy[t][n] * x[t][index[e]] over the tokens, for the entries e of the rows begin .. end - 1.
  void (*sample_entries)(const Entries&, const float* x, const float* dy, int tokens, int begin, int end, float* sums,
                         float* scratch);

  // `encode` for the output of linear_int8 with kGeluHalf; null: the path does not have kGeluHalf.
  void (*encode_half)(const float* x, int begin, int end, int features, const float* scale, const int32_t* zero,
                      void* codes) = nullptr;

  // Limits of the path. The first two multiply operands of the first-level cache `turns` times, at most 4096, and return
  // the number of operations, a multiplication and an addition being two. `read_all` reads `bytes`, a multiple of 128,
  // and writes 64 to `out`.
  int64_t (*multiply_cached_int8)(CachedOperands&, int turns);
  int64_t (*multiply_cached_float)(CachedOperands&, int turns);
  void (*read_all)(const void* data, std::size_t bytes, void* out);
};

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr std::size_t codes_bytes(int inputs, int group_int8) {
  return static_cast<std::size_t>(round_up(inputs, 64)) * kLanes * (group_int8 == 2 ? 2 : 1);
}
// Largest need of any kernel: codes by input for gathered words (64 bytes each), or expanded weight tiles (32) and the
// sums of 32 outputs (AMX), or the operands of one head of a sequence (AMX: keys, values, four query panels and twice
// the weights of one and four, as two bfloat16 each) and the scores of four pairs of panels.
constexpr std::size_t scratch_bytes(int inputs, int tokens, int head) {
  const std::size_t sums = static_cast<std::size_t>(round_up(tokens, 2 * kLanes)) * 128;
  const std::size_t tiles = static_cast<std::size_t>(round_up(inputs, 64)) * 64 + 8192 + sums;
  const std::size_t keys = static_cast<std::size_t>(round_up(tokens, 2 * kLanes)) + 4 * kLanes;
  const std::size_t operands = keys * head * 8 + keys * 128 + static_cast<std::size_t>(head) * 256 + 24576;
  return tiles > operands ? tiles : operands;
}

// Columns of all inputs and of sixteen outputs.
constexpr std::size_t train_scratch(int columns, int train_tokens) {
  return (static_cast<std::size_t>(columns) + 16) * train_tokens;
}

// For paths whose weights are words; in layout.cc.
void lay_out_words(const PackedLayer& layer, const Kernels& kernels, LaidOut& out);

// The row of each path, defined in its file. CMakeLists.txt has the list: PRUNEOFA_PATH(scalar) PRUNEOFA_PATH(avx2) ...
#define PRUNEOFA_PATH(name) extern const Kernels name##_kernels;
PRUNEOFA_PATHS
#undef PRUNEOFA_PATH

}  // namespace pruneofa
