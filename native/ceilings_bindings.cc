// Python bindings of the measured ceilings (ceilings.h).
#include <nanobind/stl/string.h>

#include "bindings.h"
#include "ceilings.h"
#include "dispatch.h"

namespace pruneofa {
using namespace nb::literals;

namespace {

double peak(const std::string& isa, bool int8, int threads) {
  expect_threads(threads);
  const Kernels& kernels = kernels_for(isa);
  const WithoutGil release;
  return arithmetic_peak(kernels, int8, threads);
}

double bandwidth(const std::string& isa, std::size_t bytes, int threads) {
  expect_threads(threads);
  expect(bytes >= 1 && bytes <= std::size_t{1} << 40, "bytes: wanted 1 to 2^40");
  const Kernels& kernels = kernels_for(isa);
  const WithoutGil release;
  return read_bandwidth(kernels, bytes, threads);
}

}  // namespace

void bind_ceilings(nb::module_& m) {
  m.def("arithmetic_peak", &peak, "isa"_a, "int8"_a, "threads"_a);
  m.def("read_bandwidth", &bandwidth, "isa"_a, "bytes"_a, "threads"_a);
}

}  // namespace pruneofa
