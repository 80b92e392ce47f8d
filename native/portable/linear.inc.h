// Linear layers on words (groups of inputs), for any path: sparse lists of groups, or dense blocks of outputs.
// `Path` defines what one word adds to a sum; see scalar.cc. Included as lanes.inc.h is.

namespace {

// `begin` and `end` of paths without registers to configure.
inline void no_op() {}

// Scales and zero points of a panel of tokens, read once for many outputs.
struct TokenScales {
  lanes::Floats scale, zero;
};

inline TokenScales token_scales(const Operands& o, int panel) {
  return {lanes::load(o.scale + panel * kLanes), lanes::to_floats(lanes::load(o.zero + panel * kLanes))};
}

// Floats from the exact sums of output n for 16 tokens. The sum is exact as a float below 2^24, and larger ones only
// round to 24 bits; so does zero * row_sum.
inline lanes::Floats dequantize(const TokenScales& t, float row_sum, float scale, float bias, const lanes::Ints& sum) {
  return (lanes::to_floats(sum) - t.zero * row_sum) * (t.scale * scale) + bias;
}

inline void write(const Operands& o, int panel, int n, const lanes::Floats& y) {
  float* const place = o.y + panel * o.y_stride + (n - o.first) * kLanes;
  if (o.add) return lanes::store(place, lanes::load(place) + y);
  lanes::store(place, y);
  if (o.ranges != nullptr) lanes::update_range(o.ranges + panel * 2 * kLanes, y);
}

// From the stored sums of output n for a panel, [16]. By their address: where this is a call, two registers given by value
// go through memory in smaller pieces, and reading those back as registers stalls.
inline void epilogue(const Weights& w, const Operands& o, int panel, int n, const int32_t* stored) {
  lanes::Ints sum = lanes::load(stored);
  if (PRUNEOFA_CODE_OFFSET != 0) {
    sum = sum + lanes::broadcast(PRUNEOFA_CODE_OFFSET * static_cast<int32_t>(w.row_sum[n]));
  }
  if (o.sums != nullptr) {
    lanes::store(o.sums + (static_cast<std::ptrdiff_t>(panel) * w.outputs + n) * kLanes, sum);
    return;
  }
  const lanes::Floats v = dequantize(token_scales(o, panel), w.row_sum[n], w.scale[n], w.bias[n], sum);
  write(o, panel, n, lanes::activate(v, o.activation));
}

inline void epilogue(const Weights& w, const Operands& o, int panel, int n, const float* stored) {
  write(o, panel, n, lanes::activate(lanes::load(stored) + w.bias[n], o.activation));
}

// Sums in memory, for the epilogue. They are stored with constant indices: if a loop indexed the array of sums itself,
// the compiler would keep that array in memory, not in registers, and store it in every iteration of the inner loop.
template <class Path, int Rows, int Panels>
struct alignas(64) StoredSums {
  typename Path::Number of[Rows][Panels][kLanes];
};

template <class Path, int Rows, int Panels>
inline void store_sums(StoredSums<Path, Rows, Panels>& stored, const typename Path::Sum (&sum)[Rows][Panels]) {
  PRUNEOFA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < Panels; ++i) lanes::store(stored.of[r][i], Path::value(sum[r][i]));
  }
}

// Outputs n .. and panels p .., those that there are.
template <class Path, int Rows, int Panels>
inline void epilogue(const Weights& w, const Operands& o, int n, int p, const StoredSums<Path, Rows, Panels>& stored) {
  for (int r = 0; r < Rows && n + r < w.outputs; ++r) {
    for (int i = 0; i < Panels && p + i < o.panels; ++i) epilogue(w, o, p + i, n + r, stored.of[r][i]);
  }
}

// Output n for panels p .. p + Panels - 1 from the groups of row n.
template <class Path, int Panels>
inline void sparse_row(const Weights& w, const Operands& o, int n, int p, std::ptrdiff_t panel_bytes) {
  typename Path::Sum sum[1][Panels] = {};
  const char* x = static_cast<const char*>(o.x) + p * panel_bytes;
  const uint32_t end = w.row_start[n + 1];
  for (uint32_t g = w.row_start[n]; g < end; ++g) {
    const typename Path::Word word = Path::word(w.words[g]);
    const char* place = x + static_cast<std::ptrdiff_t>(w.index[g]) * Path::kGroupBytes;
    PRUNEOFA_UNROLL
    for (int i = 0; i < Panels; ++i) Path::add(sum[0][i], place + i * panel_bytes, word);
  }
  StoredSums<Path, 1, Panels> stored;
  store_sums(stored, sum);
  epilogue(w, o, n, p, stored);
}

