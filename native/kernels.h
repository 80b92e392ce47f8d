// The contract between the encoder and the kernels of one instruction set ("ISA path").
//
// Token panels. The tokens of a chunk of sequences, end to end, are cut into panels of 16; the last panel is padded.
// Everything between layers is stored panel by panel with the 16 tokens innermost, so that vector lanes run over
// tokens and nothing is ever reduced across lanes:
//
//   float activations   float [panels][features][16]
//   codes, int8 paths   uint8 [panels][inputs / 4][16][4]      four consecutive inputs of a token are one 32-bit word
//   codes, avx2         int16 [panels][inputs / 2][16][2]      the same with two inputs, because AVX2 multiplies pairs
//
// `inputs` is rounded up to 64 for codes; the padding is zero. All buffers are aligned to 64 bytes.
//
// A linear layer is y[n] = sum_k w[n][k] * x[k] for every token. int8: x is quantized per token,
// x = scale * (code - zero), codes in 0..255, weights in -127..127, so |sum| <= 255 * 127 * inputs fits int32 for
// inputs < 2^16; the sums are exact and therefore the same on every path. The floats made from them, and all other
// float operations, may differ between paths by rounding (tests/kernels/test_encoder.py states the tolerance).
//
// Nothing here allocates, throws or locks. Rows [begin, end) may be computed by different threads at the same time.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>

// Sums in registers need their loops unrolled whatever the optimisation level.
#if defined(__clang__)
#define PRUNEOFA_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define PRUNEOFA_UNROLL _Pragma("GCC unroll 16")
#else
#define PRUNEOFA_UNROLL
#endif

namespace pruneofa {

constexpr int kLanes = 16;

enum class Activation { kNone, kGelu, kGeluTanh, kRelu };

// Weights of one linear layer in the layout of one path. Either `masks` (AMX, sparse), or groups: a group is the
// 32-bit word of 4 int8, 2 int16 or 1 float of consecutive inputs that is broadcast against 16 tokens.
struct Weights {
  int outputs = 0;
  int inputs = 0;
  // Sparse groups: of row n those in [row_start[n], row_start[n + 1]); `index` counts groups along the inputs.
  const uint32_t* row_start = nullptr;
  const uint16_t* index = nullptr;
  const uint32_t* words = nullptr;  // dense: [outputs / block][groups][block]
  // AMX, per tile of 16 outputs x 64 inputs, tiles of one row of tiles consecutive.
  const uint64_t* masks = nullptr;        // sparse: [outputs / 16][inputs / 64][16]
  const uint32_t* value_start = nullptr;  // sparse: [outputs / 16]
  const int8_t* values = nullptr;         // sparse: non-zeros in the order of the masks; dense: whole tiles
  // int8 only.
  const float* scale = nullptr;      // [outputs]
  const int32_t* row_sum = nullptr;  // [outputs]
  const float* bias = nullptr;       // [outputs], zeros where the layer has none
  bool sparse = false;
};

// What a linear layer reads and where it writes.
struct Operands {
  const void* x = nullptr;         // codes, or floats for float weights
  const float* scale = nullptr;    // [panels][16], int8 only
  const int32_t* zero = nullptr;   // [panels][16], int8 only
  int panels = 0;
  float* y = nullptr;              // [panels][.][16], `y_stride` floats from panel to panel
  std::ptrdiff_t y_stride = 0;
  int32_t* sums = nullptr;         // if set, the raw int32 sums go here, [panels][outputs][16], and nothing to y
  Activation activation = Activation::kNone;
  void* scratch = nullptr;         // of this thread, `scratch_bytes` long
};

// One query panel of one head of one sequence.
struct Attention {
  const float* query = nullptr;  // float activations holding the head's rows, panel 0
  const float* key = nullptr;
  const float* value = nullptr;
  float* out = nullptr;              // the head's rows of the output, panel 0
  std::ptrdiff_t stride = 0;         // floats between panels of query, key and value
  std::ptrdiff_t out_stride = 0;
  int size = 0;                      // of a head
  float scale = 0;                   // of the scores
  int begin = 0, end = 0;            // tokens of the sequence
  int panel = 0;                     // of the queries
  void* scratch = nullptr;
};

// The kernels of one path. `codes_bytes(inputs)` is the size of a panel of codes.
struct Kernels {
  const char* isa;
  int group_int8;        // inputs in a word of int8 weights: 4, or 2 on AVX2
  int block_int8;        // outputs per block of dense int8 words; 0: the path takes tiles (AMX)
  int block_float;       // the same for float words
  int granule;           // rows are handed to threads in multiples of this
  float sparse_above;    // int8: sparsity from which the sparse layout is the faster one (docs/kernels.md)
  float sparse_above_float;

  void (*begin)();  // once per thread and forward pass
  void (*end)();
  void (*linear_int8)(const Weights&, const Operands&, int begin, int end);
  void (*linear_float)(const Weights&, const Operands&, int begin, int end);
  // One panel of floats [features][16] to codes, scale[16] and zero[16].
  void (*quantize)(const float* x, int features, void* codes, float* scale, int32_t* zero);
  // x = norm(x + y) over the features of one panel; y may be null.
  void (*normalize)(float* x, const float* y, int features, const float* gamma, const float* beta, float epsilon);
  void (*attention)(const Attention&);
};

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr std::size_t codes_bytes(int inputs, int group_int8) {
  return static_cast<std::size_t>(round_up(inputs, 64)) * kLanes * (group_int8 == 2 ? 2 : 1);
}
// Largest need of any kernel: expanded weight tiles (AMX), or the scores of one query panel.
constexpr std::size_t scratch_bytes(int inputs, int tokens) {
  const std::size_t tiles = static_cast<std::size_t>(round_up(inputs, 64)) * 32 + 8192;
  const std::size_t scores = static_cast<std::size_t>(round_up(tokens, kLanes) + 2 * kLanes) * kLanes * sizeof(float) + 65536;
  return tiles > scores ? tiles : scores;
}

extern const Kernels kScalar;
#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
extern const Kernels kAmx;
#endif

}  // namespace pruneofa
