// Attention on bfloat16 tiles. `Parts` says how exactly: with 1, operands are rounded to bfloat16, as dense runtimes do
// on this hardware; with 2, a float is the sum of two bfloat16, and of the four products of two such sums the three
// largest are added up, which is as exact as float32 to about 1e-5. Included by kernels_amx.cc after lanes.h.

// Two rows of 16 floats as bfloat16, interleaved: word t is (a[t], b[t]). First the values rounded to nearest, then
// what the rounding cut off.
template <int Parts>
inline void split(const lanes::Floats& a, const lanes::Floats& b, int32_t* const to[2]) {
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
inline void transpose(const int32_t* from, int32_t* to) {
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
inline void right_operand(const float* rows, int32_t* const to[2]) {
  for (int i = 0; i < 16; ++i) {
    int32_t* const place[2] = {to[0] + i * 16, to[1] + i * 16};
    split<Parts>(lanes::load(rows + 2 * i * kLanes), lanes::load(rows + (2 * i + 1) * kLanes), place);
  }
}

// The operands of one head of one sequence, in the scratch memory. Keys are counted from the first of their panel.
struct Head {
  int first, panels;         // of the sequence
  int depth, outputs;        // tiles along the size of the head, as inputs (32) and as outputs (16)
  int32_t *key[2], *value[2], *query[2], *weight[2];  // in two parts
  float* scores[2];          // of a query panel, [keys][16]; one is read while the next is written
};

template <int Parts>
inline Head head_in(const Attention& a) {
  Head h = {};
  h.first = a.begin / kLanes;
  h.panels = (a.end - 1) / kLanes - h.first + 1;
  h.depth = a.size / 32;
  h.outputs = a.size / 16;
  const int doubles = (h.panels + 1) / 2;
  int32_t* next = static_cast<int32_t*>(a.scratch);
  for (int i = 0; i < Parts; ++i) {
    h.key[i] = next, next += h.panels * h.depth * 256;
    h.value[i] = next, next += doubles * h.outputs * 256;
    h.query[i] = next, next += h.depth * 256;
    h.weight[i] = next, next += doubles * 256;
  }
  for (int i = Parts; i < 2; ++i) {  // never written or read, but pointed into
    h.key[i] = h.key[0], h.value[i] = h.value[0], h.query[i] = h.query[0], h.weight[i] = h.weight[0];
  }
  for (int i = 0; i < 2; ++i) h.scores[i] = reinterpret_cast<float*>(next), next += doubles * 512;
  return h;
}

// Left operands: keys as [16 keys][32 inputs], values as [16 outputs][32 keys].
template <int Parts>
inline void load_keys(const Attention& a, const Head& h) {
  alignas(64) int32_t words[2][256];
  int32_t* const rows[2] = {words[0], words[1]};
  for (int p = 0; p < h.panels; ++p) {
    const float* key = a.key + (h.first + p) * a.stride;
    for (int d = 0; d < h.depth; ++d) {
      right_operand<Parts>(key + d * 32 * kLanes, rows);
      for (int i = 0; i < Parts; ++i) transpose(rows[i], h.key[i] + (p * h.depth + d) * 256);
    }
    const float* value = a.value + (h.first + p) * a.stride;
    const lanes::Ints half = lanes::all(0x8000), keep = lanes::all(-0x10000);
    const auto narrow = [](const lanes::Ints& x) {
      return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, reinterpret_cast<__m512i>(x), 16));
    };
    for (int d = 0; d < a.size; ++d) {
      // Row d of this panel is half of a tile's row: pairs of keys lie next to each other already.
      const lanes::Floats v = lanes::load(value + d * kLanes);
      const lanes::Ints high = lanes::bits(v) + half;
      const std::ptrdiff_t place = (p / 2 * h.outputs + d / 16) * 256 + d % 16 * 16 + p % 2 * 8;
      _mm256_store_si256(reinterpret_cast<__m256i*>(h.value[0] + place), narrow(high));
      if (Parts == 1) continue;
      const lanes::Ints low = lanes::bits(v - lanes::as_floats(high & keep)) + half;
      _mm256_store_si256(reinterpret_cast<__m256i*>(h.value[1] + place), narrow(low));
    }
  }
  for (int d = 0; h.panels % 2 && d < a.size; ++d) {  // the missing half must be finite; its weights are 0
    const std::ptrdiff_t place = (h.panels / 2 * h.outputs + d / 16) * 256 + d % 16 * 16 + 8;
    for (int i = 0; i < Parts; ++i) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(h.value[i] + place), _mm256_setzero_si256());
    }
  }
  written();
}

