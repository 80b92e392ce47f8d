// AMX: a tile of 16 outputs x 64 inputs times a tile of 64 inputs x 16 tokens in one instruction.
//
// The weights are the left operand, so that a row of a tile is a run of 64 weights of one output: it is expanded from
// one 64-bit mask and the non-zeros that follow in memory (VPEXPANDB). The codes of a token panel already have the
// layout of the right operand. A stretch of a pair of tile rows is expanded once, into memory that stays in the
// first-level cache, while the first two panels are multiplied; further panels read the expanded tiles.
#include <immintrin.h>

#include "kernels.h"
#include "target.h"
#include "x86/amx_layout.h"
#include "x86/cpu.h"

PRUNEOFA_TARGET_BEGIN(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx512bf16,avx512fp16,avx2,fma,popcnt,"
    "amx-tile,amx-int8,amx-bf16")
#if !defined(__clang__)
#pragma GCC optimize("no-tree-slp-vectorize")  // it keeps pairs of pointers in vector registers
#endif

namespace pruneofa {
namespace {
namespace amx {
// GCC stops inlining where a file exceeds its growth limit, and the steps of a kernel are slow as calls.
#define PRUNEOFA_INLINE inline __attribute__((always_inline))
#include "x86/avx512.inc.h"
#include "x86/amx_gelu.inc.h"

constexpr int kTile = 1024;  // bytes

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Constant data, because GCC's intrinsic tells the optimizer that it reads the first 8 bytes only.
const TileConfig kEightFullTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kEightFullTiles); }

// After writing what a tile will be loaded from: GCC's tile loads do not say that they read memory.
PRUNEOFA_INLINE void compiler_barrier() { asm volatile("" ::: "memory"); }

void end() { _tile_release(); }

#include "x86/amx_expand.inc.h"
#include "x86/amx_epilogue.inc.h"

// The operands of one block.
struct Multiply {
  const int8_t* weights;  // the first row of tiles
  std::ptrdiff_t second;  // from it to the second
  const char* x;          // the first panel
  std::ptrdiff_t next;    // from it to the second
  int chunks;
  Expander expander[2];   // of the two rows
  const int32_t* start;   // initial values of the sums, four tiles
  int start_row, start_tile;  // bytes from one row of `start` to the next, numbers from one tile to the next
  int32_t* before;        // where the sums of the previous block are stored
  const int32_t* sums;    // of the previous block, for the epilogue
};

// Stores tile `i` with the sums of the previous block and loads the initial values of this one. A macro, because tile
// numbers must be literals.
#define PRUNEOFA_NEXT_SUMS(i)                \
  _tile_stored(i, m.before + (i) * 256, 64); \
  _tile_loadd(i, m.start + (i) * m.start_tile, m.start_row)

// A chunk: four tile products, with the epilogue of `Rows` rows of the previous block after each, or of all four times
// `Rows` at the end where tiles are expanded (`Fresh`). The first chunk stores the sums of the previous block, each
// just before its tile is needed.
template <Epilogue kind, int Rows, bool Fresh, bool First>
PRUNEOFA_INLINE void multiply_chunk(Multiply& m, int c, RowEpilogue& f) {
  const int8_t* const weights = m.weights + c * kTile;
  const char* const x = m.x + c * kTile;
  _tile_loadd(4, weights, 64);
  _tile_stream_loadd(6, x, 64);
  if (First) {
    PRUNEOFA_NEXT_SUMS(0);
  }
  _tile_dpbsud(0, 4, 6);
  if (!Fresh) apply_to_rows<kind, Rows>(f);
  _tile_loadd(5, weights + m.second, 64);
  if (First) {
    PRUNEOFA_NEXT_SUMS(1);
  }
  _tile_dpbsud(1, 5, 6);
  if (!Fresh) apply_to_rows<kind, Rows>(f);
  _tile_stream_loadd(7, x + m.next, 64);
  if (First) {
    PRUNEOFA_NEXT_SUMS(2);
  }
  _tile_dpbsud(2, 4, 7);
  if (!Fresh) apply_to_rows<kind, Rows>(f);
  if (First) {
    PRUNEOFA_NEXT_SUMS(3);
  }
  _tile_dpbsud(3, 5, 7);
  if (!Fresh) return apply_to_rows<kind, Rows>(f);
  expand_tile(m.expander[0]);
  expand_tile(m.expander[1]);
  apply_to_rows<kind, 4 * Rows>(f);
}

#undef PRUNEOFA_NEXT_SUMS

// Number of chunks between writing a tile, or sums, and reading them: a load soon after the store would wait for it.
constexpr int kAhead = 2;

// The epilogue of the previous block is interleaved: `Rows` outputs after each tile product. Many at once would fill
// the scheduler and delay tile instructions, so a chunk with an epilogue is followed by `gap` - 1 without. A
// mispredicted branch waits for the tile instructions before it, up to 250 ns: loops have few iterations, always the
// same number.
template <Epilogue kind, int Rows, bool Fresh>
void multiply_block(const Weights& w, const Operands& o, Multiply& m, const Block& before) {
  const int chunks = m.chunks, expanded = Fresh ? chunks - kAhead : 0;  // beside the chunks before this one
  RowEpilogue f = {};
  for (int c = 0; Fresh && c < kAhead && c < chunks; ++c) {
    expand_tile(m.expander[0]);
    expand_tile(m.expander[1]);
  }
  const auto without_rows = [&](int c) __attribute__((always_inline)) {
    Fresh && c < expanded ? multiply_chunk<kind, 0, Fresh, false>(m, c, f)
                          : multiply_chunk<kind, 0, false, false>(m, c, f);
  };
  expanded > 0 ? multiply_chunk<kind, 0, Fresh, true>(m, 0, f) : multiply_chunk<kind, 0, false, true>(m, 0, f);
  int c = 1, finished = 0;
  for (; c < kAhead && c < chunks; ++c) without_rows(c);
  const int rows = before.rows == 32 && o.sums == nullptr ? before.panels * 32 : 0;
  const int gap = (chunks - kAhead) * Rows / 16;
  for (; finished < rows && c < chunks; finished += 4 * Rows) {
    f = row_epilogue<kind>(w, o, before, finished, m.sums);
    Fresh && c < expanded ? multiply_chunk<kind, Rows, Fresh, false>(m, c, f)
                          : multiply_chunk<kind, Rows, false, false>(m, c, f);
    store_ranges<kind>(f);
    ++c;
    for (int g = 1; g < gap; ++g, ++c) without_rows(c);
  }
  for (; c < chunks; ++c) without_rows(c);
  if (o.sums != nullptr) return copy_raw_sums(w, o, before, m.sums);
  apply_to_rest<kind>(w, o, before, finished, m.sums);
}

// Many inputs are taken in stretches, so that the tiles expanded for one, 26 KiB, stay in the first-level cache while
// all panels are multiplied; the sums of a block wait in memory for the next stretch. Two panels read them only once.
constexpr int kMostChunks = 16, kStretch = 13;

// Many panels are processed in groups, so that their codes, which all outputs read, stay in the second-level cache.
// This saves more than expanding the weights again for each group costs.
constexpr std::ptrdiff_t kMostCodes = 900 << 10;

// How a layer is divided, and its buffers in the scratch memory.
struct Division {
  int chunks, most;          // of all inputs, and of a stretch
  int group;                 // of panels
  std::ptrdiff_t row_bytes;  // of all chunks
  std::ptrdiff_t second;     // from the first row of tiles to the second
  int8_t* tiles;
  int32_t *sums, *waiting;
};

inline Division divide(const Weights& w, const Operands& o) {
  Division d = {};
  d.chunks = round_up(w.inputs, 64) / 64;
  d.row_bytes = static_cast<std::ptrdiff_t>(d.chunks) * kTile;
  const int groups = static_cast<int>(1 + (o.panels * d.row_bytes - 1) / kMostCodes);
  d.group = round_up((o.panels + groups - 1) / groups, 2);
  const bool worth = d.chunks > kMostChunks && o.panels > 2 && d.group > 2;
  const int stretches = worth ? (d.chunks + kStretch - 1) / kStretch : 1;
  d.most = (d.chunks + stretches - 1) / stretches;
  d.second = w.sparse ? static_cast<std::ptrdiff_t>(d.most) * kTile : d.row_bytes;
  d.tiles = static_cast<int8_t*>(o.scratch);
  d.sums = reinterpret_cast<int32_t*>(d.tiles + 2 * d.row_bytes);
  d.waiting = d.sums + 4 * 256;
  return d;
}

// Outputs n to n + rows - 1, up to 32, of panels `first` to `past` - 1.
template <Epilogue kind, int Rows>
void multiply_rows(const Weights& w, const Operands& o, const Division& d, Multiply& m, Block& before, int n, int rows,
                   int first, int past) {
  alignas(64) static constexpr int32_t kZeros[kLanes] = {};
  const int row = n / 16;
  m.second = rows > 16 ? d.second : 0;  // a lone row of tiles is multiplied twice
  for (int i = 0; w.sparse && i < 2; ++i) {
    const int tile_row = m.second ? row + i : row;
    m.expander[i] = {w.masks + static_cast<std::ptrdiff_t>(tile_row) * d.chunks * 16,
                     w.values + w.value_start[tile_row], nullptr, w.short_runs};
  }
  for (int c = 0; c < d.chunks; c += d.most) {
    const bool last = c + d.most >= d.chunks;
    m.chunks = last ? d.chunks - c : d.most;
    m.weights = w.sparse ? d.tiles : w.values + row * d.row_bytes + c * kTile;
    for (int i = 0; i < 2; ++i) m.expander[i].tile = d.tiles + i * m.second;
    for (int p = first; p < past; p += 2) {
      int32_t* const waiting = d.waiting + p / 2 * 4 * 256;
      m.x = static_cast<const char*>(o.x) + p * d.row_bytes + c * kTile;
      m.next = p + 1 < o.panels ? d.row_bytes : 0;
      m.start = c == 0 ? kZeros : waiting;
      m.start_row = c == 0 ? 0 : 64;
      m.start_tile = c == 0 ? 0 : 256;
      w.sparse && p == first ? multiply_block<kind, Rows, true>(w, o, m, before)
                             : multiply_block<kind, Rows, false>(w, o, m, before);
      before = last ? Block{n, rows, p, m.next ? 2 : 1} : Block();
      m.before = last ? d.sums : waiting;
    }
  }
}

template <Epilogue kind, int Rows>
void multiply_tiles(const Weights& w, const Operands& o, int begin, int end) {
  const Division d = divide(w, o);
  Multiply m = {};
  m.sums = m.before = d.sums;
  Block before;
  for (int first = 0; first < o.panels; first += d.group) {
    const int past = first + d.group < o.panels ? first + d.group : o.panels;
    for (int n = begin; n < end; n += 32) {
      multiply_rows<kind, Rows>(w, o, d, m, before, n, end - n < 32 ? end - n : 32, first, past);
    }
  }
  _tile_stored(0, m.before, 64);
  _tile_stored(1, m.before + 256, 64);
  _tile_stored(2, m.before + 512, 64);
  _tile_stored(3, m.before + 768, 64);
  if (o.sums != nullptr) return copy_raw_sums(w, o, before, m.sums);
  apply_to_rest<kind>(w, o, before, 0, m.sums);
}

// The rows of a block are finished in 8 chunks, or in 4 where there are few.
template <Epilogue kind>
void multiply(const Weights& w, const Operands& o, int begin, int end) {
  if (w.inputs > (kAhead + 7) * 64) return multiply_tiles<kind, 2>(w, o, begin, end);
  multiply_tiles<kind, 4>(w, o, begin, end);
}

void linear_int8(const Weights& w, const Operands& o, int begin, int end) {
  if (o.add) return multiply<Epilogue::kAdded>(w, o, begin, end);
  if (o.activation == Activation::kNone && o.ranges == nullptr) return multiply<Epilogue::kFloats>(w, o, begin, end);
  if (o.activation == Activation::kGeluHalf) return multiply<Epilogue::kGeluHalf>(w, o, begin, end);
  if (o.activation == Activation::kGelu) return multiply<Epilogue::kGelu>(w, o, begin, end);
  multiply<Epilogue::kOther>(w, o, begin, end);
}

#include "x86/amx_attention.inc.h"

// Four tile products, as in a chunk. Two tiles of weights and two of codes.
int64_t multiply_cached_tiles(CachedOperands& o, int turns) {
  static_assert(sizeof o.words == 2 * kTile && sizeof o.x == 4 * kTile && sizeof o.sums == 4 * kTile);
  const char* const weights = reinterpret_cast<const char*>(o.words);
  const char* const x = o.x[0][0];
  _tile_loadd(4, weights, 64);
  _tile_loadd(5, weights + kTile, 64);
  _tile_loadd(6, x, 64);
  _tile_loadd(7, x + kTile, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int t = 0; t < turns; ++t) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, o.sums, 64);
  _tile_stored(1, o.sums + kTile, 64);
  _tile_stored(2, o.sums + 2 * kTile, 64);
  _tile_stored(3, o.sums + 3 * kTile, 64);
  return int64_t{2} * 4 * 16 * 64 * kLanes * turns;
}

}  // namespace amx
}  // namespace

const Kernels amx_kernels = {
    .isa = "amx",
    .supported = cpu_has_amx,
    .lay_out = lay_out_amx,
    .group_int8 = 4,
    .block_float = 4,
    .sparse_above = 0.3f,
    .sparse_above_float = 0.6f,
    .begin = amx::begin,
    .end = amx::end,
    .linear_int8 = amx::linear_int8,
    .linear_float = amx::linear<amx::Float>,
    .range = amx::lanes::range,
    .scales = amx::lanes::scales,
    .encode = amx::lanes::encode_words<4>,
    .moments = amx::lanes::moments,
    .normalize = amx::lanes::normalize,
    .attention = amx::attention,
    .train_tokens = amx::kTrainTokens,
    .multiply_entries = amx::multiply_entries<amx::Avx>,
    .sample_entries = amx::sample_rows<amx::Avx>,
    .encode_half = amx::encode_half,
    .multiply_cached_int8 = amx::multiply_cached_tiles,
    .multiply_cached_float = amx::multiply_cached<amx::Float, 4, 4>,
    .read_all = amx::read_all,
};

}  // namespace pruneofa
PRUNEOFA_TARGET_END
