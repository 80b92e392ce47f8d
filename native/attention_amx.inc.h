// Attention on bfloat16 tiles. `Parts` says how exactly: with 1, operands are rounded to bfloat16, as dense runtimes do
// on this hardware; with 2, a float is the sum of two bfloat16, and of the four products of two such sums the three
// largest are added up, which is as exact as float32 to about 1e-5. Included by kernels_amx.cc after lanes.h.

// Two rows of 16 floats as bfloat16, interleaved: word t is (a[t], b[t]). First the values rounded to nearest, then
// what the rounding cut off.
template <int Parts>
PRUNEOFA_INLINE void split(const lanes::Floats& a, const lanes::Floats& b, int32_t* const to[2]) {
  const lanes::Ints half = lanes::all(0x8000), keep = lanes::all(-0x10000);
  const lanes::Ints a_high = lanes::bits(a) + half, b_high = lanes::bits(b) + half;
  const auto join = [](const lanes::Ints& first, const lanes::Ints& second) {
    const __m512i shifted = _mm512_maskz_srli_epi32(0xffff, reinterpret_cast<__m512i>(first), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, reinterpret_cast<__m512i>(second));
  };
  _mm512_store_si512(to[0], join(a_high, b_high));
  if (Parts == 1) return;
  const lanes::Floats a_low = a - lanes::as_floats(a_high & keep), b_low = b - lanes::as_floats(b_high & keep);
  _mm512_store_si512(to[1], join(lanes::bits(a_low) + half, lanes::bits(b_low) + half));
}

// 16 x 16 words: rows are interleaved with the row 8 further on, four times over.
PRUNEOFA_INLINE void transpose(const int32_t* from, int32_t* to) {
  __m512i rows[2][16];
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  PRUNEOFA_UNROLL
  for (int i = 0; i < 16; ++i) rows[0][i] = _mm512_load_si512(from + i * 16);
  PRUNEOFA_UNROLL
  for (int step = 0; step < 4; ++step) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < 8; ++i) {
      rows[(step + 1) % 2][2 * i] = _mm512_permutex2var_epi32(rows[step % 2][i], low, rows[step % 2][i + 8]);
      rows[(step + 1) % 2][2 * i + 1] = _mm512_permutex2var_epi32(rows[step % 2][i], high, rows[step % 2][i + 8]);
    }
  }
  PRUNEOFA_UNROLL
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 16, rows[0][i]);
}

// 32 rows of 16 floats as right operands: 16 rows of pairs, interleaved.
template <int Parts>
PRUNEOFA_INLINE void right_operand(const float* rows, int32_t* const to[2]) {
  for (int i = 0; i < 16; ++i) {
    int32_t* const place[2] = {to[0] + i * 16, to[1] + i * 16};
    split<Parts>(lanes::load(rows + 2 * i * kLanes), lanes::load(rows + (2 * i + 1) * kLanes), place);
  }
}

// The operands of one head of one sequence, in the scratch memory. Keys are counted from the first of their panel, and
// taken by the pair of panels. What the pairs of a query panel pass on goes round in slots, few enough to stay in the
// first-level cache.
constexpr int kSlots = 4;

struct Head {
  int first, panels, pairs;  // of the sequence
  int depth, outputs;        // tiles along the size of the head, as inputs (32) and as outputs (16)
  int weight_slots;          // enough for all pairs of a query panel and those that follow meanwhile
  int32_t *key[2], *value[2], *query[2], *weight[2];  // in two parts
  float* scores;             // [kSlots][32 keys][16]
};