template <int Parts>
inline void load_query(const Attention& a, const Head& h, int panel) {
  const float* query = a.query + panel * a.stride;
  for (int d = 0; d < h.depth; ++d) {
    int32_t* const to[2] = {h.query[0] + d * 256, h.query[1] + d * 256};
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

// Scores of the loaded query panel with the keys of a panel; in tile 6.
template <int Parts>
inline void score(const Head& h, int panel, float* scores) {
  _tile_zero(6);
  for (int d = 0; d < h.depth; ++d) {
    PRUNEOFA_RIGHT(h.query, d * 256);
    PRUNEOFA_MULTIPLY(6, h.key, (panel * h.depth + d) * 256);
  }
  _tile_stored(6, scores + panel * 256, 64);
}

// Outputs o .. o + 3 (tiles of 16) += values * weights of the 32 keys of a pair of panels; in tiles 0 to 3.
template <int Parts>
inline void mix(const Head& h, int o, int pair) {
  const std::ptrdiff_t at = (pair * h.outputs + o) * 256;
  PRUNEOFA_RIGHT(h.weight, pair * 256);
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

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// 2^x for x <= 0, to 2e-7 relative, or 8e-5 where bfloat16 follows. Minimax on the fraction, 0 <= r < 1.
template <int Parts>
inline lanes::Floats weight_of(const lanes::Floats& x) {
  const __m512 v = reinterpret_cast<__m512>(x);
  const lanes::Floats r = reinterpret_cast<lanes::Floats>(_mm512_maskz_reduce_ps(0xffff, v, 1));  // x - floor(x)
  lanes::Floats p;
  if (Parts == 1) {
    p = r * 0.07802452f + 0.22606716f;
    p = p * r + 0.69583354f;
    p = p * r + 0.99992522f;
  } else {
    p = r * 0.00187758f + 0.00898934f;
    p = p * r + 0.05582632f;
    p = p * r + 0.24015362f;
    p = p * r + 0.69315307f;
    p = p * r + 0.99999993f;
  }
  return reinterpret_cast<lanes::Floats>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), v));
}

// The weights of 32 keys, before division by their total.
template <int Parts, bool All>
inline lanes::Floats weigh(const Attention& a, const Head& h, int pair, const float* scores, float base,
                           const lanes::Floats& top) {
  lanes::Floats total = lanes::all(0.0f);
  for (int s = pair * 32; s < pair * 32 + 32; s += 2) {
    lanes::Floats weight[2];
    for (int i = 0; i < 2; ++i) {
      const int token = h.first * kLanes + s + i;
      weight[i] = lanes::all(0.0f);
      if (All || (token >= a.begin && token < a.end)) {
        weight[i] = weight_of<Parts>(lanes::load(scores + (s + i) * kLanes) * base - top);
      }
      total = total + weight[i];
    }
    int32_t* const to[2] = {h.weight[0] + s / 2 * 16, h.weight[1] + s / 2 * 16};
    split<Parts>(weight[0], weight[1], to);
  }
  written();
  return total;
}

template <int Parts>
void tile_attention(const Attention& a) {
  const Head h = head_in<Parts>(a);
  const int pairs = (h.panels + 1) / 2, last = h.first + h.panels - 1;
  const float base = a.scale * 1.44269504f;
  load_keys<Parts>(a, h);
  load_query<Parts>(a, h, h.first);
  for (int p = 0; p < h.panels; ++p) score<Parts>(h, p, h.scores[0]);
  for (int panel = h.first; panel <= last; ++panel) {
    const float* scores = h.scores[(panel - h.first) % 2];
    float* next = h.scores[(panel - h.first + 1) % 2];
    lanes::Floats top = lanes::all(-3.0e38f);
    for (int token = a.begin; token < a.end; ++token) {
      top = lanes::larger(top, lanes::load(scores + (token - h.first * kLanes) * kLanes));
    }
    top = top * base;
    if (panel < last) load_query<Parts>(a, h, panel + 1);
    // The tile unit works beside the vector units: on the mix of the pair of panels before and on the scores of the
    // next query panel.
    lanes::Floats total = lanes::all(0.0f);
    clear_sums();
    for (int pair = 0; pair < pairs; ++pair) {
      const int begin = (h.first + pair * 2) * kLanes;
      total = total + (begin >= a.begin && begin + 32 <= a.end ? weigh<Parts, true>(a, h, pair, scores, base, top)
                                                               : weigh<Parts, false>(a, h, pair, scores, base, top));
      if (pair > 0) mix<Parts>(h, 0, pair - 1);
      if (panel == last) continue;
      score<Parts>(h, pair * 2, next);
      if (pair * 2 + 1 < h.panels) score<Parts>(h, pair * 2 + 1, next);
    }
    mix<Parts>(h, 0, pairs - 1);
    const lanes::Floats inverse = 1.0f / total;
    const lanes::Ints mine = lanes::inside(a, panel);
    float* out = a.query + panel * a.stride;
    for (int o = 0; o < h.outputs; o += 4) {
      if (o > 0) {
        clear_sums();
        for (int pair = 0; pair < pairs; ++pair) mix<Parts>(h, o, pair);
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
}

void attention(const Attention& a) {
  if (a.size % 32 != 0) return lanes::attention(a);
  if (a.exact) return tile_attention<2>(a);
  tile_attention<1>(a);
}
