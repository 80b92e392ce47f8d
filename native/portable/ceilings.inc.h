// What a path can do at most: its products, on operands in the first-level cache, and reading. Included after
// linear.inc.h.

namespace {

// `Rows` outputs of `Panels` panels, as many as their sums fit the registers.
template <class Path, int Rows, int Panels>
int64_t multiply_cached(CachedOperands& o, int turns) {
  typename Path::Sum sum[Rows][Panels] = {};
  for (int t = 0; t < turns; ++t) {
    const int step = t % CachedOperands::kSteps;
    PRUNEOFA_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const typename Path::Word word = Path::word(o.words[step][r]);
      PRUNEOFA_UNROLL
      for (int i = 0; i < Panels; ++i) Path::add(sum[r][i], o.x[i][step], word);
    }
  }
  using Number = typename Path::Number;
  PRUNEOFA_UNROLL
  for (int r = 0; r < Rows; ++r) {
    PRUNEOFA_UNROLL
    for (int i = 0; i < Panels; ++i) {
      lanes::store(reinterpret_cast<Number*>(o.sums) + (r * Panels + i) * kLanes, Path::value(sum[r][i]));
    }
  }
  return int64_t{2} * Rows * Panels * Path::kGroup * kLanes * turns;
}

// All bytes, 128 at a time; what is computed of them is written to `out`, so that no compiler leaves it out.
void read_all(const void* data, std::size_t bytes, void* out) {
  const int32_t* x = static_cast<const int32_t*>(data);
  lanes::Ints any[2] = {lanes::broadcast(0), lanes::broadcast(0)};
  for (std::size_t i = 0; i < bytes / 128; ++i, x += 2 * kLanes) {
    any[0] = any[0] | lanes::load(x);
    any[1] = any[1] | lanes::load(x + kLanes);
  }
  lanes::store(static_cast<int32_t*>(out), any[0] | any[1]);
}

}  // namespace
