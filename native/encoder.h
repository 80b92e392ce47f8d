// The forward pass of a BERT-like encoder over concatenated sequences, without padding between them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "memory.h"
#include "pool.h"

namespace pruneofa {

// An embedding table: int8 rows with one scale each, or floats. The rows are not copied, because they are most of the
// memory of a small model.
struct Table {
  std::shared_ptr<const void> owner;  // of the rows
  const int8_t* codes = nullptr;      // [rows][hidden] or null
  const float* values = nullptr;      // [rows][hidden] or null
  std::vector<float> scale;           // [rows] with codes
  int rows = 0;
};

struct Norm {
  std::vector<float> gamma, beta;
};

// What attention adds to the score of a query and a key, by head and distance.
struct RelativeBias {
  RelativeBias() = default;
  // by_distance: [heads][2 * length - 1], of query - key from 1 - length to length - 1.
  RelativeBias(const float* by_distance, int heads, int length);
  // The value of distance 0, with kBiasMargin zeros around those of the head; null: the model has no such bias.
  const float* of_head(int head) const;

  int heads = 0;
  int length = 0;  // tokens of the longest sequence
  std::vector<float> values;
};

struct Layer {
  std::shared_ptr<const Linear> query, key, value, attention_output, intermediate, output;
  Norm attention_norm, output_norm;
};

struct EncoderOptions {
  int hidden = 0;
  int heads = 0;
  float epsilon = 0;
  Activation activation = Activation::kGelu;
};

// Token ids of concatenated sequences; sequence s has the tokens offsets[s] .. offsets[s + 1] - 1.
struct Sequences {
  const int32_t* ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* types = nullptr;
  const int32_t* offsets = nullptr;
  int tokens = 0;
  int count = 0;
};

// What a thread of a team writes and nobody else. Every linear layer that does not add to the state writes to `wide`, so
// that its output stays in the thread's cache.
struct ThreadBuffers {
  Aligned<float> state, wide;  // [panels][features of the thread][16]
  Aligned<float> scale;        // [panels][16]
  Aligned<int32_t> zero;
  Aligned<char> scratch;
};

// Threads that share a forward pass, and its memory, which only grows.
struct Team {
  int threads = 0;
  int part = 0, panels = 0;  // of the batch, in the current pass
  Barrier barrier;
  // Inputs of linear layers, codes or floats [panels][features][16]: of those that read the state, and of the others.
  // With one for both, a thread would have to wait before it writes until the others have read what was there.
  Aligned<char> of_state, of_wide;
  Aligned<float> ranges;    // [threads][panels][2][16], written by one thread, read by all
  Aligned<float> moments;   // [panels][blocks of kNormBlock features][2][16], each written by the thread of its features
  std::vector<ThreadBuffers> buffers;  // one for each thread
};

// The weights. Nothing changes after construction, so that any number of teams may use it at the same time.
class Encoder {
 public:
  // Throws std::invalid_argument when sizes do not match.
  Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm, RelativeBias bias,
          std::vector<Layer> layers, const Kernels& kernels);

  // Throws std::invalid_argument for an id out of range, offsets that do not increase from 0 to `tokens`, or a sequence
  // with distances that the bias does not have.
  void check(const Sequences& sequences) const;
  // Prepares a team of so many threads for passes of up to so many tokens.
  void reserve(Team& team, int threads, int tokens) const;
  // One thread's part of a pass over sequences that have been checked; all threads of the team call it with the same
  // arguments. out: [tokens][hidden].
  void pass(Team& team, int thread, const Sequences& sequences, float* out) const;
  // How often the threads of a team meet in a pass.
  int barriers() const;

  const EncoderOptions& options() const { return options_; }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  // The features of `total` that a thread computes, in multiples of `unit`.
  struct Part {
    int begin, end;
    int count() const { return end - begin; }
  };
  static Part part(int total, int unit, int thread, int threads);
  int head_unit() const;  // smallest number of heads whose features are a multiple of 16
  int head_size() const { return options_.hidden / options_.heads; }
  int norm_blocks() const { return (options_.hidden + kNormBlock - 1) / kNormBlock; }
  std::size_t panel_bytes(int features) const;  // size of a panel with so many features

  // A thread's features of an activation: `first` .. `first + count - 1` of `features`. Consecutive panels are `stride`
  // floats apart.
  struct Slice {
    float* data;
    int first, count, features;
    std::ptrdiff_t stride;
    bool half = false;  // see Activation::kGeluHalf
  };
  // Computes the sum of the embeddings of this thread's features, and their moments.
  void embed(Team& team, const Slice& state, const Sequences& sequences) const;
  // Attention of this thread's heads. Key and value follow `query` in memory, with the same width; the result replaces
  // the query.
  void attend(Team& team, int thread, const Slice& query, const Sequences& sequences) const;
  // Updates the ranges of this thread with x; not needed if the kernel that wrote x has done so.
  void update_ranges(Team& team, int thread, const Slice& x) const;
  // Writes x to `input`, which all threads read, as codes for `linear` if that is int8; returns its data. Two barriers:
  // one before where scales are dynamic, because they need the ranges of all threads, and one after.
  const void* publish(Team& team, int thread, const Slice& x, const Linear& linear, Aligned<char>& input) const;
  // y = linear(input), the rows of this thread.
  void multiply(Team& team, int thread, const void* input, const Linear& linear, const Slice& y,
                Activation activation = Activation::kNone, bool ranges = false) const;
  // state += linear(input), the rows of this thread, and their moments.
  void add(Team& team, int thread, const void* input, const Linear& linear, const Slice& state) const;
  // The moments of this thread's features, whose first is a multiple of kNormBlock.
  void update_moments(Team& team, const Slice& state) const;
  // LayerNorm, from the moments of all features. One barrier.
  void normalize(Team& team, int thread, const Slice& state, const Norm& norm) const;
  Operands operands(Team& team, int thread, const void* input, const Slice& y) const;
  float* ranges_of(Team& team, int thread) const;  // the part of the ranges that a thread writes
  float* moments_of(Team& team, int panel) const;  // the moments of a panel
  void clear_ranges(Team& team, int thread) const;

  EncoderOptions options_;  // not const, nor what follows: moving an encoder would copy it
  Table word_, position_, type_;
  Norm embedding_norm_;
  RelativeBias bias_;
  std::vector<Layer> layers_;
  const Kernels& kernels_;
  int widest_ = 0;  // features of the widest layer
  Activation activation_ = Activation::kNone;
  bool int8_ = false;
  bool dynamic_ = false;  // int8 with a scale per token, which needs ranges
};

}  // namespace pruneofa
