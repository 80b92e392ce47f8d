// Products with the entries of a sparse matrix, for training (pattern.h). Included as lanes.inc.h is.
//
// Rows of tokens are transposed to columns, [features][width] with the tokens of a call innermost, so that a vector has
// one feature of several tokens. `Path` has a tile that it transposes, and sums over the lanes of four vectors.

namespace {

using Vector = lanes::FloatRegister;
constexpr int kVectorLanes = sizeof(Vector) / sizeof(float);
constexpr int kMostVectors = 8;  // in registers, beside four sums
constexpr int kTrainTokens = kMostVectors * kVectorLanes;

inline Vector load_vector(const float* p) { return lanes::Memory<Vector>::load(p); }

// Asks for the columns of an entry that comes kEntriesAhead later: they are in the second-level cache, and the CPU does
// not look far enough ahead to hide the time that they take from there. About 15 % of `multiply_tokens`.
template <int Vectors>
inline void prefetch_entry(const float* columns, uint16_t index) {
  constexpr int width = Vectors * kVectorLanes;
  const float* const place = columns + static_cast<std::ptrdiff_t>(index) * width;
  PRUNEOFA_UNROLL
  for (int i = 0; i < width; i += 16) __builtin_prefetch(place + i);
}

// For paths without better instructions.
struct GenericVector {
  static constexpr int kTile = 4;

  static void transpose(const float* from, std::ptrdiff_t from_stride, float* to, std::ptrdiff_t to_stride) {
    for (int j = 0; j < kTile; ++j) {
      for (int i = 0; i < kTile; ++i) to[j * to_stride + i] = from[i * from_stride + j];
    }
  }

