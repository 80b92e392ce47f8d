// Attention on bfloat16 tiles, as exact as float32 to about 1e-5: a float is the sum of two bfloat16, and of the four
// products of two such sums the three largest are added up. Included by kernels_amx.cc after lanes.h.

constexpr int kPairs = 16;  // of rows in a right operand: 32 rows, interleaved two by two

// The two bfloat16 of 16 floats each of two rows, interleaved: word t is (a[t], b[t]).
struct Split {
  __m512i high, low;
};

inline Split split(const lanes::Floats& a, const lanes::Floats& b) {
  // Round to nearest by adding half; what is cut off goes into the second part.
  const lanes::Ints half = lanes::all(0x8000), keep = lanes::all(-0x10000);
  const lanes::Ints a_high = (lanes::bits(a) + half) & keep, b_high = (lanes::bits(b) + half) & keep;
  const lanes::Floats a_low = a - lanes::as_floats(a_high), b_low = b - lanes::as_floats(b_high);
  const auto join = [&](const lanes::Ints& first, const lanes::Ints& second) {
    const __m512i shifted = _mm512_maskz_srli_epi32(0xffff, reinterpret_cast<__m512i>(first), 16);
    return _mm512_or_si512(shifted, reinterpret_cast<__m512i>(second));
  };
  return {join(a_high, b_high), join((lanes::bits(a_low) + half) & keep, (lanes::bits(b_low) + half) & keep)};
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

// 32 rows of 16 floats as right operands [pairs][16][2].
inline void right_operand(const float* rows, int32_t* high, int32_t* low) {
  for (int i = 0; i < kPairs; ++i) {
    const Split s = split(lanes::load(rows + 2 * i * kLanes), lanes::load(rows + (2 * i + 1) * kLanes));
    _mm512_store_si512(high + i * 16, s.high);
    _mm512_store_si512(low + i * 16, s.low);
  }
}

// Where the operands of a head lie in the scratch memory; keys in `panels` panels.
struct HeadTiles {
  int32_t *key[2], *value[2], *query[2], *weight[2];
  float* scores;
};

inline HeadTiles head_tiles(void* scratch, int panels, int size) {
  HeadTiles t;
  int32_t* next = static_cast<int32_t*>(scratch);
  const int doubles = (panels + 1) / 2;
  for (int i = 0; i < 2; ++i) {
    t.key[i] = next, next += panels * (size / 32) * 256;
    t.value[i] = next, next += doubles * (size / 16) * 256;
    t.query[i] = next, next += size / 32 * 256;
    t.weight[i] = next, next += doubles * 256;
  }
  t.scores = reinterpret_cast<float*>(next);
  return t;
}

// Left operands: keys as [16 keys][32 inputs], values as [16 outputs][32 keys].
inline void load_head(const Attention& a, const HeadTiles& t, int first, int panels) {
  alignas(64) int32_t high[256], low[256];
  const int depth = a.size / 32, outputs = a.size / 16;
  for (int p = 0; p < panels; ++p) {
    const float* key = a.key + (first + p) * a.stride;
    for (int d = 0; d < depth; ++d) {
      right_operand(key + d * 32 * kLanes, high, low);
      transpose(high, t.key[0] + (p * depth + d) * 256);
      transpose(low, t.key[1] + (p * depth + d) * 256);
    }
    const float* value = a.value + (first + p) * a.stride;
    for (int d = 0; d < a.size; ++d) {
      // Row d of this panel is half of a tile's row: pairs of keys lie next to each other already.
      const lanes::Floats v = lanes::load(value + d * kLanes);
      const lanes::Ints half = lanes::all(0x8000), keep = lanes::all(-0x10000);
      const lanes::Ints v_high = (lanes::bits(v) + half) & keep;
      const lanes::Ints v_low = lanes::bits(v - lanes::as_floats(v_high)) + half;
      const std::ptrdiff_t place = (p / 2 * outputs + d / 16) * 256 + d % 16 * 16 + p % 2 * 8;
      const auto narrow = [](const lanes::Ints& x) {
        return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_maskz_srli_epi32(0xffff, reinterpret_cast<__m512i>(x), 16));
      };
      _mm256_store_si256(reinterpret_cast<__m256i*>(t.value[0] + place), narrow(v_high));
      _mm256_store_si256(reinterpret_cast<__m256i*>(t.value[1] + place), narrow(v_low));
    }
  }
  if (panels % 2) {  // the missing half must be finite; its weights are 0
    for (int d = 0; d < a.size; ++d) {
      const std::ptrdiff_t place = (panels / 2 * outputs + d / 16) * 256 + d % 16 * 16 + 8;
      for (int i = 0; i < 2; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(t.value[i] + place), _mm256_setzero_si256());
    }
  }
}

