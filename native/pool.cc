#include "pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace pruneofa {
namespace {

// Phases last microseconds, so threads spin between them; with more threads than free CPUs they yield soon.
constexpr int kSpins = 2000;
// Workers spin this long for the next call of run() before they sleep.
constexpr int kIdleSpins = 20000;

inline void cpu_pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#endif
}

template <class Done>
void spin_until(Done done) {
  for (int i = 0; !done(); ++i) {
    if (i < kSpins) {
      cpu_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to a CPU other than the given one, if it may run on another.
void move_away_from([[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
    sched_setaffinity(0, sizeof allowed, &allowed);
  }
#endif
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work_loop(t); });
  } catch (...) {  // the system cannot start more threads
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (!workers_.empty()) {
    cpu_.store(current_cpu(), std::memory_order_relaxed);
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }
  work(0);
  spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void Pool::barrier() {
  if (workers_.empty()) return;
  const uint64_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == static_cast<int>(workers_.size())) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
  } else {
    spin_until([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
  }
}

void Pool::work_loop(int thread) {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < kIdleSpins && generation_.load(std::memory_order_acquire) == seen; ++i) cpu_pause();
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
    }
    ++seen;
    const std::function<void(int)>* work;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
      work = work_;
    }
    // The scheduler may wake two threads on one CPU and leave them there for some milliseconds, longer than a forward
    // pass. Of the CPUs in use only the caller's is known.
    const int cpu = cpu_.load(std::memory_order_relaxed);
    if (cpu >= 0 && current_cpu() == cpu) move_away_from(cpu);
    (*work)(thread);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

}  // namespace pruneofa