template <int Parts>
PRUNEOFA_INLINE Head head_in(const Attention& a) {
  Head h = {};
  h.first = a.begin / kLanes;
  h.panels = (a.end - 1) / kLanes - h.first + 1;
  h.pairs = (h.panels + 1) / 2;
  h.depth = a.size / 32;
  h.outputs = a.size / 16;
  h.weight_slots = h.outputs > 4 ? h.pairs + kSlots : kSlots;
  int32_t* next = static_cast<int32_t*>(a.scratch);
  for (int i = 0; i < Parts; ++i) {
    h.key[i] = next, next += h.panels * h.depth * 256;
    h.value[i] = next, next += h.pairs * h.outputs * 256;
    h.query[i] = next, next += kSlots * h.depth * 256;
    h.weight[i] = next, next += (h.weight_slots + h.pairs) * 256;  // the latter for `attend_again`
  }
  for (int i = Parts; i < 2; ++i) {  // never written or read, but pointed into
    h.key[i] = h.key[0], h.value[i] = h.value[0], h.query[i] = h.query[0], h.weight[i] = h.weight[0];
  }
  h.scores = reinterpret_cast<float*>(next);
  return h;
}

// Left operands: keys as [16 keys][32 inputs], values as [16 outputs][32 keys].
template <int Parts>
PRUNEOFA_INLINE void load_keys(const Attention& a, const Head& h) {
  alignas(64) int32_t words[2][256];
  int32_t* const rows[2] = {words[0], words[1]};
  for (int p = 0; p < h.panels; ++p) {
    const float* key = a.key + (h.first + p) * a.stride;
    for (int d = 0; d < h.depth; ++d) {
      right_operand<Parts>(key + d * 32 * kLanes, rows);
      for (int i = 0; i < Parts; ++i) transpose(rows[i], h.key[i] + (p * h.depth + d) * 256);
    }
  }
  const auto narrow = [](const lanes::Floats& first, const lanes::Floats& second) {
    return reinterpret_cast<__m512i>(
        _mm512_maskz_cvtne2ps_pbh(~0u, reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
  };
  const auto widened = [](const __m256i& half) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, half);
    return reinterpret_cast<lanes::Floats>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
  };
  for (int p = 0; p < h.panels; p += 2) {
    const float* value = a.value + (h.first + p) * a.stride;
    for (int d = 0; d < a.size; ++d) {
      // Rows d of both panels are a tile's row: pairs of keys lie next to each other already. A missing second panel
      // must be finite; its weights are 0.
      const lanes::Floats first = lanes::load(value + d * kLanes);
      const lanes::Floats second = p + 1 < h.panels ? lanes::load(value + a.stride + d * kLanes) : lanes::all(0.0f);
      const std::ptrdiff_t place = (p / 2 * h.outputs + d / 16) * 256 + d % 16 * 16;
      const __m512i high = narrow(first, second);
      _mm512_store_si512(h.value[0] + place, high);
      if (Parts == 1) continue;
      const __m512i low = narrow(first - widened(_mm512_maskz_extracti64x4_epi64(0xff, high, 0)),
                                 second - widened(_mm512_maskz_extracti64x4_epi64(0xff, high, 1)));
      _mm512_store_si512(h.value[1] + place, low);
    }
  }
  written();
}

template <int Parts>
PRUNEOFA_INLINE void load_query(const Attention& a, const Head& h, int panel) {
  const float* query = a.query + (h.first + panel) * a.stride;
  for (int d = 0; d < h.depth; ++d) {
    const std::ptrdiff_t place = (panel % kSlots * h.depth + d) * 256;
    int32_t* const to[2] = {h.query[0] + place, h.query[1] + place};
    right_operand<Parts>(query + d * 32 * kLanes, to);
  }
  written();
}

// Tile `sum` += left * right, in parts; uses tiles 5, and 4 and 7 for the right operand.
#define PRUNEOFA_RIGHT(right, at)                     \
  _tile_loadd(4, right[0] + (at), 64);                \
  if (Parts == 2) _tile_loadd(7, right[1] + (at), 64)
#define PRUNEOFA_MULTIPLY(sum, left, at)              \
  _tile_loadd(5, left[0] + (at), 64);                 \
  _tile_dpbf16ps(sum, 5, 4);                          \
  if (Parts == 2) {                                   \
    _tile_dpbf16ps(sum, 5, 7);                        \
    _tile_loadd(5, left[1] + (at), 64);               \
    _tile_dpbf16ps(sum, 5, 4);                        \
  }

