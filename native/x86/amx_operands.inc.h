// Operands of attention on AMX: queries, keys and values as tiles of bfloat16. Included by amx_attention.inc.h.

// Two rows of 16 floats as bfloat16, interleaved: word t is (a[t], b[t]). First the values rounded to nearest, then
// what the rounding cut off.
template <int Parts>
PRUNEOFA_INLINE void split(const lanes::Floats& a, const lanes::Floats& b, int32_t* const to[2]) {
  const lanes::Ints half = lanes::broadcast(0x8000), keep = lanes::broadcast(-0x10000);
  const lanes::Ints a_high = lanes::as_ints(a) + half, b_high = lanes::as_ints(b) + half;
  const auto join = [](const lanes::Ints& first, const lanes::Ints& second) {
    const __m512i shifted = _mm512_maskz_srli_epi32(0xffff, reinterpret_cast<__m512i>(first), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, reinterpret_cast<__m512i>(second));
  };
  _mm512_store_si512(to[0], join(a_high, b_high));
  if (Parts == 1) return;
  const lanes::Floats a_low = a - lanes::as_floats(a_high & keep), b_low = b - lanes::as_floats(b_high & keep);
  _mm512_store_si512(to[1], join(lanes::as_ints(a_low) + half, lanes::as_ints(b_low) + half));
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

// 32 rows of 16 floats, row(0) .. row(31), as right operands: 16 rows of pairs, interleaved.
template <int Parts, class Row>
PRUNEOFA_INLINE void right_operand(const Row& row, int32_t* const to[2]) {
  for (int i = 0; i < 16; ++i) {
    int32_t* const place[2] = {to[0] + i * 16, to[1] + i * 16};
    split<Parts>(row(2 * i), row(2 * i + 1), place);
  }
}

// The operands of one head of one sequence, in the scratch memory. Keys and values are moved to panels of their own that
// begin with the sequence's first token, and are processed in pairs of such panels: tiles add up keys two by two, and
// softmax starts from the first 32, so that a result would otherwise depend on where in its panel a sequence begins.
// Queries stay in their panels, since lanes do not mix. Scores and weights of the pairs use a ring of slots, few enough
// to stay in the first-level cache.
constexpr int kSlots = 4;

struct Head {
  int first, panels;  // of queries
  int length, keys, pairs;  // tokens, panels of keys, and pairs of these
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
  h.length = a.end - a.begin;
  h.keys = (h.length + kLanes - 1) / kLanes;
  h.pairs = (h.keys + 1) / 2;
  h.depth = a.size / 32;
  h.outputs = a.size / 16;
  h.weight_slots = h.outputs > 4 ? h.pairs + kSlots : kSlots;
  int32_t* next = static_cast<int32_t*>(a.scratch);
  for (int i = 0; i < Parts; ++i) {
    h.key[i] = next, next += h.keys * h.depth * 256;
    h.value[i] = next, next += h.pairs * h.outputs * 256;
    h.query[i] = next, next += kSlots * h.depth * 256;
    h.weight[i] = next, next += (h.weight_slots + h.pairs) * 256;  // the latter for `recompute`
  }
  for (int i = Parts; i < 2; ++i) {  // never written or read, but pointed into
    h.key[i] = h.key[0], h.value[i] = h.value[0], h.query[i] = h.query[0], h.weight[i] = h.weight[0];
  }
  h.scores = reinterpret_cast<float*>(next);
  return h;
}

// Lanes of a panel of keys or values, counted from the sequence's first token; `row` is that of the float activations in
// the panel where they begin. Lanes past the sequence's end are 0: they have no weight, but an infinite value of another
// sequence would be NaN times 0.
struct KeyLanes {
  std::ptrdiff_t next;  // from a row to that of the panel where the lanes end
  int shift;
  __mmask16 inside;
  __m512i order;

  PRUNEOFA_INLINE lanes::Floats load(const float* row) const {
    if (shift == 0) return reinterpret_cast<lanes::Floats>(_mm512_maskz_load_ps(inside, row));
    return reinterpret_cast<lanes::Floats>(
        _mm512_maskz_permutex2var_ps(inside, _mm512_load_ps(row), order, _mm512_load_ps(row + next)));
  }
};

PRUNEOFA_INLINE KeyLanes key_lanes(const Attention& a, const Head& h, int p) {
  alignas(64) int32_t order[kLanes];
  const int shift = a.begin % kLanes;
  for (int i = 0; i < kLanes; ++i) order[i] = shift + i;
  const int rest = h.length - p * kLanes;
  const unsigned inside = rest >= kLanes ? 0xffff : rest > 0 ? (1u << rest) - 1 : 0;
  return {p + 1 < h.panels ? a.stride : 0, shift, static_cast<__mmask16>(inside), _mm512_load_si512(order)};
}

// Left operands: keys as [16 keys][32 inputs], values as [16 outputs][32 keys].
template <int Parts>
PRUNEOFA_INLINE void load_keys(const Attention& a, const Head& h) {
  alignas(64) int32_t words[2][256];
  int32_t* const rows[2] = {words[0], words[1]};
  for (int p = 0; p < h.keys; ++p) {
    const KeyLanes of_keys = key_lanes(a, h, p);
    const float* key = a.key + (h.first + p) * a.stride;
    for (int d = 0; d < h.depth; ++d) {
      right_operand<Parts>([&](int i) { return of_keys.load(key + (d * 32 + i) * kLanes); }, rows);
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
  for (int p = 0; p < h.keys; p += 2) {
    const KeyLanes of_first = key_lanes(a, h, p), of_second = key_lanes(a, h, p + 1);
    const float* value = a.value + (h.first + p) * a.stride;
    for (int d = 0; d < a.size; ++d) {
      // Rows d of both panels are a tile's row: pairs of keys lie next to each other already. A missing second panel
      // must be finite; its weights are 0.
      const lanes::Floats first = of_first.load(value + d * kLanes);
      const lanes::Floats second =
          p + 1 < h.keys ? of_second.load(value + a.stride + d * kLanes) : lanes::broadcast(0.0f);
      const std::ptrdiff_t place = (p / 2 * h.outputs + d / 16) * 256 + d % 16 * 16;
      const __m512i high = narrow(first, second);
      _mm512_store_si512(h.value[0] + place, high);
      if (Parts == 1) continue;
      const __m512i low = narrow(first - widened(_mm512_maskz_extracti64x4_epi64(0xff, high, 0)),
                                 second - widened(_mm512_maskz_extracti64x4_epi64(0xff, high, 1)));
      _mm512_store_si512(h.value[1] + place, low);
    }
  }
  compiler_barrier();
}

template <int Parts>
PRUNEOFA_INLINE void load_query(const Attention& a, const Head& h, int panel) {
  const float* query = a.query + (h.first + panel) * a.stride;
  for (int d = 0; d < h.depth; ++d) {
    const std::ptrdiff_t place = (panel % kSlots * h.depth + d) * 256;
    int32_t* const to[2] = {h.query[0] + place, h.query[1] + place};
    right_operand<Parts>([&](int i) { return lanes::load(query + (d * 32 + i) * kLanes); }, to);
  }
  compiler_barrier();
}
