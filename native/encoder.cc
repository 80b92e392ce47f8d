#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "expect.h"

namespace pruneofa {

RelativeBias::RelativeBias(const float* by_distance, int heads, int length)
    : heads(heads), length(length), values(static_cast<std::size_t>(heads) * (2 * length - 1 + 2 * kBiasMargin)) {
  const int distances = 2 * length - 1;
  for (int h = 0; h < heads; ++h) {
    const float* from = by_distance + static_cast<std::ptrdiff_t>(h) * distances;
    float* to = values.data() + static_cast<std::ptrdiff_t>(h) * (distances + 2 * kBiasMargin) + kBiasMargin;
    std::copy(from, from + distances, to);
  }
}

const float* RelativeBias::of_head(int head) const {
  if (heads == 0) return nullptr;
  return values.data() + std::ptrdiff_t{head} * (2 * length - 1 + 2 * kBiasMargin) + kBiasMargin + length - 1;
}

Encoder::Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm,
                 RelativeBias bias, std::vector<Layer> layers, const Kernels& kernels)
    : options_(options),
      word_(std::move(word)),
      position_(std::move(position)),
      type_(std::move(type)),
      embedding_norm_(std::move(embedding_norm)),
      bias_(std::move(bias)),
      layers_(std::move(layers)),
      kernels_(kernels) {
  const int hidden = options_.hidden;
  expect(hidden > 0 && options_.heads > 0 && hidden % options_.heads == 0, "hidden must be a multiple of heads");
  expect(!layers_.empty(), "an encoder needs at least one layer");
  expect(bias_.heads == 0 || bias_.heads == options_.heads, "relative_bias: wanted one row per head");
  const auto fits = [&](const std::shared_ptr<const Linear>& linear, int inputs, int outputs) {
    return linear && linear->inputs() == inputs && linear->outputs() == outputs && &linear->kernels() == &kernels_ &&
           linear->is_int8() == layers_[0].query->is_int8() && linear->is_static() == layers_[0].query->is_static();
  };
  const auto norm_fits = [&](const Norm& norm) {
    return static_cast<int>(norm.gamma.size()) == hidden && static_cast<int>(norm.beta.size()) == hidden;
  };
  expect(norm_fits(embedding_norm_), "the embedding's norm has another width than hidden");
  widest_ = hidden;
  for (const Layer& layer : layers_) {
    expect(layer.query && layer.intermediate, "a layer lacks a linear layer");
    const int wide = layer.intermediate->outputs();
    expect(fits(layer.query, hidden, hidden) && fits(layer.key, hidden, hidden) && fits(layer.value, hidden, hidden) &&
               fits(layer.attention_output, hidden, hidden) && fits(layer.intermediate, hidden, wide) &&
               fits(layer.output, wide, hidden),
           "the linear layers of a layer do not fit each other in size, precision, static input or isa");
    expect(layer.query->input() == layer.key->input() && layer.query->input() == layer.value->input(),
           "query, key and value read the same input but have another static scale or zero point");
    expect(norm_fits(layer.attention_norm) && norm_fits(layer.output_norm), "a norm has another width than hidden");
    widest_ = std::max(widest_, wide);
  }
  int8_ = layers_[0].query->is_int8();
  dynamic_ = int8_ && !layers_[0].query->is_static();
  const bool half = dynamic_ && kernels_.encode_half && options_.activation == Activation::kGelu;
  activation_ = half ? Activation::kGeluHalf : options_.activation;
}

void Encoder::reserve(Team& team, int threads, int tokens) const {
  const int panels = round_up(tokens, kLanes) / kLanes;
  const std::size_t lanes = static_cast<std::size_t>(panels) * kLanes;
  const auto grow = [](auto& memory, std::size_t count) {
    if (memory.size() >= count) return;
    memory = {};  // freed first
    memory = std::remove_reference_t<decltype(memory)>(count);
  };
  grow(team.of_state, panels * panel_bytes(options_.hidden));
  grow(team.of_wide, panels * panel_bytes(widest_));
  grow(team.ranges, lanes * 2 * threads);
  grow(team.moments, lanes * 2 * norm_blocks());
  // The largest number of features of a thread when `total` features are divided in units.
  const auto most = [&](int total, int unit) { return round_up((total + unit - 1) / unit, threads) / threads * unit; };
  const int state = most(options_.hidden, kNormBlock), in_heads = most(options_.heads, head_unit()) * head_size();
  const int wide = std::max({state, 3 * in_heads, most(widest_, 32)});
  if (team.buffers.size() < static_cast<std::size_t>(threads)) team.buffers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    ThreadBuffers& buffers = team.buffers[t];
    grow(buffers.state, lanes * state);
    // A kernel may read, but not use, up to 16 features past the last head.
    grow(buffers.wide, lanes * wide + kLanes * kLanes);
    grow(buffers.scale, lanes);
    grow(buffers.zero, lanes);
    grow(buffers.scratch, scratch_bytes(widest_, panels * kLanes, head_size()));
  }
  team.threads = threads;
  team.barrier.set_threads(threads);
}

