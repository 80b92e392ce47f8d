// AMX: a tile of 16 outputs x 64 inputs times a tile of 64 inputs x 16 tokens in one instruction.
//
// The weights are the left operand, so that a row of a tile is a run of 64 weights of one output: it is expanded from
// one 64-bit mask and the non-zeros that follow in memory (VPEXPANDB). The codes of a token panel are the right
// operand as they lie. A pair of tile rows is expanded once, into memory that stays in the first-level cache up to
// about 1000 inputs and in the second-level one beyond, while the first two panels are multiplied; further panels read
// the expanded tiles.
#include "kernels.h"

#if defined(PRUNEOFA_X86)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,popcnt,amx-tile,amx-int8,amx-bf16")

namespace pruneofa {
namespace {
namespace amx {
#define PRUNEOFA_REGISTER 64
#define PRUNEOFA_MIN(a, b) _mm512_maskz_min_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_MAX(a, b) _mm512_maskz_max_ps(0xffff, (__m512)(a), (__m512)(b))
#define PRUNEOFA_LOOKUP(table, index) \
  (FloatRegister) _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)(index), _mm512_load_ps((table) + 16))
#include "lanes.h"
#include "linear.inc.h"
#include "avx512.inc.h"

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
inline void written() { asm volatile("" ::: "memory"); }

void end() { _tile_release(); }

// Sixteen rows of 64 weights from their masks; returns where the non-zeros of the next tile begin. Reads up to 63
// bytes past the last non-zero. `Most` non-zeros per row: shorter loads straddle fewer cache lines.
template <int Most>
inline const int8_t* expand_rows(const uint64_t* masks, const int8_t* values, int8_t* tile) {
  asm("" : "+r"(masks), "+r"(tile));  // or GCC keeps sixteen addresses of each
  PRUNEOFA_UNROLL
  for (int r = 0; r < 16; ++r) {
    const __m512i packed = Most > 32 ? _mm512_loadu_si512(values)
                                     : _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
    _mm512_store_si512(tile + r * 64, _mm512_maskz_expand_epi8(masks[r], packed));
    values += _mm_popcnt_u64(masks[r]);
  }
  written();
  return values;
}

inline const int8_t* expand(bool short_runs, const uint64_t* masks, const int8_t* values, int8_t* tile) {
  return short_runs ? expand_rows<32>(masks, values, tile) : expand_rows<64>(masks, values, tile);
}

// The sums of two rows of tiles for two panels that wait to become floats. They do so a few rows at a time between
// the tile instructions of the next block, which leave the vector units idle.
struct Pending {
  const int32_t* sums = nullptr;  // of the next output: [16 tokens]
  int n = 0, stop = 0, begin = 0; // outputs; the next one, and those of the block
  int panel = 0, more = 0;        // panels after this one
};

// Without an activation a row is little work: so many at once, and the first when the sums of the block before have
// certainly been stored. Beside an activation the work has to be spread evenly.
constexpr int kLightRows = 8;

// One call stays within a panel.
template <Activation kind>
inline void finish_some(const Weights& w, const Operands& o, Pending& pending, int rows) {
  if (pending.n == pending.stop) {
    if (pending.more == 0) return;
    pending.sums += (32 - (pending.stop - pending.begin)) * kLanes;
    pending.n = pending.begin;
    --pending.more;
    ++pending.panel;
  }
  const int stop = pending.n + rows < pending.stop ? pending.n + rows : pending.stop;
  const Tokens t = tokens(o, pending.panel);
  lanes::Floats low = lanes::all(0.0f), high = lanes::all(0.0f);
  float* y = o.y + pending.panel * o.y_stride - o.first * kLanes;
  const int32_t* sums = pending.sums;
  const auto row = [&](int n) {
    lanes::Floats v = dequantize(w, t, n, lanes::load(sums));
    v = kind == Activation::kGelu ? lanes::gelu(v) : kind == Activation::kNone ? v : lanes::activate(v, o.activation);
    lanes::store(y + n * kLanes, v);
    low = lanes::smaller(low, v);
    high = lanes::larger(high, v);
    sums += kLanes;
  };
  if (kind == Activation::kNone && stop - pending.n == kLightRows) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < kLightRows; ++i) row(pending.n + i);
  } else {
    for (int n = pending.n; n < stop; ++n) row(n);
  }
  if (o.ranges != nullptr) {
    lanes::widen(o.ranges + pending.panel * 2 * kLanes, low);
    lanes::widen(o.ranges + pending.panel * 2 * kLanes, high);
  }
  pending.sums = sums;
  pending.n = stop;
}

inline void copy_sums(const Weights& w, const Operands& o, Pending& pending, int) {
  if (pending.sums == nullptr) return;
  for (int more = pending.more; more >= 0; --more, ++pending.panel) {
    for (pending.n = pending.begin; pending.n < pending.stop; ++pending.n, pending.sums += kLanes) {
      finish(w, o, pending.panel, pending.n, lanes::load(pending.sums));
    }
    pending.sums += (32 - (pending.stop - pending.begin)) * kLanes;
  }
  pending = {};
}

