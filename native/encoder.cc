#include "encoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace pruneofa {
namespace {

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

// Rows of a linear layer that a thread takes at a time: some for each thread, but not so few that the codes are read
// through for nothing.
int stretch(int rows, int granule, int threads) {
  const int share = (rows + 4 * threads - 1) / (4 * threads);
  return std::max(granule, std::min(round_up(share, granule), round_up(128, granule)));
}

}  // namespace

Encoder::Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm,
                 std::vector<Layer> layers, const Kernels& kernels)
    : options_(options),
      word_(std::move(word)),
      position_(std::move(position)),
      type_(std::move(type)),
      embedding_norm_(std::move(embedding_norm)),
      layers_(std::move(layers)),
      kernels_(kernels),
      pool_(options.threads) {
  const int hidden = options_.hidden;
  expect(hidden > 0 && options_.heads > 0 && hidden % options_.heads == 0, "hidden must be a multiple of heads");
  expect(!layers_.empty(), "an encoder needs at least one layer");
  const auto fits = [&](const std::shared_ptr<const Linear>& linear, int inputs, int outputs) {
    return linear && linear->inputs() == inputs && linear->outputs() == outputs && &linear->kernels() == &kernels_ &&
           linear->is_int8() == layers_[0].query->is_int8();
  };
  const auto norm_fits = [&](const Norm& norm) {
    return static_cast<int>(norm.gamma.size()) == hidden && static_cast<int>(norm.beta.size()) == hidden;
  };
  expect(norm_fits(embedding_norm_), "the embedding's norm has another width than hidden");
  widest_ = 3 * hidden;
  for (const Layer& layer : layers_) {
    expect(layer.query && layer.intermediate, "a layer lacks a linear layer");
    const int wide = layer.intermediate->outputs();
    expect(fits(layer.query, hidden, hidden) && fits(layer.key, hidden, hidden) && fits(layer.value, hidden, hidden) &&
               fits(layer.attention_output, hidden, hidden) && fits(layer.intermediate, hidden, wide) &&
               fits(layer.output, wide, hidden),
           "the linear layers of a layer do not fit each other in size, precision or isa");
    expect(norm_fits(layer.attention_norm) && norm_fits(layer.output_norm), "a norm has another width than hidden");
    widest_ = std::max(widest_, wide);
  }
  int8_ = layers_[0].query->is_int8();
}

void Encoder::reserve(int panels) {
  panels_ = panels;
  if (panels <= reserved_) return;
  const std::size_t lanes = static_cast<std::size_t>(panels) * kLanes;
  state_ = Aligned<float>(lanes * options_.hidden);
  mixed_ = Aligned<float>(lanes * options_.hidden);
  wide_ = Aligned<float>(lanes * widest_);
  scale_ = Aligned<float>(lanes);
  zero_ = Aligned<int32_t>(lanes);
  if (int8_) codes_ = Aligned<char>(static_cast<std::size_t>(panels) * codes_bytes(widest_, kernels_.group_int8));
  scratch_size_ = (scratch_bytes(widest_, panels * kLanes) + 63) / 64 * 64;
  scratch_ = Aligned<char>(scratch_size_ * pool_.threads());
  reserved_ = panels;
}

void Encoder::check(const Sequences& s) const {
  expect(s.tokens > 0 && s.count > 0 && s.offsets[0] == 0 && s.offsets[s.count] == s.tokens,
         "offsets must begin with 0 and end with the number of tokens");
  for (int i = 0; i < s.count; ++i) expect(s.offsets[i] < s.offsets[i + 1], "offsets must increase");
  const auto inside = [](const int32_t* ids, int tokens, int rows, const char* what) {
    for (int i = 0; i < tokens; ++i) {
      if (ids[i] < 0 || ids[i] >= rows) {
        throw std::invalid_argument(std::string(what) + " " + std::to_string(ids[i]) + " of token " +
                                    std::to_string(i) + " is outside 0.." + std::to_string(rows - 1));
      }
    }
  };
  inside(s.ids, s.tokens, word_.rows, "id");
  inside(s.positions, s.tokens, position_.rows, "position");
  if (type_.rows > 0) inside(s.types, s.tokens, type_.rows, "type");
}

void Encoder::forward(const Sequences& sequences, float* out) {
  check(sequences);
  const std::lock_guard<std::mutex> turn(mutex_);
  reserve(round_up(sequences.tokens, kLanes) / kLanes);
  queries_.clear();
  for (int s = 0; s < sequences.count; ++s) {
    const int begin = sequences.offsets[s], end = sequences.offsets[s + 1];
    for (int p = begin / kLanes; p <= (end - 1) / kLanes; ++p) queries_.push_back({begin, end, p});
  }
  pool_.run([&](int thread) { pass(thread, sequences, out); });
}