// Four tiles of sums at a time: tile i = left operand at left + i * step, times the right operand.
template <int Count>
inline void multiply(int32_t* const left[2], std::ptrdiff_t l, std::ptrdiff_t step, int32_t* const right[2],
                     std::ptrdiff_t r) {
  _tile_loadd(4, right[0] + r, 64);
  _tile_loadd(5, right[1] + r, 64);
#define PRUNEOFA_TILE(i)                        \
  if (Count > i) {                              \
    _tile_loadd(6, left[0] + l + i * step, 64); \
    _tile_dpbf16ps(i, 6, 4);                    \
    _tile_dpbf16ps(i, 6, 5);                    \
    _tile_loadd(7, left[1] + l + i * step, 64); \
    _tile_dpbf16ps(i, 7, 4);                    \
  }
  PRUNEOFA_TILE(0)
  PRUNEOFA_TILE(1)
  PRUNEOFA_TILE(2)
  PRUNEOFA_TILE(3)
#undef PRUNEOFA_TILE
}

// The same over `depth` steps along the summed axis, from zero, stored as Count x [16][16] floats.
template <int Count>
inline void product(int32_t* const left[2], std::ptrdiff_t l, std::ptrdiff_t step, std::ptrdiff_t next,
                    int32_t* const right[2], int depth, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int d = 0; d < depth; ++d) multiply<Count>(left, l + d * next, step, right, d * 256);
  if (Count > 0) _tile_stored(0, sums, 64);
  if (Count > 1) _tile_stored(1, sums + 256, 64);
  if (Count > 2) _tile_stored(2, sums + 512, 64);
  if (Count > 3) _tile_stored(3, sums + 768, 64);
}

inline void product(int count, int32_t* const left[2], std::ptrdiff_t l, std::ptrdiff_t step, std::ptrdiff_t next,
                    int32_t* const right[2], int depth, float* sums) {
  if (count >= 4) return product<4>(left, l, step, next, right, depth, sums);
  if (count == 3) return product<3>(left, l, step, next, right, depth, sums);
  if (count == 2) return product<2>(left, l, step, next, right, depth, sums);
  return product<1>(left, l, step, next, right, depth, sums);
}

void attention(const Attention& a) {
  if (a.size % 32 != 0) return lanes::attention(a);
  const int first = a.begin / kLanes, last = (a.end - 1) / kLanes, panels = last - first + 1;
  const int depth = a.size / 32, outputs = a.size / 16, doubles = (panels + 1) / 2;
  const HeadTiles t = head_tiles(a.scratch, panels, a.size);
  load_head(a, t, first, panels);
  for (int panel = first; panel <= last; ++panel) {
    const float* query = a.query + panel * a.stride;
    for (int d = 0; d < depth; ++d) {
      right_operand(query + d * 32 * kLanes, t.query[0] + d * 256, t.query[1] + d * 256);
    }
    for (int p = 0; p < panels; p += 4) {
      product(panels - p, t.key, p * depth * 256, depth * 256, 256, t.query, depth, t.scores + p * 256);
    }
    lanes::Floats top = lanes::all(-3.0e38f);
    for (int token = a.begin; token < a.end; ++token) {
      top = lanes::larger(top, lanes::load(t.scores + (token - first * kLanes) * kLanes));
    }
    lanes::Floats total = lanes::all(0.0f);
    const float base = a.scale * 1.44269504f;
    for (int s = 0; s < doubles * 32; s += 2) {
      lanes::Floats weight[2];
      for (int i = 0; i < 2; ++i) {
        const int token = first * kLanes + s + i;
        const bool mine = token >= a.begin && token < a.end;
        weight[i] = lanes::all(0.0f);
        if (mine) weight[i] = lanes::power_of_two((lanes::load(t.scores + (s + i) * kLanes) - top) * base);
        total = total + weight[i];
      }
      const Split both = split(weight[0], weight[1]);
      _mm512_store_si512(t.weight[0] + s / 2 * 16, both.high);
      _mm512_store_si512(t.weight[1] + s / 2 * 16, both.low);
    }
    const lanes::Floats inverse = 1.0f / total;
    const lanes::Ints mine = lanes::inside(a, panel);
    float* out = a.out + panel * a.out_stride;
    for (int d = 0; d < outputs; d += 4) {
      alignas(64) float sums[4 * 256];
      const int count = outputs - d < 4 ? outputs - d : 4;
      product(count, t.value, d * 256, 256, outputs * 256, t.weight, doubles, sums);
      for (int r = 0; r < count * 16; ++r) {
        float* place = out + (d * 16 + r) * kLanes;
        lanes::store(place, lanes::select(mine, lanes::load(sums + r * 16) * inverse, lanes::load(place)));
      }
    }
  }
}
