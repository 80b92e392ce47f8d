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

// int8 rows with a scale each, or floats.
struct Table {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<float> values;
  int rows = 0;

  float at(int row, int column, int width) const {
    const std::size_t place = static_cast<std::size_t>(row) * width + column;
    return codes.empty() ? values[place] : static_cast<float>(codes[place]) * scale[row];
  }
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
  Encoder(EncoderOptions options, Table word, Table position, Table type, Norm embedding_norm, std::vector<Layer> layers,
          const Kernels& kernels);

  // out: [tokens][hidden]. Threads may call it at the same time; they take turns.
  // Throws std::invalid_argument for an id out of range or offsets that do not increase from 0 to `tokens`.
  void forward(const Sequences& sequences, float* out);

  const EncoderOptions& options() const { return options_; }
  const std::vector<Layer>& layers() const { return layers_; }

 private:
  struct Query {
    int begin, end, panel;
  };

  void reserve(int panels);
  void check(const Sequences& sequences) const;
  void pass(int thread, const Sequences& sequences, float* out);
  void embed(int panel, const Sequences& sequences);
  // One phase: y = layers(x), the outputs of the layers one after the other.
  void multiply(int thread, std::initializer_list<const Linear*> layers, const float* x, float* y, int features,
                Activation activation);
  void encode(const float* x, int features);
  void* scratch(int thread) const { return scratch_.data() + thread * scratch_size_; }

  const EncoderOptions options_;
  const Table word_, position_, type_;
  const Norm embedding_norm_;
  const std::vector<Layer> layers_;
  const Kernels& kernels_;
  int widest_ = 0;  // features of the widest layer
  bool int8_ = false;

  std::mutex mutex_;
  Pool pool_;
  int panels_ = 0;    // of this pass
  int reserved_ = 0;  // panels that the buffers hold
  std::vector<Query> queries_;
  Aligned<float> state_, wide_, mixed_, scale_;  // [panels][features][16]
  Aligned<int32_t> zero_;
  Aligned<char> codes_, scratch_;
  std::size_t scratch_size_ = 0;
};

}  // namespace pruneofa
