// GELU in half precision, 32 numbers at a time: one row of 16 tokens in the lower half of a register, the next in the
// upper one. For activations that are quantized by the token next: a code is a 255th of the token's range, half a float
// 16 bits away from it at least. Included by amx.cc.

// |x| * (Phi(|x|) - 1) by quadratics in |x| around 0, 1/6, ... 31/6: coefficients of |x|^0 .. |x|^2. The last is 0.
alignas(64) constexpr _Float16 kGeluHalf[3][32] = {
    {0, -1.2577e-4, -2.2278e-3, -1.0773e-2, -3.1158e-2, -6.7383e-2, -1.2024e-1, -1.8616e-1, -2.5806e-1, -3.2690e-1,
     -3.8281e-1, -4.1895e-1, -4.3140e-1, -4.2017e-1, -3.8867e-1, -3.4253e-1, -2.8857e-1, -2.3267e-1, -1.7993e-1,
     -1.3367e-1, -9.5581e-2, -6.5796e-2, -4.3640e-2, -2.7924e-2, -1.7242e-2, -1.0292e-2, -5.9319e-3, -3.3073e-3,
     -1.7834e-3, -9.3079e-4, -4.7016e-4, 0},
    {-5.0000e-1, -4.9756e-1, -4.8145e-1, -4.4092e-1, -3.7134e-1, -2.7490e-1, -1.5955e-1, -3.7598e-2, 7.7759e-2,
     1.7505e-1, 2.4609e-1, 2.8760e-1, 3.0078e-1, 2.9004e-1, 2.6196e-1, 2.2388e-1, 1.8201e-1, 1.4136e-1, 1.0522e-1,
     7.5195e-2, 5.1727e-2, 3.4271e-2, 2.1896e-2, 1.3504e-2, 8.0490e-3, 4.6387e-3, 2.5845e-3, 1.3933e-3, 7.2765e-4,
     3.6788e-4, 1.8024e-4, 0},
    {3.9819e-1, 3.8745e-1, 3.5596e-1, 3.0786e-1, 2.4841e-1, 1.8408e-1, 1.2115e-1, 6.4758e-2, 1.8478e-2, -1.5945e-2,
     -3.8452e-2, -5.0385e-2, -5.3864e-2, -5.1331e-2, -4.5135e-2, -3.7231e-2, -2.9144e-2, -2.1744e-2, -1.5541e-2,
     -1.0666e-2, -7.0496e-3, -4.4899e-3, -2.7599e-3, -1.6403e-3, -9.4271e-4, -5.2404e-4, -2.8205e-4, -1.4710e-4,
     -7.4327e-5, -3.6418e-5, -1.7285e-5, 0},
};

PRUNEOFA_INLINE __m512h as_halves(const lanes::Floats& v) { return reinterpret_cast<__m512h>(v); }
PRUNEOFA_INLINE __m512h halves(float v) { return _mm512_set1_ph(static_cast<_Float16>(v)); }

PRUNEOFA_INLINE __m512h join(const lanes::Floats& first, const lanes::Floats& second) {
  const auto narrow = [](const lanes::Floats& v) {
    return _mm256_castph_pd(_mm512_maskz_cvtxps_ph(0xffff, reinterpret_cast<__m512>(v)));
  };
  return _mm512_castpd_ph(_mm512_maskz_insertf64x4(0xff, _mm512_castpd256_pd512(narrow(first)), narrow(second), 1));
}

PRUNEOFA_INLINE __m512h minimum(const __m512h& a, const __m512h& b) { return _mm512_maskz_min_ph(~0u, a, b); }
PRUNEOFA_INLINE __m512h maximum(const __m512h& a, const __m512h& b) { return _mm512_maskz_max_ph(~0u, a, b); }

// x * Phi(x) = max(x, 0) + |x| * (Phi(|x|) - 1), to 5e-4 absolute up to x = 1 and of x beyond. The index is in the
// lowest bits of 1536 + 6 |x|, as with lanes::kRound; VPERMW reads five. A comparison has another port than `max`.
PRUNEOFA_INLINE __m512h gelu_half(const __m512h& x) {
  const __m512h a = minimum(_mm512_abs_ph(x), halves(31.0f / 6));
  const __m512i index = _mm512_castph_si512(_mm512_fmadd_ph(a, halves(6), halves(1536)));
  const auto coefficient = [&](int i) {
    return _mm512_castsi512_ph(_mm512_maskz_permutexvar_epi16(~0u, index, _mm512_load_si512(kGeluHalf[i])));
  };
  const __m512h p = _mm512_fmadd_ph(_mm512_fmadd_ph(coefficient(2), a, coefficient(1)), a, coefficient(0));
  const __mmask32 positive = _mm512_cmpgt_epi16_mask(_mm512_castph_si512(x), _mm512_setzero_si512());
  return _mm512_mask_add_ph(p, positive, x, p);
}

// Updates the range of 16 tokens with the rows in both halves of a register. Above 65504 a half is infinite: the range
// ends there, and the code will be the highest.
PRUNEOFA_INLINE void update_range(Ranges range, const __m512h& v) {
  const __m512d both = _mm512_castph_pd(v);
  const auto wide = [](__m256d half) {
    const __m512 v = _mm512_maskz_cvtxph_ps(0xffff, _mm256_castpd_ph(half));
    return lanes::minimum(reinterpret_cast<lanes::Floats>(v), lanes::broadcast(65504.0f));
  };
  lanes::update_range(range, wide(_mm512_maskz_extractf64x4_pd(0xff, both, 0)));
  lanes::update_range(range, wide(_mm512_maskz_extractf64x4_pd(0xff, both, 1)));
}

// As `Kernels::encode`, from halves.
void encode_half(const float* x, int begin, int end, int features, const float* scale, const int32_t* zero,
                 void* codes) {
  lanes::encode_rows<4>(
      [&](int f) {
        const __m256h row = _mm256_load_ph(x + f * (kLanes / 2));
        return reinterpret_cast<lanes::Floats>(_mm512_maskz_cvtxph_ps(0xffff, row));
      },
      begin, end, features, scale, zero, codes);
}