// Scores of a loaded query panel with the keys of a pair of panels; in tile 6.
template <int Parts>
PRUNEOFA_INLINE void score(const Head& h, int panel, int pair, float* scores) {
  if (Parts == 1 && pair * 2 + 1 < h.panels) {  // side by side, because a product waits for the one before it
    _tile_zero(6);
    _tile_zero(7);
    for (int d = 0; d < h.depth; ++d) {
      PRUNEOFA_RIGHT(h.query, (panel % kSlots * h.depth + d) * 256);
      PRUNEOFA_MULTIPLY(6, h.key, (pair * 2 * h.depth + d) * 256);
      PRUNEOFA_MULTIPLY(7, h.key, ((pair * 2 + 1) * h.depth + d) * 256);
    }
    _tile_stored(6, scores, 64);
    _tile_stored(7, scores + 256, 64);
    return;
  }
  for (int half = 0; half < 2 && pair * 2 + half < h.panels; ++half) {
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
PRUNEOFA_INLINE void mix(const Head& h, int o, int pair, int slot) {
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
#undef PRUNEOFA_MULTIPLY

PRUNEOFA_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// 2^x to 2e-7 relative, but for the rounding of x. Minimax on the fraction, 0 <= r < 1.
PRUNEOFA_INLINE lanes::Floats power_of_two(const lanes::Floats& x) {
  const __m512 v = reinterpret_cast<__m512>(x);
  const lanes::Floats r = reinterpret_cast<lanes::Floats>(_mm512_maskz_reduce_ps(0xffff, v, 1));  // x - floor(x)
  lanes::Floats p = r * 0.00187758f + 0.00898934f;
  p = p * r + 0.05582632f;
  p = p * r + 0.24015362f;
  p = p * r + 0.69315307f;
  p = p * r + 0.99999993f;
  return reinterpret_cast<lanes::Floats>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), v));
}

// The fraction of 2^(f / 128), in 128ths.
alignas(64) constexpr uint8_t kFraction[128] = {
    0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11,
    12, 12, 13, 14, 15, 15, 16, 17, 18, 19, 19, 20, 21, 22, 23, 23,
    24, 25, 26, 27, 28, 28, 29, 30, 31, 32, 33, 34, 34, 35, 36, 37,
    38, 39, 40, 41, 42, 43, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52,
    53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68,
    69, 70, 72, 73, 74, 75, 76, 77, 78, 79, 80, 82, 83, 84, 85, 86,
    87, 88, 90, 91, 92, 93, 94, 96, 97, 98, 99, 100, 102, 103, 104, 105,
    107, 108, 109, 111, 112, 113, 115, 116, 117, 118, 120, 121, 123, 124, 125, 127,
};