void Encoder::pass(int thread, const Sequences& sequences, float* out) {
  const int hidden = options_.hidden, heads = options_.heads, size = hidden / heads;
  const std::ptrdiff_t narrow = static_cast<std::ptrdiff_t>(hidden) * kLanes, wide = 3 * narrow;
  kernels_.begin();
  for (int p; (p = pool_.next()) < panels_;) embed(p, sequences);
  pool_.meet();
  for (const Layer& layer : layers_) {
    encode(state_.data(), hidden);
    multiply(thread, {layer.query.get(), layer.key.get(), layer.value.get()}, state_.data(), wide_.data(), 3 * hidden,
             Activation::kNone);
    const int tasks = static_cast<int>(queries_.size()) * heads;
    for (int task; (task = pool_.next()) < tasks;) {
      const Query& query = queries_[task / heads];
      const std::ptrdiff_t head = static_cast<std::ptrdiff_t>(task % heads) * size * kLanes;
      Attention a;
      a.query = wide_.data() + head;
      a.key = a.query + narrow;
      a.value = a.key + narrow;
      a.out = mixed_.data() + head;
      a.stride = wide;
      a.out_stride = narrow;
      a.size = size;
      a.scale = 1.0f / sqrtf(static_cast<float>(size));
      a.begin = query.begin;
      a.end = query.end;
      a.panel = query.panel;
      a.scratch = scratch(thread);
      kernels_.attention(a);
    }
    pool_.meet();
    encode(mixed_.data(), hidden);
    multiply(thread, {layer.attention_output.get()}, mixed_.data(), wide_.data(), hidden, Activation::kNone);
    const auto add_and_norm = [&](const float* y, const Norm& norm) {
      for (int p; (p = pool_.next()) < panels_;) {
        kernels_.normalize(state_.data() + p * narrow, y + p * narrow, hidden, norm.gamma.data(),
                           norm.beta.data(), options_.epsilon);
      }
      pool_.meet();
    };
    add_and_norm(wide_.data(), layer.attention_norm);
    const int intermediate = layer.intermediate->outputs();
    encode(state_.data(), hidden);
    multiply(thread, {layer.intermediate.get()}, state_.data(), wide_.data(), intermediate, options_.activation);
    encode(wide_.data(), intermediate);
    multiply(thread, {layer.output.get()}, wide_.data(), mixed_.data(), hidden, Activation::kNone);
    add_and_norm(mixed_.data(), layer.output_norm);
  }
  for (int p; (p = pool_.next()) < panels_;) {
    const int count = std::min(kLanes, sequences.tokens - p * kLanes);
    const float* state = state_.data() + p * narrow;
    for (int i = 0; i < count; ++i) {
      float* row = out + (static_cast<std::ptrdiff_t>(p) * kLanes + i) * hidden;
      for (int f = 0; f < hidden; ++f) row[f] = state[f * kLanes + i];
    }
  }
  kernels_.end();
}

void Encoder::embed(int panel, const Sequences& sequences) {
  const int hidden = options_.hidden;
  float* state = state_.data() + static_cast<std::ptrdiff_t>(panel) * hidden * kLanes;
  for (int i = 0; i < kLanes; ++i) {
    // Lanes past the last token repeat it: finite values that nothing reads.
    const int token = std::min(panel * kLanes + i, sequences.tokens - 1);
    const int id = sequences.ids[token], position = sequences.positions[token];
    for (int f = 0; f < hidden; ++f) {
      float x = word_.at(id, f, hidden) + position_.at(position, f, hidden);
      if (type_.rows > 0) x += type_.at(sequences.types[token], f, hidden);
      state[f * kLanes + i] = x;
    }
  }
  kernels_.normalize(state, nullptr, hidden, embedding_norm_.gamma.data(), embedding_norm_.beta.data(),
                     options_.epsilon);
}

void Encoder::encode(const float* x, int features) {
  if (!int8_) return;
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(features) * kLanes;
  const std::size_t bytes = codes_bytes(features, kernels_.group_int8);
  for (int p; (p = pool_.next()) < panels_;) {
    kernels_.quantize(x + p * stride, features, codes_.data() + p * bytes, scale_.data() + p * kLanes,
                      zero_.data() + p * kLanes);
  }
  pool_.meet();
}

void Encoder::multiply(int thread, std::initializer_list<const Linear*> layers, const float* x, float* y, int features,
                       Activation activation) {
  Operands o;
  o.x = int8_ ? static_cast<const void*>(codes_.data()) : x;
  o.scale = scale_.data();
  o.zero = zero_.data();
  o.panels = panels_;
  o.y_stride = static_cast<std::ptrdiff_t>(features) * kLanes;
  o.activation = activation;
  o.scratch = scratch(thread);
  const int each = (*layers.begin())->outputs();
  const int step = stretch(each * static_cast<int>(layers.size()), kernels_.granule, pool_.threads());
  const int parts = (each + step - 1) / step;
  for (int part; (part = pool_.next()) < parts * static_cast<int>(layers.size());) {
    const int which = part / parts, begin = part % parts * step;
    o.y = y + static_cast<std::ptrdiff_t>(which) * each * kLanes;
    layers.begin()[which]->run(o, begin, std::min(begin + step, each));
  }
  pool_.meet();
}

}  // namespace pruneofa
