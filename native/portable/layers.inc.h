// The layers between the linear ones: ranges, quantization, LayerNorm and attention. Included after math.inc.h.

namespace lanes {

static inline void update_range(Ranges range, const Floats& v) {
  store(range, minimum(load(range), v));
  store(range + kLanes, maximum(load(range + kLanes), v));
}

static inline void range(const float* x, int count, Ranges range) {
  Floats low = load(range), high = load(range + kLanes);
  for (int f = 0; f < count; ++f) {
    const Floats v = load(x + f * kLanes);
    low = minimum(low, v);
    high = maximum(high, v);
  }
  store(range, low);
  store(range + kLanes, high);
}

// The range is extended to include 0. Below 2^-126 the reciprocal of a scale is infinite: there the scale is 1, and such
// a token counts as zeros.
static inline void scales(const float* ranges, int count, std::ptrdiff_t stride, float* scale, int32_t* zero) {
  Floats low = broadcast(0.0f), high = broadcast(0.0f);
  for (int i = 0; i < count; ++i) {
    low = minimum(low, load(ranges + i * stride));
    high = maximum(high, load(ranges + i * stride + kLanes));
  }
  Floats s = (high - low) / 255.0f;
  s = select(s < broadcast(0x1p-126f), broadcast(1.0f), s);
  store(scale, s);
  // Between 0 and 255 unless there are infinities or NaN.
  store(zero, truncate(minimum(maximum(round(0.0f - low / s), broadcast(0.0f)), broadcast(255.0f))));
}

// Words of `Group` codes of consecutive features; the bits of a code are 32 / Group. The product with 1 / scale
// replaces the quotient x / scale: a division costs more than everything else here. The code differs by one only if
// x / scale is within rounding of half an integer.
#if !defined(PRUNEOFA_CODE_OFFSET)  // Kernels::code_offset
#define PRUNEOFA_CODE_OFFSET 0
#endif
template <int Group, class Row>
static inline void encode_rows(const Row& row, int begin, int end, int features, const float* scale,
                               const int32_t* zero, void* codes) {
  const Floats inverse = 1.0f / load(scale);
  // Clipped before the zero point is added: far outside of a static range the sum is negative, or infinite.
  const Ints offset = load(zero) - as_ints(broadcast(kRound));
  const Ints least = broadcast(0) - offset, most = broadcast(255) - offset;
  int32_t* out = static_cast<int32_t*>(codes) + begin / Group * kLanes;
  const auto code = [&](int f) {
    const Ints rounded = as_ints(row(f - begin) * inverse + kRound);
    return maximum(minimum(rounded, most), least) + offset;
  };
  // 128 less of a byte is another highest bit.
  const auto store_word = [](int32_t* place, const Ints& word) {
    store(place, PRUNEOFA_CODE_OFFSET == 0 ? word : word ^ static_cast<int32_t>(0x80808080));
  };
  int f = begin;
  for (; f + Group <= end; f += Group, out += kLanes) {
    Ints word = code(f);
    PRUNEOFA_UNROLL
    for (int k = 1; k < Group; ++k) word = word | code(f + k) << (k * (32 / Group));
    store_word(out, word);
  }
  const int padded = end == features ? round_up(features, 64) : end;
  for (; f < padded; f += Group, out += kLanes) {
    Ints word = {};
    for (int k = 0; k < Group && f + k < end; ++k) word = word | code(f + k) << (k * (32 / Group));
    store_word(out, word);
  }
}

template <int Group>
static inline void encode_words(const float* x, int begin, int end, int features, const float* scale,
                                const int32_t* zero, void* codes) {
  encode_rows<Group>([&](int f) { return load(x + f * kLanes); }, begin, end, features, scale, zero, codes);
}

// The sum of term(0) .. term(count - 1), in four chains because an addition takes four cycles.
template <class Term>
static inline Floats sum_of(int count, const Term& term) {
  Floats sum[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    PRUNEOFA_UNROLL
    for (int chain = 0; chain < 4; ++chain) sum[chain] = sum[chain] + term(i + chain);
  }
  for (; i < count; ++i) sum[0] = sum[0] + term(i);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static inline int features_of_block(int block, int features) {
  const int rest = features - block * kNormBlock;
  return rest < kNormBlock ? rest : kNormBlock;
}

// Means are sums of differences from a value that is near: the sum of the values themselves would lose as many digits
// as they have in common.
static inline void moments(const float* x, int count, float* moments) {
  for (int b = 0; b * kNormBlock < count; ++b, x += kNormBlock * kLanes, moments += 2 * kLanes) {
    const int size = features_of_block(b, count);
    const Floats near = load(x);
    const Floats sum = sum_of(size, [&](int f) { return load(x + f * kLanes) - near; });
    const Floats mean = near + sum / static_cast<float>(size);
    store(moments, mean);
    store(moments + kLanes, sum_of(size, [&](int f) {
      const Floats difference = load(x + f * kLanes) - mean;
      return difference * difference;
    }));
  }
}

static inline void normalize(float* x, int count, int features, const float* moments, const float* gamma,
                             const float* beta, float epsilon, Ranges range) {
  const int blocks = (features + kNormBlock - 1) / kNormBlock;
  const auto block_mean = [&](int b) { return load(moments + b * 2 * kLanes); };
  const auto size = [&](int b) { return static_cast<float>(features_of_block(b, features)); };
  const Floats near = block_mean(0);
  const Floats sum = sum_of(blocks, [&](int b) { return (block_mean(b) - near) * size(b); });
  const Floats mean = near + sum / static_cast<float>(features);
  const Floats squares = sum_of(blocks, [&](int b) {
    const Floats difference = block_mean(b) - mean;
    return difference * difference * size(b) + load(moments + b * 2 * kLanes + kLanes);
  });
  const Floats variance = squares / static_cast<float>(features);
  alignas(64) float inverses[kLanes];
  store(inverses, variance + epsilon);
  for (int i = 0; i < kLanes; ++i) inverses[i] = 1.0f / sqrtf(inverses[i]);
  const Floats inverse = load(inverses);
  Floats low = broadcast(0.0f), high = broadcast(0.0f);
  for (int f = 0; f < count; ++f) {
    const Floats v = (load(x + f * kLanes) - mean) * inverse * gamma[f] + beta[f];
    store(x + f * kLanes, v);
    low = minimum(low, v);
    high = maximum(high, v);
  }
  if (range != nullptr) {
    store(range, minimum(load(range), low));
    store(range + kLanes, maximum(load(range + kLanes), high));
  }
}

// All ones where a token of the panel belongs to the sequence.
static inline Ints sequence_mask(const Attention& a, int panel) {
  alignas(64) int32_t mask[kLanes];
  for (int i = 0; i < kLanes; ++i) mask[i] = panel * kLanes + i >= a.begin && panel * kLanes + i < a.end ? -1 : 0;
  return load(mask);
}

// Stores the score of a query panel and a key, from the sum of their products. A score that is infinite or NaN makes its
// query's output NaN, by `spoiled`; the largest, `top`, is over the others, so that no power leaves the range of integers.
static inline void store_score(const Attention& a, int panel, int token, const Floats& sum, float* to, Floats& top,
                               Floats& spoiled) {
  Floats score = sum * a.scale;
  if (a.bias != nullptr) score = score + load_unaligned(a.bias + (panel * kLanes - token));
  store(to, score);
  if (token >= a.begin && token < a.end) {
    top = maximum(score, top);
    spoiled = spoiled + score * 0.0f;
  }
}

// softmax(scale * q k^T + bias) v for the query panels of one head of one sequence. Two passes over the scores of a
// panel, which fit the second-level cache, instead of an online softmax.
static inline void attention(const Attention& a) {
  constexpr int kBlock = PRUNEOFA_REGISTER == 64 ? 16 : 4;  // sums that fit the registers
  float* scores = static_cast<float*>(a.scratch);           // [keys][16]
  const int first = a.begin / kLanes, last = (a.end - 1) / kLanes;
  for (int panel = first; panel <= last; ++panel) {
    const float* q = a.query + panel * a.stride;
    Floats top = broadcast(-3.0e38f), spoiled = broadcast(0.0f);
    for (int p = first; p <= last; ++p) {
      const float* k = a.key + p * a.stride;
      for (int s0 = 0; s0 < kLanes; s0 += kBlock) {
        Floats sum[kBlock];
        PRUNEOFA_UNROLL
        for (int s = 0; s < kBlock; ++s) sum[s] = broadcast(0.0f);
        for (int d = 0; d < a.size; ++d) {
          const Floats v = load(q + d * kLanes);
          PRUNEOFA_UNROLL
          for (int s = 0; s < kBlock; ++s) sum[s] = sum[s] + v * k[d * kLanes + s0 + s];
        }
        PRUNEOFA_UNROLL
        for (int s = 0; s < kBlock; ++s) {
          const int token = p * kLanes + s0 + s;
          store_score(a, panel, token, sum[s], scores + (token - first * kLanes) * kLanes, top, spoiled);
        }
      }
    }
    Floats total = spoiled;
    for (int token = first * kLanes; token < (last + 1) * kLanes; ++token) {
      float* score = scores + (token - first * kLanes) * kLanes;
      const bool in_sequence = token >= a.begin && token < a.end;
      const Floats weight = in_sequence ? exponential_below(load(score) - top) : broadcast(0.0f);
      store(score, weight);
      total = total + weight;
    }
    const Floats inverse = 1.0f / total;
    // Lanes of the panel that belong to other sequences keep what those sequences wrote.
    const Ints in_sequence = sequence_mask(a, panel);
    float* out = a.query + panel * a.stride;
    for (int d0 = 0; d0 < a.size; d0 += kBlock) {
      Floats sum[kBlock];
      PRUNEOFA_UNROLL
      for (int d = 0; d < kBlock; ++d) sum[d] = broadcast(0.0f);
      for (int p = first; p <= last; ++p) {
        const float* v = a.value + p * a.stride + d0 * kLanes;
        const float* weights = scores + (p - first) * kLanes * kLanes;
        // Keys of other sequences have the weight 0, which would make an infinite value NaN.
        const int from = p == first ? a.begin % kLanes : 0, to = p == last ? (a.end - 1) % kLanes + 1 : kLanes;
        for (int s = from; s < to; ++s) {
          const Floats w = load(weights + s * kLanes);
          PRUNEOFA_UNROLL
          for (int d = 0; d < kBlock; ++d) sum[d] = sum[d] + w * v[d * kLanes + s];
        }
      }
      for (int d = 0; d < kBlock && d0 + d < a.size; ++d) {
        float* place = out + (d0 + d) * kLanes;
        store(place, select(in_sequence, sum[d] * inverse, load(place)));
      }
    }
  }
}

}  // namespace lanes
