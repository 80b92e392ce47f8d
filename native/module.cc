// Python bindings of the engine, under the rules of bindings.h.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "bindings.h"
#include "dispatch.h"
#include "encoder.h"
#include "linear.h"
#include "scheduler.h"

namespace pruneofa {
using namespace nb::literals;

namespace {

// Zeroed memory that belongs to a Python object.
template <class T>
nb::capsule new_memory(std::size_t count, T** data) {
  *data = new T[count]();
  return nb::capsule(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
}

template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> new_matrix(std::size_t rows, std::size_t columns, T** data) {
  const nb::capsule owner = new_memory(rows * columns, data);
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(*data, {rows, columns}, owner);
}

void expect_scales(const std::vector<float>& scale) {
  for (const float one : scale) expect(std::isfinite(one) && one > 0, "a scale is not a positive finite number");
}

template <class A>
auto copy(const A& array) {
  return std::vector<std::remove_cvref_t<decltype(*array.data())>>(array.data(), array.data() + array.size());
}

// The arrays of a linear layer, copied: they are read without the GIL, when other Python threads may write to them, and
// what is checked has to be what is read.
struct LayerArrays {
  LayerArrays(const Matrix<uint8_t>& bitmask, const std::optional<Vector<float>>& scale,
              const std::optional<Vector<float>>& bias, int inputs)
      : bitmask(copy(bitmask)), scale(scale ? copy(*scale) : std::vector<float>()),
        bias(bias ? copy(*bias) : std::vector<float>()) {
    const std::size_t outputs = bitmask.shape(0), bytes = bitmask.shape(1);
    expect(outputs < 1u << 24, "bitmask: wanted at most 16777215 rows");
    expect(inputs > 0 && bytes == (static_cast<std::size_t>(inputs) + 7) / 8,
           "bitmask: wanted ceil(k / 8) bytes per row");
    for (std::size_t n = 0; inputs % 8 != 0 && n < outputs; ++n) {
      expect(this->bitmask[(n + 1) * bytes - 1] >> (inputs % 8) == 0, "bitmask: spare bits must be 0");
    }
    expect(!scale || this->scale.size() == outputs, "scale: wanted one per output");
    expect_scales(this->scale);
    expect(!bias || this->bias.size() == outputs, "bias: wanted one per output");
    layer.outputs = static_cast<int>(outputs);
    layer.inputs = inputs;
    layer.bitmask = this->bitmask.data();
    if (scale) layer.scale = this->scale.data();
    if (bias) layer.bias = this->bias.data();
  }
  LayerArrays(const LayerArrays&) = delete;  // `layer` points into it
  LayerArrays& operator=(const LayerArrays&) = delete;

  const std::vector<uint8_t> bitmask;
  const std::vector<float> scale, bias;
  PackedLayer layer;  // without its non-zeros
};

std::shared_ptr<Linear> int8_linear(Matrix<uint8_t> bitmask, Vector<int8_t> values, Vector<float> scale,
                                    std::optional<Vector<float>> bias, int k, const std::string& isa,
                                    std::optional<std::pair<float, int>> input) {
  LayerArrays arrays(bitmask, scale, bias, k);
  std::vector<int8_t> codes = copy(values);
  arrays.layer.nonzeros = codes.size();
  codes.push_back(0);  // so that the data of none is no null pointer, which stands for floats
  arrays.layer.codes = codes.data();
  if (input) {
    // 1 / scale and 255 * scale are finite.
    expect(input->first >= 0x1p-126f && input->first <= 0x1p119f, "input: the scale is 0, too small, too large or NaN");
    expect(input->second >= 0 && input->second <= 255, "input: wanted a zero point from 0 to 255");
    arrays.layer.input = {input->first, input->second};
  }
  const Kernels& kernels = kernels_for(isa);
  const WithoutGil release;
  return std::make_shared<Linear>(arrays.layer, kernels);
}

std::shared_ptr<Linear> float_linear(Matrix<uint8_t> bitmask, Vector<float> values, nb::handle scale,
                                     std::optional<Vector<float>> bias, int k, const std::string& isa) {
  expect(scale.is_none(), "scale: float weights have none");
  LayerArrays arrays(bitmask, std::nullopt, bias, k);
  const std::vector<float> floats = copy(values);
  arrays.layer.nonzeros = floats.size();
  arrays.layer.values = floats.data();
  const Kernels& kernels = kernels_for(isa);
  const WithoutGil release;
  return std::make_shared<Linear>(arrays.layer, kernels);
}

// The number of rows, if a matrix of `rows` x `columns` fits.
std::size_t rows_for(const Linear& linear, std::size_t rows, std::size_t columns) {
  expect(columns == static_cast<std::size_t>(linear.inputs()), "x: wanted one column per input");
  expect(rows < 1u << 24, "x: too many rows");
  return rows;
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> linear_forward(const Linear& linear, Matrix<float> x) {
  const std::size_t tokens = rows_for(linear, x.shape(0), x.shape(1));
  float* out;
  auto result = new_matrix<float>(tokens, linear.outputs(), &out);
  const WithoutGil release;
  linear.forward(x.data(), tokens, out);
  return result;
}

nb::ndarray<nb::numpy, int32_t, nb::ndim<2>> linear_accumulate(const Linear& linear, Matrix<uint8_t> x) {
  expect(linear.is_int8(), "accumulate is for int8 layers; this one has float weights");
  const std::size_t tokens = rows_for(linear, x.shape(0), x.shape(1));
  int32_t* out;
  auto result = new_matrix<int32_t>(tokens, linear.outputs(), &out);
  const WithoutGil release;
  linear.accumulate(x.data(), tokens, out);
  return result;
}

// Keeps a reference to the array of the rows. The destructor of the last owner acquires the GIL.
Table table(const nb::handle& source, int hidden, const char* name) {
  Table made;
  if (source.is_none()) return made;
  const std::string wanted = std::string(name) + ": wanted (int8 rows, float32 scales) or (float32 rows, None)";
  std::pair<nb::object, nb::object> pair;
  if (!nb::try_cast(source, pair, false)) throw std::invalid_argument(wanted);
  const auto fits = [&](std::size_t rows, std::size_t columns) {
    const bool right = rows >= 1 && rows < std::size_t{1} << 31 && columns == static_cast<std::size_t>(hidden);
    if (!right) throw std::invalid_argument(wanted);
    made.rows = static_cast<int>(rows);
  };
  Matrix<int8_t> codes;
  Matrix<float> values;
  Vector<float> scale;
  if (nb::try_cast(pair.first, codes, false) && nb::try_cast(pair.second, scale, false)) {
    fits(codes.shape(0), codes.shape(1));
    if (scale.shape(0) != codes.shape(0)) throw std::invalid_argument(wanted);
    made.scale = copy(scale);
    expect_scales(made.scale);
    made.codes = codes.data();
    made.owner = std::make_shared<Matrix<int8_t>>(codes);
  } else if (nb::try_cast(pair.first, values, false) && pair.second.is_none()) {
    fits(values.shape(0), values.shape(1));
    made.values = values.data();
    made.owner = std::make_shared<Matrix<float>>(values);
  } else {
    throw std::invalid_argument(wanted);
  }
  return made;
}

Norm norm(const nb::handle& source, const char* name) {
  std::pair<Vector<float>, Vector<float>> pair;
  if (!nb::try_cast(source, pair, false)) {
    throw std::invalid_argument(std::string(name) + ": wanted (gamma, beta), both float32 vectors");
  }
  return {copy(pair.first), copy(pair.second)};
}

RelativeBias relative_bias(const std::optional<Matrix<float>>& by_distance) {
  if (!by_distance) return {};
  const std::size_t heads = by_distance->shape(0), distances = by_distance->shape(1);
  expect(heads >= 1 && heads < 1u << 24 && distances % 2 == 1 && distances < 1u << 24,
         "relative_bias: wanted a row per head of 2 * length - 1 distances");
  for (std::size_t i = 0; i < by_distance->size(); ++i) {
    expect(std::isfinite(by_distance->data()[i]), "relative_bias: a value is not finite");
  }
  return RelativeBias(by_distance->data(), static_cast<int>(heads), static_cast<int>(distances / 2 + 1));
}

Activation activation(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  throw std::invalid_argument("activation is '" + name + "', wanted gelu, gelu_new, gelu_pytorch_tanh or relu");
}

Layer layer(const nb::dict& source) {
  const auto linear = [&](const char* name) {
    const nb::object value = source[name];
    std::shared_ptr<Linear> found;
    if (!nb::try_cast(value, found, false) || !found) {
      throw std::invalid_argument(std::string("layers: wanted a Linear for '") + name + "'");
    }
    return found;
  };
  return {linear("query"),
          linear("key"),
          linear("value"),
          linear("attention_output"),
          linear("intermediate"),
          linear("output"),
          norm(nb::object(source["attention_norm"]), "attention_norm"),
          norm(nb::object(source["output_norm"]), "output_norm")};
}

void make_encoder(Scheduler* self, int hidden, int heads, float epsilon, const std::string& activation_name,
                  int threads, const std::string& isa, nb::handle word, nb::handle position, nb::handle token_type,
                  nb::handle embedding_norm, const std::vector<nb::dict>& layers,
                  const std::optional<Matrix<float>>& bias) {
  expect_threads(threads);
  expect(hidden >= 1, "hidden: wanted at least 1");
  std::vector<Layer> made;
  made.reserve(layers.size());
  for (const nb::dict& one : layers) made.push_back(layer(one));
  Encoder encoder({hidden, heads, epsilon, activation(activation_name)}, table(word, hidden, "word"),
                  table(position, hidden, "position"), table(token_type, hidden, "token_type"),
                  norm(embedding_norm, "embedding_norm"), relative_bias(bias), std::move(made), kernels_for(isa));
  new (self) Scheduler(std::move(encoder), threads);
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> encoder_forward(Scheduler& encoder, Vector<int32_t> ids,
                                                           Vector<int32_t> positions, Vector<int32_t> types,
                                                           Vector<int32_t> offsets,
                                                           std::optional<Vector<int32_t>> parts, int lanes,
                                                           std::optional<int> width) {
  expect(positions.shape(0) == ids.shape(0) && types.shape(0) == ids.shape(0),
         "positions and types: wanted one per id");
  expect(ids.shape(0) < 1u << 24, "too many tokens in one call");
  expect(offsets.shape(0) >= 2, "offsets: wanted the sequences' beginnings and the end");
  expect(offsets.shape(0) <= 1u << 24, "too many sequences in one call");
  const int threads = encoder.threads();
  expect(lanes >= 1 && lanes <= threads, "lanes: wanted 1 to the number of threads");
  expect(!width || (*width >= 1 && *width <= threads / lanes), "width: wanted 1 to the number of threads / lanes");
  Batch batch = {copy(ids), copy(positions), copy(types), copy(offsets), {}};
  batch.parts = parts ? copy(*parts) : std::vector<int32_t>{0, static_cast<int32_t>(offsets.shape(0)) - 1};
  float* out;
  const std::size_t hidden = encoder.encoder().options().hidden;
  const nb::capsule owner = new_memory(ids.shape(0) * hidden, &out);
  int done;
  {
    const WithoutGil release;
    done = encoder.forward(batch, lanes, width.value_or(threads / lanes), out);
  }
  const std::size_t rows = batch.offsets[batch.parts[done]];
  return nb::ndarray<nb::numpy, float, nb::ndim<2>>(out, {rows, hidden}, owner);
}

std::vector<std::pair<std::string, std::string>> choices(const Scheduler& scheduler) {
  const Encoder& encoder = scheduler.encoder();
  std::vector<std::pair<std::string, std::string>> all;
  for (std::size_t i = 0; i < encoder.layers().size(); ++i) {
    const Layer& one = encoder.layers()[i];
    const std::pair<const char*, const Linear*> linears[] = {
        {"query", one.query.get()},   {"key", one.key.get()},
        {"value", one.value.get()},   {"attention_output", one.attention_output.get()},
        {"intermediate", one.intermediate.get()}, {"output", one.output.get()}};
    for (const auto& [name, linear] : linears) {
      all.emplace_back("layer." + std::to_string(i) + "." + name, linear->choice());
    }
  }
  return all;
}

}  // namespace

NB_MODULE(_native, m) {
  // What a daemon thread still uses when the interpreter ends is left alone.
  nb::set_leak_warnings(false);
  m.doc() = "Sparse int8 and float kernels and the encoder made of them; engine/reference.py defines their results.";
  const auto names = [](const std::vector<const Kernels*>& paths) {
    std::vector<std::string> found;
    for (const Kernels* kernels : paths) found.emplace_back(kernels->isa);
    return found;
  };
  m.def("available_isas", [names] { return names(available_kernels()); });
  m.def("built_isas", [names] { return names(built_kernels()); });
  nb::class_<Linear>(m, "Linear")
      .def(nb::new_(&int8_linear), "bitmask"_a.noconvert(), "values"_a.noconvert(), "scale"_a.noconvert(),
           "bias"_a.noconvert().none(), "k"_a, "isa"_a, "input"_a = nb::none())
      .def(nb::new_(&float_linear), "bitmask"_a.noconvert(), "values"_a.noconvert(), "scale"_a.none(),
           "bias"_a.noconvert().none(), "k"_a, "isa"_a)
      .def_prop_ro("shape", [](const Linear& l) { return std::pair(l.outputs(), l.inputs()); })
      .def_prop_ro("sparsity", &Linear::sparsity)
      .def_prop_ro("choice", &Linear::choice)
      .def("accumulate", &linear_accumulate, "x"_a.noconvert())
      .def("forward", &linear_forward, "x"_a.noconvert());
  bind_pattern(m);
  bind_ceilings(m);
  nb::class_<Scheduler>(m, "Encoder")
      .def("__init__", &make_encoder, nb::kw_only(), "hidden"_a, "heads"_a, "epsilon"_a, "activation"_a, "threads"_a,
           "isa"_a, "word"_a, "position"_a, "token_type"_a.none(), "embedding_norm"_a, "layers"_a,
           "relative_bias"_a.noconvert() = nb::none())
      .def("forward", &encoder_forward, "ids"_a.noconvert(), "positions"_a.noconvert(), "types"_a.noconvert(),
           "offsets"_a.noconvert(), "parts"_a.noconvert() = nb::none(), "lanes"_a = 1,
           "width"_a = nb::none())
      .def_prop_ro("barriers", [](const Scheduler& scheduler) { return scheduler.encoder().barriers(); })
      .def("choices", &choices);
}

}  // namespace pruneofa