// The weights of 32 keys, before division by their total: 2^(score * base - top). In one part, a weight is found as
// bfloat16: as a fixed-point number with 7 fraction bits the exponent is one already, but for the fraction, which is
// looked up. Rounding the exponent changes a weight by at most 0.27 %, as rounding to bfloat16 does by 0.39 %. `top` is
// not always the largest: weights that are too large come out as the largest number or more.
template <int Parts, bool All>
PRUNEOFA_INLINE lanes::Floats weigh(const Attention& a, const Head& h, int pair, const float* scores, float base,
                                    const lanes::Floats& top, int slot) {
  lanes::Floats totals[2] = {lanes::all(0.0f), lanes::all(0.0f)};
  const int begin = (h.first + pair * 2) * kLanes;
  const auto mine = [&](int s) { return All || (begin + s >= a.begin && begin + s < a.end); };
  int32_t* const weight[2] = {h.weight[0] + slot * 256, h.weight[1] + slot * 256};
  if (Parts == 1) {
    constexpr float kOne = 127 * 128;  // the bits of 1 as bfloat16
    const lanes::Floats shift = lanes::all(lanes::kRound + kOne) - top * 128.0f;
    const __m512i low = _mm512_load_si512(kFraction), high = _mm512_load_si512(kFraction + 64);
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    // Of four words and four words, saturated: alternately.
    const __m512i zip = _mm512_set4_epi32(0x0f0e0706, 0x0d0c0504, 0x0b0a0302, 0x09080100);
    const __m512i largest = _mm512_set1_epi32(0x7f7f7f7f);
    PRUNEOFA_UNROLL
    for (int s = 0; s < 32; s += 2) {
      __m512i fixed[2];
      for (int i = 0; i < 2; ++i) {
        const lanes::Floats v = lanes::load(scores + (s + i) * kLanes) * (base * 128.0f) + shift;
        fixed[i] = reinterpret_cast<__m512i>(lanes::bits(v) - lanes::bits(lanes::all(lanes::kRound)));
        if (!mine(s + i)) fixed[i] = _mm512_setzero_si512();
      }
      const __m512i packed = _mm512_maskz_packus_epi32(~0u, fixed[0], fixed[1]);
      const __m512i both = _mm512_maskz_shuffle_epi8(~0ull, _mm512_maskz_min_epu16(~0u, packed, largest), zip);
      const __m512i fraction = _mm512_permutex2var_epi8(low, both, high);
      const __m512i weights = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x007f007f), fraction, both, 0xca);
      lanes::Floats& total = totals[s / 2 % 2];
      total = reinterpret_cast<lanes::Floats>(
          _mm512_dpbf16_ps(reinterpret_cast<__m512>(total), (__m512bh)weights, (__m512bh)ones));
      _mm512_store_si512(weight[0] + s / 2 * 16, weights);
    }
  } else {
    for (int s = 0; s < 32; s += 2) {
      lanes::Floats w[2];
      for (int i = 0; i < 2; ++i) {
        w[i] = mine(s + i) ? power_of_two(lanes::load(scores + (s + i) * kLanes) * base - top) : lanes::all(0.0f);
        totals[i] = totals[i] + w[i];
      }
      int32_t* const to[2] = {weight[0] + s / 2 * 16, weight[1] + s / 2 * 16};
      split<Parts>(w[0], w[1], to);
    }
  }
  written();
  return totals[0] + totals[1];
}

// The largest of each column of `rows` rows, in four chains because a comparison takes four cycles.
PRUNEOFA_INLINE lanes::Floats largest(const float* scores, int rows) {
  lanes::Floats top[4] = {lanes::load(scores), lanes::load(scores), lanes::load(scores), lanes::load(scores)};
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < 4; ++i) top[i] = lanes::larger(top[i], lanes::load(scores + (r + i) * kLanes));
  }
  for (; r < rows; ++r) top[0] = lanes::larger(top[0], lanes::load(scores + r * kLanes));
  return lanes::larger(lanes::larger(top[0], top[1]), lanes::larger(top[2], top[3]));
}

template <int Parts>
PRUNEOFA_INLINE lanes::Floats weigh(const Attention& a, const Head& h, int pair, const float* scores, float base,
                                    const lanes::Floats& top, int slot) {
  const int begin = (h.first + pair * 2) * kLanes;
  return begin >= a.begin && begin + 32 <= a.end ? weigh<Parts, true>(a, h, pair, scores, base, top, slot)
                                                 : weigh<Parts, false>(a, h, pair, scores, base, top, slot);
}

// The largest score of each query with the keys of a pair.
PRUNEOFA_INLINE lanes::Floats largest_of(const Attention& a, const Head& h, int pair, const float* scores) {
  const int begin = (h.first + pair * 2) * kLanes, from = begin < a.begin ? a.begin - begin : 0;
  const int to = begin + 32 > a.end ? a.end - begin : 32;
  return largest(scores + from * kLanes, to - from);
}

