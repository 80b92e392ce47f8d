// From the int32 sums of a block of tiles to the floats, or halves, of a layer. Included by amx.cc.

// A block: two rows of tiles times two panels. Its sums lie in memory, [panel][32 outputs][16], and become floats a few
// rows at a time between the tile instructions of the next block, which leave the vector units idle.
struct Block {
  int n = 0, rows = 0;        // outputs
  int panel = 0, panels = 0;
};

void copy_sums(const Weights& w, const Operands& o, const Block& block, const int32_t* sums) {
  for (int i = 0; i < block.panels; ++i) {
    for (int r = 0; r < block.rows; ++r) {
      finish(w, o, block.panel + i, block.n + r, lanes::load(sums + (i * 32 + r) * kLanes));
    }
  }
}

// What sums become. kOther: any activation, asked for each row.
enum class Finish { kFloats, kAdded, kGelu, kGeluHalf, kOther };

template <Finish kind>
constexpr int kRowFloats = kind == Finish::kGeluHalf ? kLanes / 2 : kLanes;

// Rows of one panel on their way to becoming floats, or halves.
struct Finisher {
  const float *row_sum, *scale, *bias;  // of the next output
  const int32_t* sums;
  float* y;
  float* kept;  // ranges or moments of the panel; null: not asked for
  Tokens tokens;
  Activation activation;
  lanes::Floats low, high;  // or sum and squares
};

template <Finish kind>
PRUNEOFA_INLINE Finisher finisher(const Weights& w, const Operands& o, const Block& block, int row, const int32_t* sums) {
  const int panel = block.panel + row / 32, n = block.n + row % 32;
  float* const kept = kind == Finish::kAdded ? o.moments : o.ranges;
  return {w.row_sum + n,
          w.scale + n,
          w.bias + n,
          sums + row * kLanes,
          o.y + panel * o.y_stride + (n - o.first) * kRowFloats<kind>,
          kept == nullptr ? nullptr : kept + panel * 2 * kLanes,
          tokens(o, panel),
          o.activation,
          kind == Finish::kAdded ? lanes::load(o.moments + panel * 2 * kLanes) : lanes::all(0.0f),
          kind == Finish::kAdded ? lanes::load(o.moments + panel * 2 * kLanes + kLanes) : lanes::all(0.0f)};
}

PRUNEOFA_INLINE lanes::Floats finished(const Finisher& f, int i) {
  return dequantize(f.tokens, f.row_sum[i], f.scale[i], f.bias[i], lanes::load(f.sums + i * kLanes));
}

// Two rows of halves, or a last one.
PRUNEOFA_INLINE void finish_halves(Finisher& f, int i, bool alone) {
  const __m512h v = gelu_half(join(finished(f, i), alone ? lanes::all(0.0f) : finished(f, i + 1)));
  float* const y = f.y + i * kRowFloats<Finish::kGeluHalf>;
  alone ? _mm512_mask_storeu_epi16(y, 0xffff, _mm512_castph_si512(v)) : _mm512_store_ph(y, v);
  f.low = reinterpret_cast<lanes::Floats>(smaller(as_halves(f.low), v));
  f.high = reinterpret_cast<lanes::Floats>(larger(as_halves(f.high), v));
}

template <Finish kind, int Rows>
PRUNEOFA_INLINE void finish_rows(Finisher& f) {
  PRUNEOFA_UNROLL
  for (int i = 0; i < Rows; ++i) {
    if (kind == Finish::kGeluHalf) {
      if (i % 2 == 0) finish_halves(f, i, i + 1 == Rows);
      continue;
    }
    lanes::Floats v = finished(f, i);
    if (kind == Finish::kGelu) v = lanes::gelu(v);
    if (kind == Finish::kOther) v = lanes::activate(v, f.activation);
    if (kind == Finish::kAdded) {
      v = v + lanes::load(f.y + i * kLanes);
      f.low = f.low + v;
      f.high = f.high + v * v;
    }
    lanes::store(f.y + i * kLanes, v);
    if (kind == Finish::kAdded || kind == Finish::kFloats) continue;
    f.low = lanes::smaller(f.low, v);
    f.high = lanes::larger(f.high, v);
  }
  f.row_sum += Rows;
  f.scale += Rows;
  f.bias += Rows;
  f.sums += Rows * kLanes;
  f.y += Rows * kRowFloats<kind>;
}

template <Finish kind>
PRUNEOFA_INLINE void finish_kept(const Finisher& f) {
  if (f.kept == nullptr) return;
  if (kind == Finish::kAdded) {
    lanes::store(f.kept, f.low);
    lanes::store(f.kept + kLanes, f.high);
  } else if (kind == Finish::kGeluHalf) {
    widen(f.kept, as_halves(f.low));
    widen(f.kept, as_halves(f.high));
  } else {
    lanes::widen(f.kept, f.low);
    lanes::widen(f.kept, f.high);
  }
}

// The rows of a block that were not finished beside tile instructions: from `row` on, counted over both panels.
template <Finish kind>
void finish_rest(const Weights& w, const Operands& o, const Block& block, int row, const int32_t* sums) {
  for (; row < block.panels * 32; row = row / 32 * 32 + 32) {
    Finisher f = finisher<kind>(w, o, block, row, sums);
    for (int r = row % 32; r < block.rows; ++r) finish_rows<kind, 1>(f);
    finish_kept<kind>(f);
  }
}
