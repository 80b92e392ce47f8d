#include "ceilings.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "memory.h"
#include "pool.h"

namespace pruneofa {
namespace {

using Clock = std::chrono::steady_clock;

// The best of a few short slots: a thread that is kept off its CPU spoils one, not all. They come in groups with pauses
// between, because another process's time slice can be longer than a group; the first of a group is a warm-up too.
constexpr int kGroups = 5, kGroup = 5, kFewestSlots = 2;
constexpr std::chrono::milliseconds kSlot{1}, kPause{40}, kMost{400};

// How much `work`, which returns what it has done, does per second on all threads.
double best_rate(const Kernels& kernels, int threads, const std::function<double(int)>& work) {
  struct alignas(64) Done {
    double amount = 0;
    Clock::time_point begin, end;
  };
  Pool pool(threads);
  const Clock::time_point start = Clock::now();
  double best = 0;
  for (int slot = 0; slot < kGroups * kGroup && (slot < kFewestSlots || Clock::now() - start < kMost); ++slot) {
    if (slot > 0 && slot % kGroup == 0) std::this_thread::sleep_for(kPause);
    std::vector<Done> done(threads);
    Barrier barrier;
    barrier.set_threads(threads);
    Pool::Share(pool, threads).run(threads, false, [&](int thread) {
      Done& own = done[thread];
      kernels.begin();
      barrier.wait();
      own.begin = own.end = Clock::now();
      while (own.end - own.begin < kSlot) {
        own.amount += work(thread);
        own.end = Clock::now();
      }
      kernels.end();
    });
    // From the first one's beginning to the last one's end: threads that take turns on a CPU do not count twice.
    Done all = done[0];
    for (int t = 1; t < threads; ++t) {
      all.amount += done[t].amount;
      all.begin = std::min(all.begin, done[t].begin);
      all.end = std::max(all.end, done[t].end);
    }
    best = std::max(best, all.amount / std::chrono::duration<double>(all.end - all.begin).count());
  }
  return best;
}

// Small numbers in every 16 bits of the codes and of the int8 weights, because AVX2 multiplies those; the sums of all
// turns fit int32.
constexpr int kTurns = 4096;

void fill(CachedOperands& operands, bool int8) {
  auto* const x = reinterpret_cast<float*>(operands.x);
  for (std::size_t i = 0; i < sizeof operands.x / sizeof(float); ++i) x[i] = static_cast<float>(i % 13) / 8 - 0.75f;
  for (int s = 0; s < CachedOperands::kSteps; ++s) {
    for (int r = 0; r < CachedOperands::kWords; ++r) {
      const float weight = static_cast<float>((s + r) % 7) / 4 - 0.75f;
      static_assert(sizeof weight == sizeof operands.words[s][r]);
      memcpy(&operands.words[s][r], &weight, sizeof weight);
      if (int8) operands.words[s][r] = static_cast<uint32_t>(1 + (s * 37 + r * 11) % 127) * 0x00010001;
    }
  }
  for (std::size_t i = 0; int8 && i < sizeof operands.x; ++i) {
    reinterpret_cast<uint8_t*>(operands.x)[i] = i % 2 ? 0 : static_cast<uint8_t>(i * 29 % 256);
  }
}

}  // namespace

double arithmetic_peak(const Kernels& kernels, bool int8, int threads) {
  const Aligned<CachedOperands> operands(threads);
  for (int t = 0; t < threads; ++t) fill(operands[t], int8);
  const auto multiply = int8 ? kernels.multiply_cached_int8 : kernels.multiply_cached_float;
  return best_rate(kernels, threads,
                   [&](int thread) { return static_cast<double>(multiply(operands[thread], kTurns)); });
}

double read_bandwidth(const Kernels& kernels, std::size_t bytes, int threads) {
  // In pieces that take less than a slot, each slot beginning where the one before ended.
  constexpr std::size_t kPiece = 1 << 20;
  bytes = std::max<std::size_t>(bytes / 128, 1) * 128;
  struct alignas(64) Reader {
    std::size_t next = 0;
    alignas(64) char out[64];
  };
  const Aligned<char> data(bytes * threads);
  std::vector<Reader> readers(threads);
  return best_rate(kernels, threads, [&](int thread) {
    Reader& reader = readers[thread];
    const std::size_t piece = std::min(kPiece, bytes - reader.next);
    kernels.read_all(data.data() + bytes * thread + reader.next, piece, reader.out);
    reader.next = (reader.next + piece) % bytes;
    return static_cast<double>(piece);
  });
}

}  // namespace pruneofa
