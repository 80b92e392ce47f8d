#include "pool.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pruneofa {
namespace {

using Clock = std::chrono::steady_clock;

// Phases last microseconds and waking a thread that sleeps about as long, so threads spin first.
constexpr std::chrono::microseconds kSpin{50};
// Threads that compute together then offer their CPU to others for a while before they sleep. A thread that is woken late
// is late at the next barrier too, where the others fall asleep in turn: one late thread would make all of them sleep at
// every barrier until the end of the pass.
constexpr std::chrono::microseconds kOffer{200};

inline void cpu_pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#endif
}

double cpu_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec time;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) {
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
#endif
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

thread_local double long_waits = 0;  // CPU time of this thread after it had spun
// Whether this thread is a worker of a pool: the affinity of a thread that calls is the caller's own.
thread_local bool is_worker = false;

// Returns as soon as `atomic` has a value other than `old`: whether this thread slept meanwhile.
template <class T>
bool wait_while(const std::atomic<T>& atomic, T old, std::chrono::microseconds offer) {
  const auto changed = [&] {
    for (int i = 0; i < 16; ++i) {
      if (atomic.load(std::memory_order_acquire) != old) return true;
      cpu_pause();
    }
    return false;
  };
  if (changed()) return false;
  const Clock::time_point spun = Clock::now() + kSpin, end = spun + offer;
  while (Clock::now() < spun) {
    if (changed()) return false;
  }
  const double begin = cpu_seconds();
  bool awake = false;
  while (!awake && Clock::now() < end) {
    std::this_thread::yield();
    awake = changed();
  }
  long_waits += cpu_seconds() - begin;
  if (!awake) atomic.wait(old, std::memory_order_acquire);
  return !awake;
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread off `cpu`, that of a thread it works with, if it is there and may run elsewhere: the scheduler often
// wakes a thread on the CPU of the one that wakes it and leaves both there for some milliseconds, longer than a pass.
void move_away_from([[maybe_unused]] int cpu) {
#if defined(__linux__)
  if (!is_worker || cpu < 0 || current_cpu() != cpu) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0) {
    sched_setaffinity(0, sizeof allowed, &allowed);
  }
#endif
}

std::atomic<uint32_t> fork_count{0};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
#endif

}  // namespace

double busy_seconds() { return cpu_seconds() - long_waits; }

uint32_t forks() { return fork_count.load(std::memory_order_relaxed); }

void Barrier::wait() {
  if (threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    cpu_.store(current_cpu(), std::memory_order_relaxed);
    phase_.store(phase + 1);  // in order with what notify_all reads: whether anyone sleeps
    phase_.notify_all();
  } else if (wait_while(phase_, phase, kOffer)) {
    move_away_from(cpu_.load(std::memory_order_relaxed));
  }
}

Pool::Pool(int threads) : threads_(threads), free_(threads) {
  try {
    idle_.reserve(threads);
    for (int t = 1; t < threads; ++t) {
      workers_.push_back(std::make_unique<Worker>());
      Worker& worker = *workers_.back();
      worker.thread = std::thread([this, &worker] { work_loop(worker); });
      idle_.push_back(&worker);
    }
  } catch (...) {  // the system cannot start more threads
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_ = true;
  for (const auto& worker : workers_) {
    if (worker->thread.joinable()) start(*worker, nullptr, 0);
  }
  for (const auto& worker : workers_) {
    if (worker->thread.joinable()) worker->thread.join();
  }
}

void Pool::start(Worker& worker, std::shared_ptr<Job> job, int thread) {
  {
    const std::lock_guard<std::mutex> lock(worker.mutex);
    worker.job = std::move(job);
    worker.thread_of_job = thread;
  }
  worker.turn.fetch_add(1);
  worker.turn.notify_one();
}

Pool::Share::Share(Pool& pool, int wanted) : pool_(pool) {
  wanted = std::clamp(wanted, 1, pool.threads_);
  workers_.reserve(wanted - 1);
  std::unique_lock<std::mutex> lock(pool.mutex_);
  const uint64_t ticket = pool.next_ticket_++;
  ++pool.callers_;
  ++pool.waiting_;
  const auto part = [&] { return std::min(wanted, std::max(1, pool.threads_ / pool.callers_)); };
  if (ticket != pool.serving_) pool.freed_.notify_all();  // the part of the first that waits is smaller now
  pool.freed_.wait(lock, [&] {
    if (ticket != pool.serving_) return false;
    const int missing = part() - pool.free_;
    pool.missing_ = missing;  // not to be read again here: `needs` lowers it at any time
    return missing <= 0;
  });
  ++pool.serving_;
  --pool.waiting_;
  pool.missing_ = 0;
  const int taken = part();
  pool.free_ -= taken;
  workers_.assign(pool.idle_.end() - (taken - 1), pool.idle_.end());
  pool.idle_.resize(pool.idle_.size() - workers_.size());
  lock.unlock();
  pool.freed_.notify_all();  // the next in the row
}

Pool::Share::~Share() {
  {
    const std::lock_guard<std::mutex> lock(pool_.mutex_);
    for (Worker*& worker : workers_) pool_.give_back(worker);
    ++pool_.free_;
    --pool_.callers_;
  }
  pool_.freed_.notify_all();
}

void Pool::Share::run(int threads, bool optional, const std::function<void(int)>& work) {
  if (threads == 1) {
    work(0);
    return;
  }
  const int workers = threads - 1;
  const std::shared_ptr<Job> job(
      new Job{*this, work, current_cpu(), {workers}, std::vector<std::atomic<bool>>(workers)});
  for (int t = 1; t < threads; ++t) start(*workers_[t - 1], job, t);
  work(0);
  if (optional) {
    for (std::atomic<bool>& begun : job->begun) {
      if (!begun.exchange(true)) job->running.fetch_sub(1);
    }
  }
  for (int left = job->running; left != 0; left = job->running) wait_while(job->running, left, kOffer);
}

void Pool::give_back(Worker*& worker) {
  if (worker == nullptr) return;
  idle_.push_back(worker);
  ++free_;
  worker = nullptr;
}

bool Pool::needs(int threads) {
  return missing_.load(std::memory_order_relaxed) > 0 && missing_.fetch_sub(threads, std::memory_order_relaxed) > 0;
}

void Pool::work_loop(Worker& worker) {
  is_worker = true;
  for (uint32_t seen = 0;;) {
    wait_while(worker.turn, seen, {});
    seen = worker.turn;
    if (stop_) return;
    std::shared_ptr<Job> job;
    int thread;
    {
      const std::lock_guard<std::mutex> lock(worker.mutex);
      job = std::move(worker.job);
      thread = worker.thread_of_job;
    }
    // It may have been dropped before this worker woke, and the next one taken in its place.
    if (job == nullptr || job->begun[thread - 1].exchange(true)) continue;
    move_away_from(job->cpu);  // of the CPUs in use only the caller's is known
    job->work(thread);
    if (waiting_ > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        give_back(job->share.workers_[thread - 1]);
      }
      freed_.notify_all();
    }
    if (job->running.fetch_sub(1) == 1) job->running.notify_one();
  }
}

}  // namespace pruneofa
