// What the two AVX-512 paths without tiles share beside avx512.inc.h: sparse int8 weights by VNNI, and the row of the
// table of paths.

// Gathered words from rows of 64 bytes per input. Four rows are interleaved to the codes of up to four panels by eight
// shuffles. Tokens 4 l .. 4 l + 3 of panel q lie at bytes 16 l + 4 q of a row, which makes them come out in order.
// With two panels or one the same shuffles serve two or four entries at once: each panel is in its row two or four
// times, and every other 4 bytes are taken from the next entry's row.
struct Gather {
  static constexpr int kGroup = 4, kGroupBytes = 64, kPanels = 4;
  // Masks of all lanes: for the intrinsics without a mask GCC warns of undefined values.
  static constexpr __mmask16 k32 = 0xffff;
  static constexpr __mmask8 k64 = 0xff;

  static void transpose_codes(const char* x, std::ptrdiff_t panel_bytes, int groups, int count, char* rows) {
    const __m512i by_input = _mm512_maskz_broadcast_i32x4(
        k32, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const char* panel[4];
    for (int i = 0; i < 4; ++i) panel[i] = x + (count < 3 ? i * count / 4 : i < count ? i : count - 1) * panel_bytes;
    for (int g = 0; g < groups; ++g, rows += 4 * 64) {
      __m512i codes[4];
      PRUNEOFA_UNROLL
      for (int i = 0; i < 4; ++i) codes[i] = _mm512_shuffle_epi8(_mm512_load_si512(panel[i] + g * 64), by_input);
      const __m512i a = _mm512_maskz_unpacklo_epi32(k32, codes[0], codes[1]);
      const __m512i b = _mm512_maskz_unpacklo_epi32(k32, codes[2], codes[3]);
      const __m512i c = _mm512_maskz_unpackhi_epi32(k32, codes[0], codes[1]);
      const __m512i d = _mm512_maskz_unpackhi_epi32(k32, codes[2], codes[3]);
      _mm512_store_si512(rows, _mm512_maskz_unpacklo_epi64(k64, a, b));
      _mm512_store_si512(rows + 64, _mm512_maskz_unpackhi_epi64(k64, a, b));
      _mm512_store_si512(rows + 128, _mm512_maskz_unpacklo_epi64(k64, c, d));
      _mm512_store_si512(rows + 192, _mm512_maskz_unpackhi_epi64(k64, c, d));
    }
  }

  // Entries e .. e + Together - 1.
  template <int Shared, int Panels, int Together>
  static void add(Int8::Sum (&sum)[Shared][Panels], const Weights& w, const char* rows, uint32_t e) {
    constexpr int kCopies = 4 / Panels;  // of a panel in a row
    const uint16_t* index = w.index + std::size_t{e} * 4;
    const uint32_t* words = w.words + std::size_t{e} * Shared;
    __m512i row[4], codes[4];
    PRUNEOFA_UNROLL
    for (int k = 0; k < 4; ++k) {
      row[k] = _mm512_load_si512(rows + std::size_t{index[k]} * 64);
      PRUNEOFA_UNROLL
      for (int i = 1; i < Together; ++i) {
        const __mmask16 every = static_cast<__mmask16>((kCopies == 2 ? 0x5555 : 0x1111) << i);
        row[k] = _mm512_mask_load_epi32(row[k], every, rows + std::size_t{index[4 * i + k]} * 64);
      }
    }
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i c = _mm512_unpackhi_epi8(row[0], row[1]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    codes[0] = _mm512_unpacklo_epi16(a, b);
    codes[1] = _mm512_unpackhi_epi16(a, b);
    codes[2] = _mm512_unpacklo_epi16(c, d);
    codes[3] = _mm512_unpackhi_epi16(c, d);
    PRUNEOFA_UNROLL
    for (int r = 0; r < Shared; ++r) {
      PRUNEOFA_UNROLL
      for (int i = 0; i < Together; ++i) {
        const __m512i word = Int8::word(words[i * Shared + r]);
        PRUNEOFA_UNROLL
        for (int p = 0; p < Panels; ++p) Int8::add(sum[r][p], codes[p * kCopies + i], word);
      }
    }
  }

  template <int Shared, int Panels>
  static void block(const Weights& w, const Operands& o, int n, int p, const char* rows) {
    constexpr int kTogether = 4 / Panels;
    Int8::Sum sum[Shared][Panels] = {};
    uint32_t e = w.row_start[n / Shared];
    const uint32_t end = w.row_start[n / Shared + 1];
    for (; e + kTogether <= end; e += kTogether) add<Shared, Panels, kTogether>(sum, w, rows, e);
    for (; e < end; ++e) add<Shared, Panels, 1>(sum, w, rows, e);
    StoredSums<Int8, Shared, Panels> stored;
    store_sums(stored, sum);
    epilogue(w, o, n, p, stored);
  }

  template <int Shared>
  static void multiply_shared(const Weights& w, const Operands& o, int n, int p, int count, const char* rows) {
    if (count > 2) return block<Shared, 4>(w, o, n, p, rows);
    if (count == 2) return block<Shared, 2>(w, o, n, p, rows);
    block<Shared, 1>(w, o, n, p, rows);
  }

  static void multiply(const Weights& w, const Operands& o, int n, int p, int count, const char* rows) {
    w.shared == 4 ? multiply_shared<4>(w, o, n, p, count, rows) : multiply_shared<1>(w, o, n, p, count, rows);
  }
};

// Constant, so that nothing of the path runs before the CPU is known.
constexpr Kernels path(const char* isa, bool (*supported)(), void (*attention)(const Attention&)) {
  return {
      .isa = isa,
      .supported = supported,
      .lay_out = lay_out_words,
      .group_int8 = 4,
      .block_int8 = 4,
      .block_float = 4,
      .sparse_above = 0.7f,
      .sparse_above_float = 0.6f,
      .gathered = 1.7f,
      .gathered_by_4 = 3.0f,
      .begin = no_op,
      .end = no_op,
      .linear_int8 = linear_or_gathered<Int8, Gather>,
      .linear_float = linear<Float>,
      .range = lanes::range,
      .scales = lanes::scales,
      .encode = lanes::encode_words<4>,
      .moments = lanes::moments,
      .normalize = lanes::normalize,
      .attention = attention,
      .train_tokens = kTrainTokens,
      .multiply_entries = multiply_entries<Avx>,
      .sample_entries = sample_rows<Avx>,
      .multiply_cached_int8 = multiply_cached<Int8, 4, 4>,
      .multiply_cached_float = multiply_cached<Float, 4, 4>,
      .read_all = read_all,
  };
}
