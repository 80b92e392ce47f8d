#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace pruneofa {
namespace {

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
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
  reserved_ = 0;  // until all of it is there
  const std::size_t lanes = static_cast<std::size_t>(panels) * kLanes, threads = pool_.threads();
  // A kernel may read, but not use, up to 16 features past the last head.
  const std::size_t slack = kLanes * kLanes;
  state_ = Aligned<float>(lanes * options_.hidden);
  mixed_ = Aligned<float>(lanes * options_.hidden + slack);
  wide_ = Aligned<float>(lanes * widest_ + slack);
  if (int8_) codes_ = Aligned<char>(static_cast<std::size_t>(panels) * codes_bytes(widest_, kernels_.group_int8));
  ranges_ = Aligned<float>(threads * lanes * 2);
  sums_ = Aligned<float>(threads * lanes * 2);
  own_.clear();
  for (std::size_t t = 0; t < threads; ++t) {
    own_.push_back({Aligned<float>(lanes), Aligned<int32_t>(lanes),
                    Aligned<char>(scratch_bytes(widest_, panels * kLanes, options_.hidden / options_.heads))});
  }
  reserved_ = panels;
}

Encoder::Part Encoder::part(int total, int unit, int thread) const {
  const int units = (total + unit - 1) / unit, threads = pool_.threads();
  const auto from = [&](int t) { return std::min(static_cast<int>(int64_t{units} * t / threads) * unit, total); };
  return {from(thread), from(thread + 1)};
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
  pool_.run([&](int thread) { pass(thread, sequences, out); });
}

void Encoder::pass(int thread, const Sequences& sequences, float* out) {
  const int hidden = options_.hidden, size = hidden / options_.heads;
  const Part mine = part(hidden, 32, thread);
  // Whole heads, and a multiple of 16 features of them.
  const Part heads = part(options_.heads, kLanes / std::gcd(kLanes, size), thread);
  const Part mixed = {heads.begin * size, heads.end * size};
  kernels_.begin();
  clear_ranges(thread);
  embed(mine, sequences);
  add_and_normalize(thread, nullptr, embedding_norm_, mine);
  for (const Layer& layer : layers_) {
    encode(thread, state_.data(), hidden, mine);
    multiply(thread, *layer.query, state_.data(), wide_.data(), 3 * hidden, 0, mixed);
    multiply(thread, *layer.key, state_.data(), wide_.data(), 3 * hidden, hidden, mixed);
    multiply(thread, *layer.value, state_.data(), wide_.data(), 3 * hidden, 2 * hidden, mixed);
    attend(thread, heads, sequences);
    look(thread, mixed_.data(), hidden, mixed);
    encode(thread, mixed_.data(), hidden, mixed);
    multiply(thread, *layer.attention_output, mixed_.data(), wide_.data(), hidden, 0, mine);
    add_and_normalize(thread, wide_.data(), layer.attention_norm, mine);
    const int intermediate = layer.intermediate->outputs();
    const Part rows = part(intermediate, 32, thread);
    encode(thread, state_.data(), hidden, mine);
    multiply(thread, *layer.intermediate, state_.data(), wide_.data(), intermediate, 0, rows, options_.activation,
             true);
    encode(thread, wide_.data(), intermediate, rows);
    multiply(thread, *layer.output, wide_.data(), mixed_.data(), hidden, 0, mine);
    add_and_normalize(thread, mixed_.data(), layer.output_norm, mine);
  }
  for (int token = 0; token < sequences.tokens; ++token) {
    const float* state = state_.data() + static_cast<std::ptrdiff_t>(token / kLanes) * hidden * kLanes + token % kLanes;
    float* row = out + static_cast<std::ptrdiff_t>(token) * hidden;
    for (int f = mine.begin; f < mine.end; ++f) row[f] = state[f * kLanes];
  }
  kernels_.end();
}

void Encoder::embed(Part features, const Sequences& sequences) {
  const int hidden = options_.hidden;
  const auto row = [&](const Table& table, int id, int begin, int count, float* sum) {
    const std::size_t place = static_cast<std::size_t>(id) * hidden + begin;
    if (table.codes == nullptr) {
      for (int i = 0; i < count; ++i) sum[i] += table.values[place + i];
    } else {
      const float scale = table.scale[id];
      for (int i = 0; i < count; ++i) sum[i] += static_cast<float>(table.codes[place + i]) * scale;
    }
  };
  for (int token = 0; token < panels_ * kLanes; ++token) {
    // Lanes past the last token repeat it: finite values that nothing reads.
    const int source = std::min(token, sequences.tokens - 1);
    float* state = state_.data() + static_cast<std::ptrdiff_t>(token / kLanes) * hidden * kLanes + token % kLanes;
    for (int f = features.begin; f < features.end; f += kLanes) {
      const int count = std::min(kLanes, features.end - f);
      float sum[kLanes] = {};
      row(word_, sequences.ids[source], f, count, sum);
      row(position_, sequences.positions[source], f, count, sum);
      if (type_.rows > 0) row(type_, sequences.types[source], f, count, sum);
      for (int i = 0; i < count; ++i) state[(f + i) * kLanes] = sum[i];
    }
  }
}

