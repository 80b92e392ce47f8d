// Threads that wait for each other, and worker threads that several calls share.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pruneofa {

// How often this process has been forked off since the library was loaded: a process in which the number differs from
// what an object saw when it was made does not have that object's threads, and its locks may be held by threads that
// do not exist.
uint32_t forks();

// CPU time of this thread in seconds without that of long waits; where the system does not tell it, the time that has
// passed.
double busy_seconds();

class Barrier {
 public:
  // Not while a thread waits.
  void set_threads(int threads) { threads_ = threads; }
  // Returns when all threads have called it.
  void wait();
  // How often they have; with one thread not counted.
  uint32_t passed() const { return phase_.load(std::memory_order_relaxed); }

 private:
  int threads_ = 1;
  // Each on a cache line of its own: threads spin on the one while others write the next.
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<int> cpu_{-1};  // of the last to arrive
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// `threads` threads, shared by the threads that make calls at the same time: each caller is one of them, the others are
// workers of the pool.
class Pool {
  struct Worker;

 public:
  // Starts threads - 1 workers.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // The threads of one call, given back at the end of its life.
  class Share {
   public:
    // At most `wanted` threads, at least the calling one. While others wait or run, everyone gets an equal part: waits
    // until that many are free, in the order of the calls.
    Share(Pool& pool, int wanted);
    ~Share();
    Share(const Share&) = delete;
    Share& operator=(const Share&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }
    // Calls work(thread) on the first `threads` of them, thread 0 being the caller, and returns when all are done. Once
    // per share; `work` must not throw. A worker that is done while others wait for threads is given back at once.
    // `optional`: a worker that has not begun when the caller is done, because its CPU is busy, does not begin at all.
    void run(int threads, bool optional, const std::function<void(int)>& work);

   private:
    friend class Pool;
    Pool& pool_;
    std::vector<Worker*> workers_;  // null: given back
  };

  // Whether another call waits for threads, which this one could give it by ending the work of so many early. Says so
  // only as often as that call needs.
  bool needs(int threads);

 private:
  // What the workers of one call have in common.
  struct Job {
    Share& share;
    const std::function<void(int)>& work;
    int cpu;  // of the caller; -1: not known
    std::atomic<int> running;
    std::vector<std::atomic<bool>> begun;  // by each worker, or dropped
  };
  struct Worker {
    std::thread thread;
    std::mutex mutex;          // of the next two
    std::shared_ptr<Job> job;  // to begin
    int thread_of_job = 0;
    alignas(64) std::atomic<uint32_t> turn{0};  // counts the jobs
  };

  void work_loop(Worker& worker);
  void give_back(Worker*& worker);  // with mutex_ held
  static void start(Worker& worker, std::shared_ptr<Job> job, int thread);
  void stop();

  const int threads_;
  std::atomic<bool> stop_{false};
  std::vector<std::unique_ptr<Worker>> workers_;

  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<Worker*> idle_;
  int free_;         // threads that no call has
  int callers_ = 0;  // calls that have threads or wait for them
  uint64_t next_ticket_ = 0, serving_ = 0;
  std::atomic<int> waiting_{0};
  std::atomic<int> missing_{0};  // threads that the first of the waiting calls needs beside the free ones
};

}  // namespace pruneofa
