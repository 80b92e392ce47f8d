// The forward pass of a BERT-like encoder over sequences that lie end to end, without padding between them.
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

// int8 rows with a scale each, or floats. The rows are not copied: they are most of the memory of a small model.
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

// Token ids of sequences end to end; sequence s has the tokens offsets[s] .. offsets[s + 1] - 1.
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
  // Throws std::invalid_argument when sizes do not fit each other.
  Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm,
          std::vector<Layer> layers, const Kernels& kernels);

  // out: [tokens][hidden]. Threads may call it at the same time; calls run one after the other.
  // Throws std::invalid_argument for an id out of range or offsets that do not increase from 0 to `tokens`.
  void forward(const Sequences& sequences, float* out);

  const EncoderOptions& options() const { return options_; }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  // The range of `total` features that a thread has, in multiples of `unit`.
  struct Part {
    int begin, end;
    int count() const { return end - begin; }
  };
  Part part(int total, int unit, int thread) const;
  int head_unit() const;  // heads that make a multiple of 16 features
  int head_size() const { return options_.hidden / options_.heads; }
  std::size_t panel_bytes(int features) const;  // of a panel

  void reserve(int panels);
  void check(const Sequences& sequences) const;
  void pass(int thread, const Sequences& sequences, float* out);
  // A thread's features of an activation: `first` .. `first + count - 1` of `features`, panel by panel, `stride`
  // floats apart.
  struct Slice {
    float* data;
    int first, count, features;
    std::ptrdiff_t stride;
    bool half = false;  // see Activation::kGeluHalf
  };
  // Sums of the embeddings, and the moments of this thread's features.
  void embed(int thread, const Slice& state, const Sequences& sequences);
  // From query, key and value, each as wide as `query` and one after the other; the result replaces the query.
  void attend(int thread, const Slice& query, const Sequences& sequences);
  // Updates the ranges of this thread with x; not needed where the kernel that wrote x has done so.
  void update_ranges(int thread, const Slice& x);
  // Writes x where all threads read it, as codes for `linear` where that is int8. Two barriers: before, because codes
  // need the ranges of all threads, and after.
  void publish(int thread, const Slice& x, const Linear& linear);
  // y = linear(what was published last), the rows of this thread.
  void multiply(int thread, const Linear& linear, const Slice& y, Activation activation = Activation::kNone,
                bool ranges = false);
  // state += linear(what was published last), and the moments of this thread's features.
  void add(int thread, const Linear& linear, const Slice& state);
  // LayerNorm, from the moments of all threads. One barrier.
  void normalize(int thread, const Slice& state, const Norm& norm);
  Operands operands(int thread, const Slice& y);
  float* per_thread(Aligned<float>& all, int thread);  // ranges or moments of a thread
  void clear_ranges(int thread);

  // Every linear layer but those that add to the state writes to `wide`, so that it stays in the thread's cache.
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
  int panels_ = 0;    // of this pass
  int reserved_ = 0;  // panels that the buffers hold
  Aligned<char> published_;  // what the next linear layer reads: codes, or floats [panels][features][16]
  Aligned<float> ranges_, moments_;  // [threads][panels][2][16], written by one thread, read by all
  std::vector<ThreadBuffers> buffers_;
};

}  // namespace pruneofa