void Encoder::attend(int thread, Part heads, const Sequences& sequences) {
  const int hidden = options_.hidden, size = hidden / options_.heads;
  const std::ptrdiff_t narrow = static_cast<std::ptrdiff_t>(hidden) * kLanes;
  for (int head = heads.begin; head < heads.end; ++head) {
    for (int s = 0; s < sequences.count; ++s) {
      Attention a;
      a.query = wide_.data() + static_cast<std::ptrdiff_t>(head) * size * kLanes;
      a.key = a.query + narrow;
      a.value = a.key + narrow;
      a.out = mixed_.data() + static_cast<std::ptrdiff_t>(head) * size * kLanes;
      a.stride = 3 * narrow;
      a.out_stride = narrow;
      a.size = size;
      a.scale = 1.0f / sqrtf(static_cast<float>(size));
      a.begin = sequences.offsets[s];
      a.end = sequences.offsets[s + 1];
      a.scratch = own_[thread].scratch.data();
      kernels_.attention(a);
    }
  }
}

void Encoder::clear_ranges(int thread) {
  float* ranges = ranges_.data() + static_cast<std::ptrdiff_t>(thread) * reserved_ * 2 * kLanes;
  std::fill(ranges, ranges + panels_ * 2 * kLanes, 0.0f);
}

void Encoder::look(int thread, const float* x, int features, Part mine) {
  if (!int8_) return;
  for (int p = 0; p < panels_; ++p) {
    kernels_.range(x + static_cast<std::ptrdiff_t>(p) * features * kLanes, mine.begin, mine.end,
                   ranges_.data() + (static_cast<std::ptrdiff_t>(thread) * reserved_ + p) * 2 * kLanes);
  }
}

void Encoder::encode(int thread, const float* x, int features, Part mine) {
  pool_.meet();
  if (!int8_) return;
  Own& own = own_[thread];
  const std::size_t bytes = codes_bytes(features, kernels_.group_int8);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(reserved_) * 2 * kLanes;
  for (int p = 0; p < panels_; ++p) {
    kernels_.scales(ranges_.data() + p * 2 * kLanes, pool_.threads(), stride, own.scale.data() + p * kLanes,
                    own.zero.data() + p * kLanes);
    if (mine.begin < mine.end) {
      kernels_.encode(x + static_cast<std::ptrdiff_t>(p) * features * kLanes, mine.begin, mine.end, features,
                      own.scale.data() + p * kLanes, own.zero.data() + p * kLanes, codes_.data() + p * bytes);
    }
  }
  pool_.meet();
  clear_ranges(thread);
}

void Encoder::multiply(int thread, const Linear& linear, const float* x, float* y, int features, int at, Part rows,
                       Activation activation, bool ranges) {
  if (rows.begin == rows.end) return;
  Own& own = own_[thread];
  Operands o;
  o.x = int8_ ? static_cast<const void*>(codes_.data()) : x;
  o.scale = own.scale.data();
  o.zero = own.zero.data();
  o.panels = panels_;
  o.y = y + static_cast<std::ptrdiff_t>(at) * kLanes;
  o.y_stride = static_cast<std::ptrdiff_t>(features) * kLanes;
  o.activation = activation;
  if (int8_ && ranges) o.ranges = ranges_.data() + static_cast<std::ptrdiff_t>(thread) * reserved_ * 2 * kLanes;
  o.scratch = own.scratch.data();
  linear.run(o, rows.begin, rows.end);
}

void Encoder::add_and_normalize(int thread, const float* y, const Norm& norm, Part mine) {
  const std::ptrdiff_t narrow = static_cast<std::ptrdiff_t>(options_.hidden) * kLanes;
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(reserved_) * 2 * kLanes;
  float* const sums = sums_.data() + thread * stride;
  float* const ranges = ranges_.data() + thread * stride;
  for (int p = 0; p < panels_; ++p) {
    kernels_.add(state_.data() + p * narrow, y ? y + p * narrow : nullptr, mine.begin, mine.end, sums + p * 2 * kLanes);
  }
  pool_.meet();
  for (int p = 0; p < panels_; ++p) {
    kernels_.normalize(state_.data() + p * narrow, mine.begin, mine.end, options_.hidden, sums_.data() + p * 2 * kLanes,
                       pool_.threads(), stride, norm.gamma.data(), norm.beta.data(), options_.epsilon,
                       int8_ ? ranges + p * 2 * kLanes : nullptr);
  }
}

}  // namespace pruneofa
