// The forward pass of a BERT-like encoder over concatenated sequences, without padding between them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
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

struct Layer {
  std::shared_ptr<const Linear> query, key, value, attention_output, intermediate, output;
  Norm attention_norm, output_norm;
};

struct EncoderOptions {
  int hidden = 0;
  int heads = 0;
  float epsilon = 0;
  Activation activation = Activation::kGelu;
  int threads = 1;
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

class Encoder {
 public:
  // Throws std::invalid_argument when sizes do not match.
  Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm,
          std::vector<Layer> layers, const Kernels& kernels);

  // out: [tokens][hidden]. Threads may call it at the same time; calls run one after the other.
  // Throws std::invalid_argument for an id out of range or offsets that do not increase from 0 to `tokens`.
  void forward(const Sequences& sequences, float* out);

  const EncoderOptions& options() const { return options_; }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  // The features of `total` that a thread computes, in multiples of `unit`.
  struct Part {
    int begin, end;
    int count() const { return end - begin; }
  };
  Part part(int total, int unit, int thread) const;
  int head_unit() const;  // smallest number of heads whose features are a multiple of 16
  int head_size() const { return options_.hidden / options_.heads; }
  int norm_blocks() const { return (options_.hidden + kNormBlock - 1) / kNormBlock; }
  std::size_t panel_bytes(int features) const;  // size of a panel with so many features

  void reserve(int panels);
  void check(const Sequences& sequences) const;
  void pass(int thread, const Sequences& sequences, float* out);
  // A thread's features of an activation: `first` .. `first + count - 1` of `features`. Consecutive panels are `stride`
  // floats apart.
  struct Slice {
    float* data;
    int first, count, features;
    std::ptrdiff_t stride;
    bool half = false;  // see Activation::kGeluHalf
  };
  // Computes the sum of the embeddings of this thread's features, and their moments.
  void embed(const Slice& state, const Sequences& sequences);
  // Attention of this thread's heads. Key and value follow `query` in memory, with the same width; the result replaces
  // the query.
  void attend(int thread, const Slice& query, const Sequences& sequences);
  // Updates the ranges of this thread with x; not needed if the kernel that wrote x has done so.
  void update_ranges(int thread, const Slice& x);
  // Writes x to the buffer that all threads read, as codes for `linear` if that is int8. Has two barriers: one before,
  // because codes need the ranges of all threads, and one after.
  void publish(int thread, const Slice& x, const Linear& linear);
  // y = linear(published_), the rows of this thread.
  void multiply(int thread, const Linear& linear, const Slice& y, Activation activation = Activation::kNone,
                bool ranges = false);
  // state += linear(published_), the rows of this thread, and their moments.
  void add(int thread, const Linear& linear, const Slice& state);
  // The moments of this thread's features, whose first is a multiple of kNormBlock.
  void update_moments(const Slice& state);
  // LayerNorm, from the moments of all features. One barrier.
  void normalize(int thread, const Slice& state, const Norm& norm);
  Operands operands(int thread, const Slice& y);
  float* ranges_of(int thread);  // the part of ranges_ that a thread writes
  float* moments_of(int panel);  // the moments of a panel
  void clear_ranges(int thread);

  // Every linear layer that does not add to the state writes to `wide`, so that its output stays in the thread's cache.
  struct ThreadBuffers {
    Aligned<float> state, wide;  // [panels][features of the thread][16]
    Aligned<float> scale;        // [panels][16]
    Aligned<int32_t> zero;
    Aligned<char> scratch;
  };

  const EncoderOptions options_;
  const Table word_, position_, type_;
  const Norm embedding_norm_;
  const std::vector<Layer> layers_;
  const Kernels& kernels_;
  int widest_ = 0;  // features of the widest layer
  Activation activation_ = Activation::kNone;
  bool int8_ = false;
  bool dynamic_ = false;  // int8 with a scale per token, which needs ranges

  std::mutex mutex_;
  Pool pool_;
  int panels_ = 0;    // panels of the current pass
  int reserved_ = 0;  // capacity of the buffers in panels
  Aligned<char> published_;  // input of the next linear layer: codes, or floats [panels][features][16]
  Aligned<float> ranges_;   // [threads][panels][2][16], written by one thread, read by all
  Aligned<float> moments_;  // [panels][blocks of kNormBlock features][2][16], each written by the thread of its features
  std::vector<ThreadBuffers> buffers_;
};

}  // namespace pruneofa