  // out[j] += the sum over the lanes of sum[j]
  static void add_lanes(const Vector (&sum)[4], float* out) {
    for (int j = 0; j < 4; ++j) {
      float lane[kVectorLanes];
      memcpy(lane, &sum[j], sizeof lane);
      for (int count = kVectorLanes; count > 1; count /= 2) {
        for (int i = 0; i < count / 2; ++i) lane[i] += lane[i + count / 2];
      }
      out[j] += lane[0];
    }
  }
};

// columns[f][t] = rows[t][f]; 0 for `tokens` <= t < width.
template <class Path>
inline void to_columns(const float* rows, std::ptrdiff_t stride, int tokens, int features, int width, float* columns) {
  constexpr int kTile = Path::kTile;
  int t = 0;
  for (; t + kTile <= tokens; t += kTile) {
    int f = 0;
    for (; f + kTile <= features; f += kTile) {
      Path::transpose(rows + t * stride + f, stride, columns + static_cast<std::ptrdiff_t>(f) * width + t, width);
    }
    for (; f < features; ++f) {
      for (int i = t; i < t + kTile; ++i) columns[static_cast<std::ptrdiff_t>(f) * width + i] = rows[i * stride + f];
    }
  }
  for (; t < width; ++t) {
    for (int f = 0; f < features; ++f) {
      columns[static_cast<std::ptrdiff_t>(f) * width + t] = t < tokens ? rows[t * stride + f] : 0.0f;
    }
  }
}

// The inverse, without the padding.
template <class Path>
inline void to_rows(const float* columns, int width, int tokens, int features, float* rows, std::ptrdiff_t stride) {
  constexpr int kTile = Path::kTile;
  int t = 0;
  for (; t + kTile <= tokens; t += kTile) {
    int f = 0;
    for (; f + kTile <= features; f += kTile) {
      Path::transpose(columns + f * width + t, width, rows + t * stride + f, stride);
    }
    for (; f < features; ++f) {
      for (int i = t; i < t + kTile; ++i) rows[i * stride + f] = columns[f * width + i];
    }
  }
  for (; t < tokens; ++t) {
    for (int f = 0; f < features; ++f) rows[t * stride + f] = columns[f * width + t];
  }
}

// Rows of the matrix whose columns of outputs, or of their gradients, are in the first-level cache at a time.
constexpr int kEntryRows = 16;

template <class Path, int Vectors>
inline void multiply_tokens(const Entries& m, const float* values, const float* bias, const float* x, int tokens,
                            float* y, float* scratch) {
  constexpr int width = Vectors * kVectorLanes;
  float* const columns = scratch;
  float* const outputs = scratch + static_cast<std::ptrdiff_t>(m.columns) * width;
  to_columns<Path>(x, m.columns, tokens, m.columns, width, columns);
  for (int n0 = 0; n0 < m.rows; n0 += kEntryRows) {
    const int count = m.rows - n0 < kEntryRows ? m.rows - n0 : kEntryRows;
    for (int n = n0; n < n0 + count; ++n) {
      Vector sum[Vectors];
      PRUNEOFA_UNROLL
      for (int i = 0; i < Vectors; ++i) sum[i] = Vector{} + (bias != nullptr ? bias[n] : 0.0f);
      const uint32_t end = m.row_start[n + 1];
      for (uint32_t e = m.row_start[n]; e < end; ++e) {
        const float* place = columns + static_cast<std::ptrdiff_t>(m.index[e]) * width;
        const float value = values[e];
        prefetch_entry<Vectors>(columns, m.index[e + kEntriesAhead]);
        PRUNEOFA_UNROLL
        for (int i = 0; i < Vectors; ++i) sum[i] = sum[i] + load_vector(place + i * kVectorLanes) * value;
      }
      float* const place = outputs + (n - n0) * width;
      PRUNEOFA_UNROLL
      for (int i = 0; i < Vectors; ++i) lanes::Memory<Vector>::store(place + i * kVectorLanes, sum[i]);
    }
    to_rows<Path>(outputs, width, tokens, count, y + n0, m.rows);
  }
}

// The entries e .. e + 3; the index of an entry past the last one is that of the last.
template <class Path, int Vectors>
inline void sampled_products(const Vector (&d)[Vectors], const float* columns, const uint16_t* index, int count,
                             float* sums) {
  constexpr int width = Vectors * kVectorLanes;
  const float* place[4];
  PRUNEOFA_UNROLL
  for (int j = 0; j < 4; ++j) {
    prefetch_entry<Vectors>(columns, index[j + kEntriesAhead]);
    place[j] = columns + static_cast<std::ptrdiff_t>(index[j < count ? j : count - 1]) * width;
  }
  Vector sum[4];
  PRUNEOFA_UNROLL
  for (int j = 0; j < 4; ++j) sum[j] = d[0] * load_vector(place[j]);
  PRUNEOFA_UNROLL
  for (int i = 1; i < Vectors; ++i) {
    PRUNEOFA_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + d[i] * load_vector(place[j] + i * kVectorLanes);
  }
  if (count == 4) return Path::add_lanes(sum, sums);
  float padded[4] = {};
  for (int j = 0; j < count; ++j) padded[j] = sums[j];
  Path::add_lanes(sum, padded);
  for (int j = 0; j < count; ++j) sums[j] = padded[j];
}

template <class Path, int Vectors>
inline void sample_tokens(const Entries& m, const float* x, const float* dy, int tokens, int begin, int end,
                          float* sums, float* scratch) {
  constexpr int width = Vectors * kVectorLanes;
  float* const columns = scratch;
  float* const gradients = scratch + static_cast<std::ptrdiff_t>(m.columns) * width;
  to_columns<Path>(x, m.columns, tokens, m.columns, width, columns);
  for (int n0 = begin; n0 < end; n0 += kEntryRows) {
    const int count = end - n0 < kEntryRows ? end - n0 : kEntryRows;
    to_columns<Path>(dy + n0, m.rows, tokens, count, width, gradients);
    for (int n = n0; n < n0 + count; ++n) {
      Vector d[Vectors];
      PRUNEOFA_UNROLL
      for (int i = 0; i < Vectors; ++i) d[i] = load_vector(gradients + (n - n0) * width + i * kVectorLanes);
      const uint32_t last = m.row_start[n + 1];
      uint32_t e = m.row_start[n];
      for (; e + 4 <= last; e += 4) sampled_products<Path>(d, columns, m.index + e, 4, sums + e);
      if (e < last) sampled_products<Path>(d, columns, m.index + e, static_cast<int>(last - e), sums + e);
    }
  }
}

// Of functions for 1, 2, 4 and kMostVectors vectors, the first whose vectors hold the tokens.
template <class Function>
inline Function* for_tokens(int tokens, Function* one, Function* two, Function* four, Function* most) {
  const int vectors = (tokens + kVectorLanes - 1) / kVectorLanes;
  return vectors > 4 ? most : vectors > 2 ? four : vectors > 1 ? two : one;
}

template <class Path>
void multiply_entries(const Entries& m, const float* values, const float* bias, const float* x, int tokens, float* y,
                      float* scratch) {
  const auto multiply = for_tokens(tokens, multiply_tokens<Path, 1>, multiply_tokens<Path, 2>,
                                   multiply_tokens<Path, 4>, multiply_tokens<Path, kMostVectors>);
  multiply(m, values, bias, x, tokens, y, scratch);
}

template <class Path>
void sample_rows(const Entries& m, const float* x, const float* dy, int tokens, int begin, int end, float* sums,
                 float* scratch) {
  const auto sample = for_tokens(tokens, sample_tokens<Path, 1>, sample_tokens<Path, 2>, sample_tokens<Path, 4>,
                                 sample_tokens<Path, kMostVectors>);
  sample(m, x, dy, tokens, begin, end, sums, scratch);
}

}  // namespace
