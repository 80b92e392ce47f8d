// What the paths for x86 with AVX2 or more share in training: tiles of 8 x 8 floats, and sums over the lanes of vectors
// of 32 or 64 bytes. Included as lanes.inc.h is, after portable/training.inc.h.

struct Avx {
  static constexpr int kTile = 8;

  static void transpose(const float* from, std::ptrdiff_t from_stride, float* to, std::ptrdiff_t to_stride) {
    __m256 row[8], pair[8], four[8];
    PRUNEOFA_UNROLL
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_stride);
    PRUNEOFA_UNROLL
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
      pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    PRUNEOFA_UNROLL
    for (int i = 0; i < 8; i += 4) {
      four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
      four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
      four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    PRUNEOFA_UNROLL
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
  }

  // out[j] += the sum over the lanes of sum[j]
  static void add_lanes(const Vector (&sum)[4], float* out) {
    __m256 half[4];
    PRUNEOFA_UNROLL
    for (int j = 0; j < 4; ++j) half[j] = halves_added(sum[j]);
    const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
    const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
    const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), all));
  }

  static __m256 halves_added(Vector sum) {
    __m256 half[sizeof sum / sizeof(__m256)];
    memcpy(half, &sum, sizeof sum);
    return sizeof sum == sizeof(__m256) ? half[0] : _mm256_add_ps(half[0], half[sizeof sum / sizeof(__m256) - 1]);
  }
};
