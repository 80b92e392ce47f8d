// Attention on bfloat16 tiles. `Parts` says how exactly: with 1, operands are rounded to bfloat16, as dense runtimes do
// on this hardware; with 2, a float is the sum of two bfloat16, and of the four products of two such sums the three
// largest are added up, which is as exact as float32 to about 1e-5. Included by amx.cc.

#include "x86/amx_operands.inc.h"
#include "x86/amx_softmax.inc.h"

// Tile `sum` += left * right, in parts; uses tiles 5, and 4 and 7 for the right operand.
#define PRUNEOFA_RIGHT(right, at)                     \
  _tile_loadd(4, right[0] + (at), 64);                \
  if (Parts == 2) _tile_loadd(7, right[1] + (at), 64)
#define PRUNEOFA_MULTIPLY_HIGH(sum, left, at)         \
  _tile_loadd(5, left[0] + (at), 64);                 \
  _tile_dpbf16ps(sum, 5, 4)
#define PRUNEOFA_MULTIPLY(sum, left, at)              \
  PRUNEOFA_MULTIPLY_HIGH(sum, left, at);              \
  if (Parts == 2) {                                   \
    _tile_dpbf16ps(sum, 5, 7);                        \
    _tile_loadd(5, left[1] + (at), 64);               \
    _tile_dpbf16ps(sum, 5, 4);                        \
  }

// Scores of a loaded query panel with the keys of a pair of panels; in tile 6.
template <int Parts>
PRUNEOFA_INLINE void score(const Head& h, int panel, int pair, float* scores) {
  if (Parts == 1 && pair * 2 + 1 < h.keys) {  // side by side, because a product waits for the one before it
    _tile_zero(6);
    _tile_zero(7);
    for (int d = 0; d < h.depth; ++d) {
      PRUNEOFA_RIGHT(h.query, (panel % kSlots * h.depth + d) * 256);
      PRUNEOFA_MULTIPLY_HIGH(6, h.key, (pair * 2 * h.depth + d) * 256);
      PRUNEOFA_MULTIPLY_HIGH(7, h.key, ((pair * 2 + 1) * h.depth + d) * 256);
    }
    _tile_stored(6, scores, 64);
    _tile_stored(7, scores + 256, 64);
    return;
  }
  for (int half = 0; half < 2 && pair * 2 + half < h.keys; ++half) {
    _tile_zero(6);
    for (int d = 0; d < h.depth; ++d) {
      PRUNEOFA_RIGHT(h.query, (panel % kSlots * h.depth + d) * 256);
      PRUNEOFA_MULTIPLY(6, h.key, ((pair * 2 + half) * h.depth + d) * 256);
    }
    _tile_stored(6, scores + half * 256, 64);
  }
}

// Outputs o .. o + 3 (tiles of 16) += values * weights of the 32 keys of a pair of panels; in tiles 0 to 3.
template <int Parts>
PRUNEOFA_INLINE void add_values(const Head& h, int o, int pair, int slot) {
  const std::ptrdiff_t at = (pair * h.outputs + o) * 256;
  PRUNEOFA_RIGHT(h.weight, slot * 256);
  PRUNEOFA_MULTIPLY(0, h.value, at);
  if (o + 1 < h.outputs) {
    PRUNEOFA_MULTIPLY(1, h.value, at + 256);
  }
  if (o + 2 < h.outputs) {
    PRUNEOFA_MULTIPLY(2, h.value, at + 512);
  }
  if (o + 3 < h.outputs) {
    PRUNEOFA_MULTIPLY(3, h.value, at + 768);
  }
}
#undef PRUNEOFA_RIGHT
#undef PRUNEOFA_MULTIPLY_HIGH
#undef PRUNEOFA_MULTIPLY

// Adds the bias to the scores of a query panel with the keys of a pair, which are multiplied by `a.scale` only later.
PRUNEOFA_INLINE void add_bias(const Attention& a, const Head& h, int panel, int pair, float* scores) {
  if (a.bias == nullptr) return;
  const float inverse = 1.0f / a.scale;
  const float* bias = a.bias + ((h.first + panel) * kLanes - a.begin - pair * 32);
  const int rest = h.length - pair * 32, keys = rest < 32 ? rest : 32;
  for (int s = 0; s < keys; ++s) {
    lanes::store(scores + s * kLanes, lanes::load(scores + s * kLanes) + lanes::load_unaligned(bias - s) * inverse);
  }
  compiler_barrier();
}

PRUNEOFA_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The queries of a panel that belong to the sequence.
PRUNEOFA_INLINE __mmask16 queries_of(const Attention& a, const Head& h, int panel) {
  const int from = a.begin - (h.first + panel) * kLanes, to = a.end - (h.first + panel) * kLanes;
  const unsigned before = from > 0 ? (1u << from) - 1 : 0, through = to < kLanes ? (1u << to) - 1 : 0xffff;
  return static_cast<__mmask16>(through & ~before);
}