std::size_t Encoder::panel_bytes(int features) const {
  if (!int8_) return static_cast<std::size_t>(features) * kLanes * sizeof(float);
  return codes_bytes(features, kernels_.group_int8);
}

int Encoder::head_unit() const { return kLanes / std::gcd(kLanes, head_size()); }

Encoder::Part Encoder::part(int total, int unit, int thread, int threads) {
  const int units = (total + unit - 1) / unit;
  const auto from = [&](int t) { return std::min(static_cast<int>(int64_t{units} * t / threads) * unit, total); };
  return {from(thread), from(thread + 1)};
}

void Encoder::check(const Sequences& s) const {
  expect(s.tokens > 0 && s.count > 0 && s.offsets[0] == 0 && s.offsets[s.count] == s.tokens,
         "offsets must begin with 0 and end with the number of tokens");
  for (int i = 0; i < s.count; ++i) {
    expect(s.offsets[i] < s.offsets[i + 1], "offsets must increase");
    expect(bias_.heads == 0 || s.offsets[i + 1] - s.offsets[i] <= bias_.length,
           "a sequence is longer than the distances of relative_bias");
  }
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

void Encoder::pass(Team& team, int thread, const Sequences& sequences, float* out) const {
  ThreadBuffers& buffers = team.buffers[thread];
  const auto slice = [](Aligned<float>& data, const Part& part, int features) {
    return Slice{data.data(), part.begin, part.count(), features, std::ptrdiff_t{part.count()} * kLanes};
  };
  const int hidden = options_.hidden, size = head_size();
  const Part heads = part(options_.heads, head_unit(), thread, team.threads);
  const Slice state = slice(buffers.state, part(hidden, kNormBlock, thread, team.threads), hidden);
  Slice query = slice(buffers.wide, {heads.begin * size, heads.end * size}, hidden);
  query.stride *= 3;
  Slice key = query, value = query;
  key.data += query.count * kLanes;
  value.data += 2 * query.count * kLanes;
  kernels_.begin();
  clear_ranges(team, thread);
  embed(team, state, sequences);
  normalize(team, thread, state, embedding_norm_);
  for (const Layer& layer : layers_) {
    const void* input = publish(team, thread, state, *layer.query, team.of_state);
    multiply(team, thread, input, *layer.query, query);
    multiply(team, thread, input, *layer.key, key);
    multiply(team, thread, input, *layer.value, value);
    attend(team, thread, query, sequences);
    update_ranges(team, thread, query);
    input = publish(team, thread, query, *layer.attention_output, team.of_wide);
    add(team, thread, input, *layer.attention_output, state);
    normalize(team, thread, state, layer.attention_norm);
    const int intermediate = layer.intermediate->outputs();
    Slice wide = slice(buffers.wide, part(intermediate, 32, thread, team.threads), intermediate);
    wide.half = activation_ == Activation::kGeluHalf;
    input = publish(team, thread, state, *layer.intermediate, team.of_state);
    multiply(team, thread, input, *layer.intermediate, wide, activation_, true);
    input = publish(team, thread, wide, *layer.output, team.of_wide);
    add(team, thread, input, *layer.output, state);
    normalize(team, thread, state, layer.output_norm);
  }
  for (int token = 0; token < sequences.tokens; ++token) {
    const float* from = state.data + token / kLanes * state.stride + token % kLanes;
    float* row = out + static_cast<std::ptrdiff_t>(token) * hidden + state.first;
    for (int f = 0; f < state.count; ++f) row[f] = from[f * kLanes];
  }
  kernels_.end();
}

// After the embeddings one, of their LayerNorm; in a layer two of LayerNorm, and those of four inputs.
int Encoder::barriers() const { return 1 + static_cast<int>(layers_.size()) * (2 + 4 * (dynamic_ ? 2 : 1)); }

void Encoder::embed(Team& team, const Slice& state, const Sequences& sequences) const {
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
  for (int token = 0; token < team.panels * kLanes; ++token) {
    // Lanes past the last token repeat it, so that they hold finite values; their results are not used.
    const int source = std::min(token, sequences.tokens - 1);
    float* to = state.data + token / kLanes * state.stride + token % kLanes;
    for (int f = 0; f < state.count; f += kLanes) {
      const int count = std::min(kLanes, state.count - f);
      float sum[kLanes] = {};
      row(word_, sequences.ids[source], state.first + f, count, sum);
      row(position_, sequences.positions[source], state.first + f, count, sum);
      if (type_.rows > 0) row(type_, sequences.types[source], state.first + f, count, sum);
      for (int i = 0; i < count; ++i) to[(f + i) * kLanes] = sum[i];
    }
  }
  update_moments(team, state);
}

void Encoder::attend(Team& team, int thread, const Slice& query, const Sequences& sequences) const {
  const int size = head_size();
  for (int f = 0; f < query.count; f += size) {
    for (int s = 0; s < sequences.count; ++s) {
      Attention a;
      a.query = query.data + f * kLanes;
      a.key = a.query + query.count * kLanes;
      a.value = a.key + query.count * kLanes;
      a.stride = query.stride;
      a.size = size;
      a.scale = 1.0f / sqrtf(static_cast<float>(size));
      a.begin = sequences.offsets[s];
      a.end = sequences.offsets[s + 1];
      a.bias = bias_.of_head((query.first + f) / size);
      // With static inputs nothing is rounded here, so that codes equal those simulated in training (decision 0007).
      a.rounding = !int8_ ? Rounding::kTwoBfloat16 : dynamic_ ? Rounding::kBfloat16 : Rounding::kNone;
      a.scratch = team.buffers[thread].scratch.data();
      kernels_.attention(a);
    }
  }
}

float* Encoder::ranges_of(Team& team, int thread) const {
  return team.ranges.data() + static_cast<std::ptrdiff_t>(thread) * team.panels * 2 * kLanes;
}

float* Encoder::moments_of(Team& team, int panel) const {
  return team.moments.data() + static_cast<std::ptrdiff_t>(panel) * norm_blocks() * 2 * kLanes;
}

void Encoder::clear_ranges(Team& team, int thread) const {
  if (!dynamic_) return;
  std::fill(ranges_of(team, thread), ranges_of(team, thread) + team.panels * 2 * kLanes, 0.0f);
}

void Encoder::update_ranges(Team& team, int thread, const Slice& x) const {
  if (!dynamic_) return;
  for (int p = 0; p < team.panels; ++p) {
    kernels_.range(x.data + p * x.stride, x.count, ranges_of(team, thread) + p * 2 * kLanes);
  }
}

const void* Encoder::publish(Team& team, int thread, const Slice& x, const Linear& linear, Aligned<char>& input) const {
  // Nobody reads what is overwritten: all have met since, at the other input or at a LayerNorm.
  if (dynamic_) team.barrier.wait();
  ThreadBuffers& buffers = team.buffers[thread];
  const std::size_t bytes = panel_bytes(x.features);
  const std::ptrdiff_t stride = ranges_of(team, 1) - ranges_of(team, 0);
  for (int p = 0; p < team.panels; ++p) {
    const float* from = x.data + p * x.stride;
    char* to = input.data() + p * bytes;
    if (!int8_) {
      std::memcpy(to + x.first * kLanes * sizeof(float), from, x.count * kLanes * sizeof(float));
      continue;
    }
    float* const scale = buffers.scale.data() + p * kLanes;
    int32_t* const zero = buffers.zero.data() + p * kLanes;
    if (dynamic_) {
      kernels_.scales(team.ranges.data() + p * 2 * kLanes, team.threads, stride, scale, zero);
    } else {
      std::fill(scale, scale + kLanes, linear.input().scale);
      std::fill(zero, zero + kLanes, linear.input().zero);
    }
    const auto encode = x.half ? kernels_.encode_half : kernels_.encode;
    if (x.count > 0) encode(from, x.first, x.first + x.count, x.features, scale, zero, to);
  }
  team.barrier.wait();
  clear_ranges(team, thread);
  return input.data();
}

Operands Encoder::operands(Team& team, int thread, const void* input, const Slice& y) const {
  ThreadBuffers& buffers = team.buffers[thread];
  Operands o;
  o.x = input;
  o.scale = buffers.scale.data();
  o.zero = buffers.zero.data();
  o.panels = team.panels;
  o.y = y.data;
  o.y_stride = y.stride;
  o.first = y.first;
  o.scratch = buffers.scratch.data();
  return o;
}

void Encoder::multiply(Team& team, int thread, const void* input, const Linear& linear, const Slice& y,
                       Activation activation, bool ranges) const {
  if (y.count == 0) return;
  Operands o = operands(team, thread, input, y);
  o.activation = activation;
  if (dynamic_ && ranges) o.ranges = ranges_of(team, thread);
  linear.run(o, y.first, y.first + y.count);
}

void Encoder::add(Team& team, int thread, const void* input, const Linear& linear, const Slice& state) const {
  Operands o = operands(team, thread, input, state);
  o.add = true;
  if (state.count > 0) linear.run(o, state.first, state.first + state.count);
  update_moments(team, state);
}

void Encoder::update_moments(Team& team, const Slice& state) const {
  for (int p = 0; p < team.panels; ++p) {
    kernels_.moments(state.data + p * state.stride, state.count,
                     moments_of(team, p) + state.first / kNormBlock * 2 * kLanes);
  }
}

void Encoder::normalize(Team& team, int thread, const Slice& state, const Norm& norm) const {
  team.barrier.wait();
  for (int p = 0; p < team.panels; ++p) {
    kernels_.normalize(state.data + p * state.stride, state.count, options_.hidden, moments_of(team, p),
                       norm.gamma.data() + state.first, norm.beta.data() + state.first, options_.epsilon,
                       dynamic_ ? ranges_of(team, thread) + p * 2 * kLanes : nullptr);
  }
}

}  // namespace pruneofa
