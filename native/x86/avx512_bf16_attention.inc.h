// Attention with operands rounded to bfloat16, as dense runtimes do on this hardware: VDPBF16PS multiplies two pairs
// per 32-bit lane and adds both products to a float. Included by avx512bf16.cc.

// Mask of all lanes: for the intrinsics without a mask GCC warns of undefined values.
constexpr __mmask32 kPairs = 0xffffffff;

// Words (a[t], b[t]): two rows of 16 floats, rounded and interleaved.
static inline void store_pairs(const lanes::Floats& a, const lanes::Floats& b, void* to) {
  alignas(64) static constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh rounded = _mm512_maskz_cvtne2ps_pbh(kPairs, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
  _mm512_store_si512(to, _mm512_maskz_permutexvar_epi16(kPairs, _mm512_load_si512(kInterleave),
                                                            reinterpret_cast<__m512i>(rounded)));
}

constexpr int32_t kOnes = 0x3f803f80;

// Sum of a lane + the products of its pair with that of the word.
static inline lanes::Floats add_pair(const lanes::Floats& sum, const void* pairs, int32_t word) {
  return reinterpret_cast<lanes::Floats>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_load_si512(pairs)),
                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(word))));
}

// 16 sums += pairs, a word per lane, times 16 words, one for each sum.
static inline void add_pairs(lanes::Floats (&sum)[16], const void* pairs, const char* words, std::ptrdiff_t stride) {
  PRUNEOFA_UNROLL
  for (int i = 0; i < 16; ++i) {
    int32_t word;
    __builtin_memcpy(&word, words + i * stride, sizeof word);
    sum[i] = add_pair(sum[i], pairs, word);
  }
}

// Keys and values of one head of one sequence in the scratch memory, and room for a panel of queries.
struct Rounded {
  int first, last;             // panels that hold the sequence
  int length, pairs;           // of tokens
  int depth;                   // pairs of features of a head
  std::ptrdiff_t value_bytes;  // from one feature of the values to the next
  char* keys;     // [panels][depth][16] pairs of features
  char* values;   // [size][length], bfloat16: a word is a pair of tokens, counted from the sequence's first
  char* query;    // [depth][16] pairs of features
  char* weights;  // [pairs][16] pairs of tokens
  float* scores;  // [panels][16 keys][16]
};

static inline void store_features(const float* x, int size, char* to) {
  for (int d = 0; d < size; d += 2) {
    store_pairs(lanes::load(x + d * kLanes), lanes::load(x + (d + 1) * kLanes), to + d / 2 * 64);
  }
}

static inline Rounded round_operands(const Attention& a) {
  Rounded r = {};
  r.first = a.begin / kLanes;
  r.last = (a.end - 1) / kLanes;
  r.length = a.end - a.begin;
  r.pairs = (r.length + 1) / 2;
  r.depth = a.size / 2;
  // A panel's tokens before and after the sequence are stored with it: 16 of each fit. An odd number of cache lines
  // lets sixteen features be read at once without meeting in the same sets.
  r.value_bytes = (std::ptrdiff_t{r.length} * 2 + 2 * 32 + 63) / 64 * 64 | 64;
  const int panels = r.last - r.first + 1;
  char* next = static_cast<char*>(a.scratch);
  r.keys = next, next += std::ptrdiff_t{panels} * r.depth * 64;
  r.query = next, next += r.depth * 64;
  r.weights = next, next += std::ptrdiff_t{r.pairs} * 64;
  r.scores = reinterpret_cast<float*>(next), next += std::ptrdiff_t{panels} * kLanes * 64;
  r.values = next + 32;
  for (int p = 0; p < panels; ++p) {
    store_features(a.key + (r.first + p) * a.stride, a.size, r.keys + std::ptrdiff_t{p} * r.depth * 64);
  }
  for (int d = 0; d < a.size; ++d) {
    char* to = r.values + d * r.value_bytes;
    for (int p = r.first; p <= r.last; ++p) {
      const __m512 v = _mm512_load_ps(a.value + p * a.stride + d * kLanes);
      const __m512bh rounded = _mm512_maskz_cvtne2ps_pbh(kPairs, v, v);
      __builtin_memcpy(to + (std::ptrdiff_t{p} * kLanes - a.begin) * 2, &rounded, 32);
    }
    // The second of the last pair may be another sequence's: its weight is 0, which would make an infinite value NaN.
    if (r.length % 2 != 0) __builtin_memset(to + r.length * 2, 0, 2);
  }
  return r;
}

// As lanes::attention, whose softmax this is. Pairs of tokens are counted from the sequence's first, wherever in its
// panel that is: the order of the sums, and so the result, depends on nothing else.
static inline void rounded_attention(const Attention& a) {
  using lanes::Floats;
  const Rounded r = round_operands(a);
  for (int panel = r.first; panel <= r.last; ++panel) {
    store_features(a.query + panel * a.stride, a.size, r.query);
    Floats top = lanes::broadcast(-3.0e38f), spoiled = lanes::broadcast(0.0f);
    for (int p = r.first; p <= r.last; ++p) {
      Floats sum[kLanes] = {};
      const char* keys = r.keys + std::ptrdiff_t{p - r.first} * r.depth * 64;
      for (int d = 0; d < r.depth; ++d) add_pairs(sum, r.query + d * 64, keys + d * 64, 4);
      PRUNEOFA_UNROLL
      for (int s = 0; s < kLanes; ++s) {
        const int token = p * kLanes + s;
        lanes::store_score(a, panel, token, sum[s], r.scores + (token - r.first * kLanes) * kLanes, top, spoiled);
      }
    }
    Floats total = spoiled;
    const float* scores = r.scores + a.begin % kLanes * kLanes;
    for (int pair = 0; pair < r.pairs; ++pair) {
      const Floats first = lanes::exponential_below(lanes::load(scores + 2 * pair * kLanes) - top);
      const Floats second = 2 * pair + 1 < r.length
                                ? lanes::exponential_below(lanes::load(scores + (2 * pair + 1) * kLanes) - top)
                                : lanes::broadcast(0.0f);
      store_pairs(first, second, r.weights + std::ptrdiff_t{pair} * 64);
      total = add_pair(total, r.weights + std::ptrdiff_t{pair} * 64, kOnes);  // as rounded, so that they sum to 1
    }
    const Floats inverse = 1.0f / total;
    const lanes::Ints in_sequence = lanes::sequence_mask(a, panel);
    float* out = a.query + panel * a.stride;
    for (int d0 = 0; d0 < a.size; d0 += kLanes) {
      Floats sum[kLanes] = {};
      const char* values = r.values + d0 * r.value_bytes;
      for (int pair = 0; pair < r.pairs; ++pair) {
        add_pairs(sum, r.weights + std::ptrdiff_t{pair} * 64, values + pair * 4, r.value_bytes);
      }
      PRUNEOFA_UNROLL
      for (int d = 0; d < kLanes; ++d) {
        float* place = out + (d0 + d) * kLanes;
        lanes::store(place, lanes::select(in_sequence, sum[d] * inverse, lanes::load(place)));
      }
    }
  }
}

// Heads of another size than a multiple of 32 stay exact, as on AMX.
static inline void attention(const Attention& a) {
  a.rounding == Rounding::kBfloat16 && a.size % 32 == 0 ? rounded_attention(a) : lanes::attention(a);
}
