// AMX: a tile of 16 outputs x 64 inputs times a tile of 64 inputs x 16 tokens in one instruction.
//
// The weights are the left operand, so that a row of a tile is a run of 64 weights of one output: it is expanded from
// one 64-bit mask and the non-zeros that follow in memory (VPEXPANDB). The codes of a token panel are the right
// operand as they lie. A pair of tile rows is expanded once, into the first-level cache, while the first two panels
// are multiplied; further panels read the expanded tiles.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,popcnt,amx-tile,amx-int8")

namespace pruneofa {
namespace {
namespace amx {
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

void end() { _tile_release(); }

// Sixteen rows of 64 weights from their masks; returns where the non-zeros of the next tile begin. Reads up to 63
// bytes past the last non-zero.
inline const int8_t* expand(const uint64_t* masks, const int8_t* values, int8_t* tile) {
  PRUNEOFA_UNROLL
  for (int r = 0; r < 16; ++r) {
    const __m512i packed = _mm512_loadu_si512(values);
    _mm512_store_si512(tile + r * 64, _mm512_maskz_expand_epi8(masks[r], packed));
    values += _mm_popcnt_u64(masks[r]);
  }
  return values;
}

// Tile row `row` (16 outputs) in registers 0..3 (as `tile`), 16 tokens of `panel`.
inline void write(const Weights& w, const Operands& o, int row, int panel, const int32_t* sums) {
  const int count = w.outputs - row * 16 < 16 ? w.outputs - row * 16 : 16;
  for (int r = 0; r < count; ++r) finish(w, o, panel, row * 16 + r, lanes::load(sums + r * 16));
}

void linear_int8(const Weights& w, const Operands& o, int begin, int end) {
  const int chunks = round_up(w.inputs, 64) / 64;
  const int rows = round_up(w.outputs, 16) / 16;
  int8_t* tiles = static_cast<int8_t*>(o.scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(tiles + 2 * chunks * kTile);
  const char* x = static_cast<const char*>(o.x);
  const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(chunks) * kTile;
  for (int row = begin / 16; row < round_up(end, 16) / 16; row += 2) {
    const bool both = row + 1 < rows;
    const uint64_t* masks[2] = {};
    const int8_t* values[2] = {};
    const int8_t* weights[2];
    if (w.sparse) {
      for (int i = 0; i < 2; ++i) {
        const int mine = both ? row + i : row;
        masks[i] = w.masks + static_cast<std::ptrdiff_t>(mine) * chunks * 16;
        values[i] = w.values + w.value_start[mine];
        weights[i] = tiles + i * chunks * kTile;
      }
    } else {
      for (int i = 0; i < 2; ++i) weights[i] = w.values + static_cast<std::ptrdiff_t>(both ? row + i : row) * chunks * kTile;
    }
    for (int p = 0; p < o.panels; p += 2) {
      const bool fresh = w.sparse && p == 0;
      const char* x0 = x + p * panel_bytes;
      const char* x1 = p + 1 < o.panels ? x0 + panel_bytes : x0;
      if (fresh) {  // one chunk ahead of the multiplication
        for (int i = 0; i < 2; ++i) values[i] = expand(masks[i], values[i], tiles + i * chunks * kTile);
      }
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int c = 0; c < chunks; ++c) {
        if (fresh && c + 1 < chunks) {
          for (int i = 0; i < 2; ++i) {
            values[i] = expand(masks[i] + (c + 1) * 16, values[i], tiles + (i * chunks + c + 1) * kTile);
          }
        }
        _tile_loadd(4, weights[0] + c * kTile, 64);
        _tile_loadd(6, x0 + c * kTile, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, weights[1] + c * kTile, 64);
        _tile_dpbsud(1, 5, 6);
        _tile_loadd(7, x1 + c * kTile, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      write(w, o, row, p, sums);
      if (both) write(w, o, row + 1, p, sums + 256);
      if (p + 1 < o.panels) {
        write(w, o, row, p + 1, sums + 512);
        if (both) write(w, o, row + 1, p + 1, sums + 768);
      }
    }
  }
}

}  // namespace amx
}  // namespace

const Kernels kAmx = {
    "amx",
    4, 0, 6, 32, 0.3f, 0.5f,
    amx::begin, amx::end,
    amx::linear_int8,
    amx::linear<amx::Float>,
    amx::quantize,
    amx::lanes::normalize,
    amx::lanes::attention,
};

}  // namespace pruneofa
#pragma GCC pop_options
#endif
