// Softmax between the two tile products of attention. Included by amx_attention.inc.h.

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
PRUNEOFA_INLINE lanes::Floats softmax_weights(const Head& h, int pair, const float* scores, float base,
                                              const lanes::Floats& top, int slot) {
  lanes::Floats totals[2] = {lanes::broadcast(0.0f), lanes::broadcast(0.0f)};
  const auto in_sequence = [&](int s) { return All || pair * 32 + s < h.length; };
  int32_t* const weight[2] = {h.weight[0] + slot * 256, h.weight[1] + slot * 256};
  if (Parts == 1) {
    constexpr float kOne = 127 * 128;  // the bits of 1 as bfloat16
    const lanes::Floats shift = lanes::broadcast(lanes::kRound + kOne) - top * 128.0f;
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
        fixed[i] = reinterpret_cast<__m512i>(lanes::as_ints(v) - lanes::as_ints(lanes::broadcast(lanes::kRound)));
        if (!in_sequence(s + i)) fixed[i] = _mm512_setzero_si512();
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
        w[i] = in_sequence(s + i) ? power_of_two(lanes::load(scores + (s + i) * kLanes) * base - top)
                                  : lanes::broadcast(0.0f);
        totals[i] = totals[i] + w[i];
      }
      int32_t* const to[2] = {weight[0] + s / 2 * 16, weight[1] + s / 2 * 16};
      split<Parts>(w[0], w[1], to);
    }
  }
  compiler_barrier();
  return totals[0] + totals[1];
}

// The largest of each column of `rows` rows, in four chains because a comparison takes four cycles.
PRUNEOFA_INLINE lanes::Floats largest(const float* scores, int rows) {
  lanes::Floats top[4] = {lanes::load(scores), lanes::load(scores), lanes::load(scores), lanes::load(scores)};
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < 4; ++i) top[i] = lanes::maximum(top[i], lanes::load(scores + (r + i) * kLanes));
  }
  for (; r < rows; ++r) top[0] = lanes::maximum(top[0], lanes::load(scores + r * kLanes));
  return lanes::maximum(lanes::maximum(top[0], top[1]), lanes::maximum(top[2], top[3]));
}

template <int Parts>
PRUNEOFA_INLINE lanes::Floats softmax_weights(const Head& h, int pair, const float* scores, float base,
                                              const lanes::Floats& top, int slot) {
  return pair * 32 + 32 <= h.length ? softmax_weights<Parts, true>(h, pair, scores, base, top, slot)
                                    : softmax_weights<Parts, false>(h, pair, scores, base, top, slot);
}

// The largest score of each query with the keys of a pair.
PRUNEOFA_INLINE lanes::Floats largest_of_pair(const Head& h, int pair, const float* scores) {
  const int rest = h.length - pair * 32;
  return largest(scores, rest < 32 ? rest : 32);
}
