// From the int32 sums of a block of tiles to the floats, or halves, of a layer. Included by amx.cc.

// A block: two rows of tiles times two panels. Its sums are stored to memory, [panel][32 outputs][16]. Their epilogue
// is applied a few rows at a time between the tile instructions of the next block, which leave the vector units idle.
struct Block {
  int n = 0, rows = 0;        // outputs
  int panel = 0, panels = 0;
};

void copy_raw_sums(const Weights& w, const Operands& o, const Block& block, const int32_t* sums) {
  for (int i = 0; i < block.panels; ++i) {
    for (int r = 0; r < block.rows; ++r) {
      epilogue(w, o, block.panel + i, block.n + r, sums + (i * 32 + r) * kLanes);
    }
  }
}

// Variants of the epilogue. kFloats: no activation, no range; kAdded: added to y; kOther: any activation,
// chosen at run time for each row.
enum class Epilogue { kFloats, kAdded, kGelu, kGeluHalf, kOther };

template <Epilogue kind>
constexpr int kRowFloats = kind == Epilogue::kGeluHalf ? kLanes / 2 : kLanes;

// State of the epilogue for consecutive rows of one panel.
struct RowEpilogue {
  const float *row_sum, *scale, *bias;  // of the next output
  const int32_t* sums;
  float* y;
  float* ranges;      // of the panel; null: not asked for
  TokenScales tokens;
  Activation activation;
  lanes::Floats low, high;  // of the rows so far
};

template <Epilogue kind>
PRUNEOFA_INLINE RowEpilogue row_epilogue(const Weights& w, const Operands& o, const Block& block, int row,
                                         const int32_t* sums) {
  const int panel = block.panel + row / 32, n = block.n + row % 32;
  return {w.row_sum + n,
          w.scale + n,
          w.bias + n,
          sums + row * kLanes,
          o.y + panel * o.y_stride + (n - o.first) * kRowFloats<kind>,
          o.ranges == nullptr ? nullptr : o.ranges + panel * 2 * kLanes,
          token_scales(o, panel),
          o.activation,
          lanes::broadcast(0.0f),
          lanes::broadcast(0.0f)};
}

PRUNEOFA_INLINE lanes::Floats dequantized(const RowEpilogue& f, int i) {
  return dequantize(f.tokens, f.row_sum[i], f.scale[i], f.bias[i], lanes::load(f.sums + i * kLanes));
}

// Two rows in half precision, or one where it is the last.
PRUNEOFA_INLINE void apply_to_halves(RowEpilogue& f, int i, bool alone) {
  const __m512h v = gelu_half(join(dequantized(f, i), alone ? lanes::broadcast(0.0f) : dequantized(f, i + 1)));
  float* const y = f.y + i * kRowFloats<Epilogue::kGeluHalf>;
  alone ? _mm512_mask_storeu_epi16(y, 0xffff, _mm512_castph_si512(v)) : _mm512_store_ph(y, v);
  f.low = reinterpret_cast<lanes::Floats>(minimum(as_halves(f.low), v));
  f.high = reinterpret_cast<lanes::Floats>(maximum(as_halves(f.high), v));
}

template <Epilogue kind, int Rows>
PRUNEOFA_INLINE void apply_to_rows(RowEpilogue& f) {
  PRUNEOFA_UNROLL
  for (int i = 0; i < Rows; ++i) {
    if (kind == Epilogue::kGeluHalf) {
      if (i % 2 == 0) apply_to_halves(f, i, i + 1 == Rows);
      continue;
    }
    lanes::Floats v = dequantized(f, i);
    if (kind == Epilogue::kGelu) v = lanes::gelu(v);
    if (kind == Epilogue::kOther) v = lanes::activate(v, f.activation);
    if (kind == Epilogue::kAdded) v = v + lanes::load(f.y + i * kLanes);
    lanes::store(f.y + i * kLanes, v);
    if (kind == Epilogue::kAdded || kind == Epilogue::kFloats) continue;
    f.low = lanes::minimum(f.low, v);
    f.high = lanes::maximum(f.high, v);
  }
  f.row_sum += Rows;
  f.scale += Rows;
  f.bias += Rows;
  f.sums += Rows * kLanes;
  f.y += Rows * kRowFloats<kind>;
}

template <Epilogue kind>
PRUNEOFA_INLINE void store_ranges(const RowEpilogue& f) {
  if (kind == Epilogue::kAdded || kind == Epilogue::kFloats || f.ranges == nullptr) return;
  if (kind == Epilogue::kGeluHalf) {
    update_range(f.ranges, as_halves(f.low));
    update_range(f.ranges, as_halves(f.high));
  } else {
    lanes::update_range(f.ranges, f.low);
    lanes::update_range(f.ranges, f.high);
  }
}

// The rows of a block that were not interleaved with tile instructions: from `row` on, counted over both panels.
template <Epilogue kind>
void apply_to_rest(const Weights& w, const Operands& o, const Block& block, int row, const int32_t* sums) {
  for (; row < block.panels * 32; row = row / 32 * 32 + 32) {
    RowEpilogue f = row_epilogue<kind>(w, o, block, row, sums);
    for (int r = row % 32; r < block.rows; ++r) apply_to_rows<kind, 1>(f);
    store_ranges<kind>(f);
  }
}
