// A pool of threads that run one function together, with barriers between its phases.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pruneofa {

class Pool {
 public:
  // The calling thread is one of `threads`.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(thread) on every thread, thread 0 being the caller, and returns when all are done. `work` must not
  // throw.
  void run(const std::function<void(int)>& work);

  // Called by all threads inside `work`: returns when all of them have called it.
  void barrier();

 private:
  void work_loop(int thread);
  void stop();

  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::atomic<int> cpu_{-1};  // of the caller; -1: not known
  // Each has its own cache line, because threads spin on one while others write the next.
  alignas(64) std::atomic<uint64_t> generation_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> phase_{0};
};

}  // namespace pruneofa
