// Python bindings of the products for training (pattern.h).
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>

#include "bindings.h"
#include "dispatch.h"
#include "pattern.h"

namespace pruneofa {
using namespace nb::literals;

namespace {

using Output = nb::ndarray<float, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::shared_ptr<Pattern> pattern(Matrix<bool> kept, const std::string& isa) {
  const Kernels& kernels = kernels_for(isa);
  const WithoutGil release;
  return std::make_shared<Pattern>(kept.data(), kept.shape(0), kept.shape(1), kernels);
}

template <class T>
void expect_shape(const T& array, std::size_t rows, int columns, const char* what) {
  expect(array.shape(0) == rows && array.shape(1) == static_cast<std::size_t>(columns), what);
  expect(rows < 1u << 24, "too many rows");
}

void pattern_multiply(const Pattern& pattern, Matrix<float> x, Matrix<float> weight, std::optional<Vector<float>> bias,
                      Output y, int threads) {
  const std::size_t tokens = x.shape(0);
  expect_shape(x, tokens, pattern.inputs(), "x: wanted one column per input");
  expect_shape(weight, pattern.outputs(), pattern.inputs(), "weight: wanted the shape of the pattern");
  expect(!bias || bias->shape(0) == weight.shape(0), "bias: wanted one per output");
  expect_shape(y, tokens, pattern.outputs(), "y: wanted a row per row of x and one column per output");
  expect_threads(threads);
  const WithoutGil release;
  pattern.multiply(x.data(), tokens, weight.data(), bias ? bias->data() : nullptr, y.data(), threads);
}

void pattern_multiply_transposed(const Pattern& pattern, Matrix<float> dy, Matrix<float> weight, Output dx,
                                 int threads) {
  const std::size_t tokens = dy.shape(0);
  expect_shape(dy, tokens, pattern.outputs(), "dy: wanted one column per output");
  expect_shape(weight, pattern.outputs(), pattern.inputs(), "weight: wanted the shape of the pattern");
  expect_shape(dx, tokens, pattern.inputs(), "dx: wanted a row per row of dy and one column per input");
  expect_threads(threads);
  const WithoutGil release;
  pattern.multiply_transposed(dy.data(), tokens, weight.data(), dx.data(), threads);
}

void pattern_weight_gradient(const Pattern& pattern, Matrix<float> x, Matrix<float> dy, Output dw, int threads) {
  const std::size_t tokens = x.shape(0);
  expect_shape(x, tokens, pattern.inputs(), "x: wanted one column per input");
  expect_shape(dy, tokens, pattern.outputs(), "dy: wanted a row per row of x and one column per output");
  expect_shape(dw, pattern.outputs(), pattern.inputs(), "dw: wanted the shape of the pattern");
  expect_threads(threads);
  const WithoutGil release;
  pattern.weight_gradient(x.data(), dy.data(), tokens, dw.data(), threads);
}

}  // namespace

void bind_pattern(nb::module_& m) {
  nb::class_<Pattern>(m, "Pattern")
      .def(nb::new_(&pattern), "kept"_a.noconvert(), "isa"_a)
      .def("multiply", &pattern_multiply, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(),
           "y"_a.noconvert(), "threads"_a)
      .def("multiply_transposed", &pattern_multiply_transposed, "dy"_a.noconvert(), "weight"_a.noconvert(),
           "dx"_a.noconvert(), "threads"_a)
      .def("weight_gradient", &pattern_weight_gradient, "x"_a.noconvert(), "dy"_a.noconvert(), "dw"_a.noconvert(),
           "threads"_a);
}

}  // namespace pruneofa
