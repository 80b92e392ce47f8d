// Sparse weights of AMX: masks and non-zeros expanded to tiles. Included by amx.cc.

// State of the expansion of one row of tiles, half a tile at a time.
struct Expander {
  const uint64_t* masks;
  const int8_t* values;
  int8_t* tile;
  bool short_runs;
};

// Eight rows of 64 weights. Reads up to 63 bytes past the last non-zero. `Most` non-zeros per row: shorter loads
// straddle fewer cache lines.
template <int Most>
PRUNEOFA_INLINE void expand_rows(Expander& e) {
  const uint64_t* masks = e.masks;
  const int8_t* values = e.values;
  int8_t* tile = e.tile;
  // Weights come from memory once per pass over the layers.
  _mm_prefetch(reinterpret_cast<const char*>(masks) + 1024, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values) + 1024, _MM_HINT_T0);
  asm("" : "+r"(masks), "+r"(tile));  // otherwise GCC keeps eight addresses of each in registers
  PRUNEOFA_UNROLL
  for (int r = 0; r < 8; ++r) {
    const __m512i packed = Most > 32 ? _mm512_loadu_si512(values)
                                     : _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)values));
    uint64_t mask = masks[r];
    asm("" : "+r"(mask));  // otherwise GCC loads it twice
    _mm512_store_si512(tile + r * 64, _mm512_maskz_expand_epi8(mask, packed));
    values += _mm_popcnt_u64(mask);
  }
  compiler_barrier();
  e = {masks + 8, values, tile + kTile / 2, e.short_runs};
}

// A call, because its code in every variant of a chunk would be more than the cache of decoded instructions holds.
__attribute__((noinline)) void expand_tile(Expander& e) {
  for (int half = 0; half < 2; ++half) e.short_runs ? expand_rows<32>(e) : expand_rows<64>(e);
}
