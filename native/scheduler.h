// Divides batches among teams of threads that do not wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "crowding.h"
#include "encoder.h"
#include "pool.h"

namespace pruneofa {

// Concatenated sequences, which a call keeps: nobody can change them after they were checked.
struct Batch {
  std::vector<int32_t> ids, positions, types;  // [tokens]
  std::vector<int32_t> offsets;                // [sequences + 1], see Sequences
  std::vector<int32_t> parts;                  // [parts + 1]: part p has the sequences parts[p] .. parts[p + 1] - 1
};

class Scheduler {
 public:
  // Starts threads - 1 threads; a process that is forked off starts its own at its first call.
  Scheduler(Encoder encoder, int threads);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Computes the parts in their order, each by a team of up to `width` threads, up to `teams` of them at a time. Teams
  // take the next part when they are done with one; when other calls wait for threads, they end. While other processes
  // keep threads from meeting, every team is one thread. out: [tokens][hidden].
  // Returns how many parts are done: at least one, and no new ones are begun after a quarter of a second, so that the
  // caller can look at signals.
  // Threads may call it at the same time; they share the threads evenly.
  // Throws std::invalid_argument as Encoder::check, and for parts that do not increase from 0 to the last sequence.
  int forward(const Batch& batch, int teams, int width, float* out);

  const Encoder& encoder() const { return encoder_; }
  int threads() const { return threads_; }

 private:
  // What a process has of its own.
  struct Workers {
    explicit Workers(int threads) : pool(threads) {}
    const uint32_t forked = forks();
    Pool pool;
    Crowding crowding;
    std::mutex mutex;  // of the next two
    std::vector<std::unique_ptr<Team>> idle;
    std::size_t made = 0;  // teams, idle or not
  };
  Workers& workers();

  const Encoder encoder_;
  const int threads_;
  std::atomic<Workers*> workers_;
};

}  // namespace pruneofa