template <class Path>
inline void sparse_linear(const Weights& w, const Operands& o, int begin, int end) {
  const std::ptrdiff_t panel_bytes =
      static_cast<std::ptrdiff_t>(Path::kPadded ? round_up(w.inputs, 64) : w.inputs) / Path::kGroup * Path::kGroupBytes;
  // All panels for one block of rows before the next: the words of a block stay in the first-level cache.
  constexpr int kRowBlock = 32;
  for (int n0 = begin; n0 < end; n0 += kRowBlock) {
    const int n1 = n0 + kRowBlock < end ? n0 + kRowBlock : end;
    int p = 0;
    for (; p + 4 <= o.panels; p += 4) {
      for (int n = n0; n < n1; ++n) sparse_row<Path, 4>(w, o, n, p, panel_bytes);
    }
    for (; p + 2 <= o.panels; p += 2) {
      for (int n = n0; n < n1; ++n) sparse_row<Path, 2>(w, o, n, p, panel_bytes);
    }
    for (; p < o.panels; ++p) {
      for (int n = n0; n < n1; ++n) sparse_row<Path, 1>(w, o, n, p, panel_bytes);
    }
  }
}

// Outputs n .. n + Path::kBlock - 1 for `Panels` panels; `words` is the block, [groups][kBlock].
template <class Path, int Panels>
inline void dense_block(const Weights& w, const Operands& o, int n, int p, std::ptrdiff_t panel_bytes, int groups) {
  typename Path::Sum sum[Path::kBlock][Panels] = {};
  const char* x = static_cast<const char*>(o.x) + p * panel_bytes;
  const uint32_t* words = w.words + static_cast<std::ptrdiff_t>(n) * groups;
  for (int g = 0; g < groups; ++g) {
    PRUNEOFA_UNROLL
    for (int r = 0; r < Path::kBlock; ++r) {
      const typename Path::Word word = Path::word(words[g * Path::kBlock + r]);
      PRUNEOFA_UNROLL
      for (int i = 0; i < Panels; ++i) Path::add(sum[r][i], x + g * Path::kGroupBytes + i * panel_bytes, word);
    }
  }
  StoredSums<Path, Path::kBlock, Panels> stored;
  store_sums(stored, sum);
  epilogue(w, o, n, p, stored);
}

template <class Path>
inline void dense_linear(const Weights& w, const Operands& o, int begin, int end) {
  const int inputs = Path::kPadded ? round_up(w.inputs, 64) : w.inputs;
  const int groups = inputs / Path::kGroup;
  const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(groups) * Path::kGroupBytes;
  for (int n = begin; n < end; n += Path::kBlock) {
    int p = 0;
    for (; p + Path::kDensePanels <= o.panels; p += Path::kDensePanels) {
      dense_block<Path, Path::kDensePanels>(w, o, n, p, panel_bytes, groups);
    }
    if constexpr (Path::kDensePanels > 2) {
      for (; p + 2 <= o.panels; p += 2) dense_block<Path, 2>(w, o, n, p, panel_bytes, groups);
    }
    for (; p < o.panels; ++p) dense_block<Path, 1>(w, o, n, p, panel_bytes, groups);
  }
}

// Gathered words: any inputs of an output share a word, not only consecutive ones. So the codes of a few panels are
// first transposed to rows, one per input, in the thread's scratch; `Gather` interleaves the rows of an entry's inputs
// to the words that `Path` multiplies. Every thread makes all rows for itself: that is cheaper than a barrier.
template <class Gather>
void gathered_linear(const Weights& w, const Operands& o, int begin, int end) {
  const int groups = round_up(w.inputs, 64) / Gather::kGroup;
  const std::ptrdiff_t panel_bytes = static_cast<std::ptrdiff_t>(groups) * Gather::kGroupBytes;
  char* rows = static_cast<char*>(o.scratch);
  for (int p = 0; p < o.panels; p += Gather::kPanels) {
    const int count = o.panels - p < Gather::kPanels ? o.panels - p : Gather::kPanels;
    Gather::transpose_codes(static_cast<const char*>(o.x) + p * panel_bytes, panel_bytes, groups, count, rows);
    for (int n = begin; n < end; n += w.shared) Gather::multiply(w, o, n, p, count, rows);
  }
}

template <class Path>
void linear(const Weights& w, const Operands& o, int begin, int end) {
  if (w.sparse) {
    sparse_linear<Path>(w, o, begin, end);
  } else {
    dense_linear<Path>(w, o, begin, end);
  }
}

template <class Path, class Gather>
void linear_or_gathered(const Weights& w, const Operands& o, int begin, int end) {
  w.shared ? gathered_linear<Gather>(w, o, begin, end) : linear<Path>(w, o, begin, end);
}

}  // namespace