// Writes the outputs of some queries of a panel from tiles 0 to 3; further outputs are mixed here. `slot` is that of
// pair 0.
template <int Parts>
PRUNEOFA_INLINE void write_outputs(const Attention& a, const Head& h, int panel, __mmask16 queries,
                                   const lanes::Floats& total, int slot) {
  const lanes::Floats inverse = 1.0f / total;
  float* out = a.query + (h.first + panel) * a.stride;
  for (int o = 0; o < h.outputs; o += 4) {
    if (o > 0) {
      clear_sums();
      for (int pair = 0; pair < h.pairs; ++pair) add_values<Parts>(h, o, pair, (slot + pair) % h.weight_slots);
    }
    alignas(64) float sums[4 * 256];
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    for (int r = 0; r < 64 && o * 16 + r < a.size; ++r) {
      float* place = out + (o * 16 + r) * kLanes;
      _mm512_mask_store_ps(place, queries, reinterpret_cast<__m512>(lanes::load(sums + r * 16) * inverse));
    }
  }
}

// A position in the loop over query panels and, inside it, pairs of key panels.
struct Step {
  int panel = 0, pair = 0, count = 0;
  void next(const Head& h) {
    ++count;
    if (++pair < h.pairs) return;
    pair = 0;
    ++panel;
  }
};

// Softmax subtracts the largest score only to keep powers in the range of a float. The largest of the first pair does
// that too, unless a later weight is 2^64 times as large. `total` shows that case, and those queries are computed again
// here.
template <int Parts>
__attribute__((noinline)) void recompute(const Attention& a, Head h, int panel, __mmask16 queries, float base) {
  for (int i = 0; i < 2; ++i) h.weight[i] += h.weight_slots * 256;
  h.weight_slots = h.pairs;
  alignas(64) float scores[512] = {};
  load_query<Parts>(a, h, panel);
  lanes::Floats top = lanes::broadcast(-3.0e38f), total = lanes::broadcast(0.0f);
  for (int pair = 0; pair < h.pairs; ++pair) {
    score<Parts>(h, panel, pair, scores);
    compiler_barrier();
    add_bias(a, h, panel, pair, scores);
    top = lanes::maximum(top, largest_of_pair(h, pair, scores) * base);
  }
  const lanes::Floats least = (top - 200.0f) * (1.0f / base);
  clear_sums();
  for (int pair = 0; pair < h.pairs; ++pair) {
    score<Parts>(h, panel, pair, scores);
    compiler_barrier();
    add_bias(a, h, panel, pair, scores);
    // Weights of 2^-200 are 0; much smaller ones would leave the range of fixed-point numbers.
    for (int i = 0; i < 512; i += kLanes) lanes::store(scores + i, lanes::maximum(lanes::load(scores + i), least));
    total = total + softmax_weights<Parts>(h, pair, scores, base, top, pair);
    add_values<Parts>(h, 0, pair, pair);
  }
  write_outputs<Parts>(a, h, panel, queries, total, 0);
}

// A software pipeline, so that the tile unit and the vector units work at the same time: while the softmax weights of
// one step are computed, tiles compute the scores of two steps later and add the values of two steps before.
template <int Parts>
void tile_attention(const Attention& a) {
  const Head h = head_in<Parts>(a);
  const float base = a.scale * 1.44269504f;
  const int steps = h.panels * h.pairs;
  load_keys<Parts>(a, h);
  Step ahead, now, behind;
  const auto score_next = [&]() __attribute__((always_inline)) {
    if (ahead.count == steps) return;
    if (ahead.pair == 0) load_query<Parts>(a, h, ahead.panel);
    score<Parts>(h, ahead.panel, ahead.pair, h.scores + ahead.count % kSlots * 512);
    ahead.next(h);
  };
  alignas(64) float totals[kSlots][kLanes];
  lanes::Floats top = lanes::broadcast(0.0f), total = lanes::broadcast(0.0f);
  score_next();
  score_next();
  while (behind.count < steps) {
    if (now.count < steps) {
      float* scores = h.scores + now.count % kSlots * 512;
      add_bias(a, h, now.panel, now.pair, scores);
      if (now.pair == 0) {
        top = largest_of_pair(h, 0, scores) * base;
        total = lanes::broadcast(0.0f);
      }
      total = total + softmax_weights<Parts>(h, now.pair, scores, base, top, now.count % h.weight_slots);
      if (now.pair == h.pairs - 1) lanes::store(totals[now.panel % kSlots], total);
    }
    now.next(h);
    if (now.count > 2) {
      if (behind.pair == 0) clear_sums();
      add_values<Parts>(h, 0, behind.pair, behind.count % h.weight_slots);
      if (behind.pair == h.pairs - 1) {
        const lanes::Floats sum = lanes::load(totals[behind.panel % kSlots]);
        const __m512 most = _mm512_set1_ps(0x1p64f);
        const __mmask16 fits = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(sum), most, _CMP_LE_OQ);
        const __mmask16 queries = queries_of(a, h, behind.panel), again = queries & ~fits;
        const int slot = (behind.count - behind.pair) % h.weight_slots;
        write_outputs<Parts>(a, h, behind.panel, queries & fits, sum, slot);
        if (again != 0) recompute<Parts>(a, h, behind.panel, again, base);
      }
      behind.next(h);
    }
    score_next();
  }
}

void attention(const Attention& a) {
  if (a.size % 32 != 0 || a.rounding == Rounding::kNone) return lanes::attention(a);
  if (a.rounding == Rounding::kTwoBfloat16) return tile_attention<2>(a);
  tile_attention<1>(a);
}