// Writes the outputs of a query panel from tiles 0 to 3; further outputs are mixed here. `slot` is that of pair 0.
template <int Parts>
PRUNEOFA_INLINE void write_outputs(const Attention& a, const Head& h, int panel, const lanes::Floats& total, int slot) {
  const lanes::Floats inverse = 1.0f / total;
  const lanes::Ints mine = lanes::inside(a, h.first + panel);
  float* out = a.query + (h.first + panel) * a.stride;
  for (int o = 0; o < h.outputs; o += 4) {
    if (o > 0) {
      clear_sums();
      for (int pair = 0; pair < h.pairs; ++pair) mix<Parts>(h, o, pair, (slot + pair) % h.weight_slots);
    }
    alignas(64) float sums[4 * 256];
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    for (int r = 0; r < 64 && o * 16 + r < a.size; ++r) {
      float* place = out + (o * 16 + r) * kLanes;
      lanes::store(place, lanes::select(mine, lanes::load(sums + r * 16) * inverse, lanes::load(place)));
    }
  }
}

// A place in the order of work: all pairs of keys for the first query panel, then for the next.
struct Step {
  int panel = 0, pair = 0, count = 0;
  void next(const Head& h) {
    ++count;
    if (++pair < h.pairs) return;
    pair = 0;
    ++panel;
  }
};

// Softmax needs the largest score only to keep its powers in range, and a float's is wide: the largest of the first
// pair does, unless a later one weighs 2^64 times as much. Then, which `total` shows, the panel is done again.
template <int Parts>
__attribute__((noinline)) void attend_again(const Attention& a, Head h, int panel, float base) {
  for (int i = 0; i < 2; ++i) h.weight[i] += h.weight_slots * 256;
  h.weight_slots = h.pairs;
  alignas(64) float scores[512] = {};
  load_query<Parts>(a, h, panel);
  lanes::Floats top = lanes::all(-3.0e38f), total = lanes::all(0.0f);
  for (int pair = 0; pair < h.pairs; ++pair) {
    score<Parts>(h, panel, pair, scores);
    written();
    top = lanes::larger(top, largest_of(a, h, pair, scores) * base);
  }
  const lanes::Floats least = (top - 200.0f) * (1.0f / base);
  clear_sums();
  for (int pair = 0; pair < h.pairs; ++pair) {
    score<Parts>(h, panel, pair, scores);
    written();
    // Weights of 2^-200 are 0; much smaller ones would leave the range of fixed-point numbers.
    for (int i = 0; i < 512; i += kLanes) lanes::store(scores + i, lanes::larger(lanes::load(scores + i), least));
    total = total + weigh<Parts>(a, h, pair, scores, base, top, pair);
    mix<Parts>(h, 0, pair, pair);
  }
  write_outputs<Parts>(a, h, panel, total, 0);
}

// The tile unit works beside the vector units: on the scores of two steps further on, and the mix of two steps before.
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
  lanes::Floats top = lanes::all(0.0f), total = lanes::all(0.0f);
  score_next();
  score_next();
  while (behind.count < steps) {
    if (now.count < steps) {
      const float* scores = h.scores + now.count % kSlots * 512;
      if (now.pair == 0) {
        top = largest_of(a, h, 0, scores) * base;
        total = lanes::all(0.0f);
      }
      total = total + weigh<Parts>(a, h, now.pair, scores, base, top, now.count % h.weight_slots);
      if (now.pair == h.pairs - 1) lanes::store(totals[now.panel % kSlots], total);
    }
    now.next(h);
    if (now.count > 2) {
      if (behind.pair == 0) clear_sums();
      mix<Parts>(h, 0, behind.pair, behind.count % h.weight_slots);
      if (behind.pair == h.pairs - 1) {
        const lanes::Floats sum = lanes::load(totals[behind.panel % kSlots]);
        const __m512 most = _mm512_set1_ps(0x1p64f);
        const bool fits = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(sum), most, _CMP_LE_OQ) == 0xffff;
        const int slot = (behind.count - behind.pair) % h.weight_slots;
        fits ? write_outputs<Parts>(a, h, behind.panel, sum, slot) : attend_again<Parts>(a, h, behind.panel, base);
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