// Weights come from memory once per pass over the layers, and their runs are too short for the prefetcher to find. Fetch
// chunk `c` of the next block's two rows of tiles.
inline void prefetch(const Weights& w, int row, int chunks, int c) {
  const int last = round_up(w.outputs, 16) / 16 - 1;
  for (int i = 0; i < 2; ++i) {
    const int mine = row + i < last ? row + i : last;
    const char* masks = reinterpret_cast<const char*>(w.masks + (static_cast<std::ptrdiff_t>(mine) * chunks + c) * 16);
    const int8_t* values = w.values + w.value_start[mine];
    const std::ptrdiff_t bytes = w.value_start[mine + 1] - w.value_start[mine];
    _mm_prefetch(masks, _MM_HINT_T0);
    _mm_prefetch(masks + 64, _MM_HINT_T0);
    const char* from = reinterpret_cast<const char*>(values + bytes * c / chunks);
    const char* to = reinterpret_cast<const char*>(values + bytes * (c + 1) / chunks);
    for (; from < to; from += 64) _mm_prefetch(from, _MM_HINT_T0);
  }
}

template <void (*finish_rows)(const Weights&, const Operands&, Pending&, int)>
void multiply_tiles(const Weights& w, const Operands& o, int begin, int end) {
  const int chunks = round_up(w.inputs, 64) / 64;
  const bool light = o.activation == Activation::kNone && chunks > 9;
  const int share = light ? kLightRows : (32 + chunks / 2 - 1) / (chunks / 2 ? chunks / 2 : 1);  // rows to finish
  const int first = light ? 2 : 0, step = light ? (chunks - 2) / 8 : 1;  // in which chunks
  int8_t* tiles = static_cast<int8_t*>(o.scratch);
  int32_t* sums[2];
  sums[0] = reinterpret_cast<int32_t*>(tiles + 2 * chunks * kTile);
  sums[1] = sums[0] + 1024;
  int turn = 0;
  Pending pending;
  const char* x = static_cast<const char*>(o.x);
  const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(chunks) * kTile;
  for (int n = begin; n < end; n += 32) {
    const int row = n / 16;
    const int second = n + 16 < end ? row + 1 : row;  // a lone row of tiles is multiplied twice
    const uint64_t* masks[2] = {};
    const int8_t* values[2] = {};
    const int8_t* weights[2];
    for (int i = 0; i < 2; ++i) {
      const std::ptrdiff_t mine = i ? second : row;
      weights[i] = w.sparse ? tiles + i * chunks * kTile : w.values + mine * chunks * kTile;
      if (!w.sparse) continue;
      masks[i] = w.masks + mine * chunks * 16;
      values[i] = w.values + w.value_start[mine];
    }
    const auto expand_chunk = [&](int c) {
      for (int i = 0; i < 2; ++i) {
        values[i] = expand(w.short_runs, masks[i] + c * 16, values[i], tiles + (i * chunks + c) * kTile);
      }
    };
    for (int p = 0; p < o.panels; p += 2) {
      const bool fresh = w.sparse && p == 0;
      const char* x0 = x + p * panel_bytes;
      const char* x1 = p + 1 < o.panels ? x0 + panel_bytes : x0;
      // A tile read soon after it was written waits for the writes: two chunks ahead of the multiplication.
      if (fresh) expand_chunk(0);
      if (fresh && chunks > 1) expand_chunk(1);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int c = 0, next = first; c < chunks; ++c) {
        _tile_loadd(4, weights[0] + c * kTile, 64);
        _tile_loadd(6, x0 + c * kTile, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, weights[1] + c * kTile, 64);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, x1 + c * kTile, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
        if (fresh && c + 2 < chunks) expand_chunk(c + 2);
        if (w.sparse && p + 2 >= o.panels) prefetch(w, row + 2, chunks, c);
        if (c == next) {
          finish_rows(w, o, pending, share);
          next += step;
        }
      }
      finish_rows(w, o, pending, 32);
      finish_rows(w, o, pending, 32);
      int32_t* mine = sums[turn];
      _tile_stored(0, mine, 64);
      _tile_stored(1, mine + 256, 64);
      _tile_stored(2, mine + 512, 64);
      _tile_stored(3, mine + 768, 64);
      turn = 1 - turn;
      pending = {mine, n, end - n < 32 ? end : n + 32, n, p, o.panels - p < 2 ? 0 : 1};
    }
  }
  finish_rows(w, o, pending, 32);
  finish_rows(w, o, pending, 32);
}

void linear_int8(const Weights& w, const Operands& o, int begin, int end) {
  if (o.sums != nullptr) return multiply_tiles<copy_sums>(w, o, begin, end);
  if (o.activation == Activation::kNone) return multiply_tiles<finish_some<Activation::kNone>>(w, o, begin, end);
  if (o.activation == Activation::kGelu) return multiply_tiles<finish_some<Activation::kGelu>>(w, o, begin, end);
  multiply_tiles<finish_some<Activation::kRelu>>(w, o, begin, end);  // any other, asked for each row
}

#include "attention_amx.inc.h"

}  // namespace amx
}  // namespace

const Kernels kAmx = {
    "amx",
    4, 0, 4, 0.3f, 0.6f,
    amx::begin, amx::end,
    amx::linear_int8,
    amx::linear<amx::Float>,
    amx::lanes::range,
    amx::lanes::scales,
    amx::lanes::encode_words<4>,
    amx::lanes::add,
    amx::lanes::normalize,
    amx::attention,
};

}  // namespace pruneofa
#pragma GCC pop_options
#endif
