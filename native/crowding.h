// Whether threads that wait for each other are kept off their CPUs by others.
#pragma once

#include <algorithm>
#include <atomic>

namespace pruneofa {

// Where others want the CPUs too, every barrier waits until the last thread has had its turn, and one thread alone
// would be done sooner. Times are in seconds. Threads may call it at the same time; what one overwrites of another's
// only moves the end of a pause.
class Crowding {
 public:
  // Whether teams had better be single threads for now.
  bool at(double time) const { return time < until_.load(std::memory_order_relaxed); }

  // A team of `width` threads took from `begin` to `end`, of which its first thread computed for `busy`. One thread
  // alone would have computed for width * busy, with pauses for about twice that. Each time it comes again the pause
  // before the next try is longer.
  void saw(int width, double begin, double end, double busy) {
    if (width == 1) return;
    double pause = kShortest;
    if (end - begin > 2 * width * busy) {
      pause = pause_.load(std::memory_order_relaxed);
      until_.store(end + pause, std::memory_order_relaxed);
      pause = std::min(2 * pause, kLongest);
    }
    pause_.store(pause, std::memory_order_relaxed);
  }

 private:
  static constexpr double kShortest = 0.25, kLongest = 4;
  std::atomic<double> until_{0}, pause_{kShortest};
};

}  // namespace pruneofa
