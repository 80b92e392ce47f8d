// Calls from several threads share a pool; what its threads did between barriers, and which work they took, is checked.
// Built by test_pool.py.
#include "crowding.h"
#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

using pruneofa::Barrier;
using pruneofa::Pool;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// `wanted` threads in one team, which pass `rounds` barriers.
void call(Pool& pool, int wanted, int rounds) {
  Pool::Share share(pool, wanted);
  const int threads = share.threads();
  expect(threads >= 1 && threads <= wanted, "a share has more threads than wanted, or none");
  Barrier barrier;
  barrier.set_threads(threads);
  std::vector<int> done(threads * 16);  // written without atomics: the barrier makes it safe
  share.run(threads, false, [&](int thread) {
    for (int round = 0; round < rounds; ++round) {
      done[thread * 16] = round;
      barrier.wait();
      for (int other = 0; other < threads; ++other) expect(done[other * 16] == round, "a thread ran past a barrier");
      barrier.wait();
    }
  });
}

// Threads that take numbers until none is left; a worker that comes too late takes none.
void take(Pool& pool, int wanted, int numbers) {
  Pool::Share share(pool, wanted);
  std::atomic<int> next{0}, sum{0};
  share.run(share.threads(), true, [&](int) {
    for (int mine; (mine = next++) < numbers;) sum += mine;
  });
  expect(sum == numbers * (numbers - 1) / 2, "a number was taken twice or not at all");
}

void check_crowding() {
  pruneofa::Crowding crowding;
  crowding.saw(2, 0.0, 1.0, 0.9);
  crowding.saw(1, 0.0, 1.0, 0.01);
  expect(!crowding.at(1.0), "threads that computed were held for crowded, or a single one");
  crowding.saw(2, 0.0, 1.0, 0.2);
  expect(crowding.at(1.2) && !crowding.at(1.3), "wanted a quarter of a second after the first time");
  crowding.saw(2, 2.0, 3.0, 0.2);
  expect(crowding.at(3.4) && !crowding.at(3.6), "wanted twice as long after the second");
  for (int i = 0; i < 20; ++i) crowding.saw(4, 2.0, 3.0, 0.1);
  expect(crowding.at(6.9) && !crowding.at(7.1), "wanted four seconds at most");
  crowding.saw(2, 8.0, 9.0, 1.0);
  crowding.saw(2, 8.0, 9.0, 0.1);
  expect(crowding.at(9.2) && !crowding.at(9.3), "wanted a quarter of a second again");
}

}  // namespace

int main(int, char** arguments) {
  check_crowding();
  const int threads = std::atoi(arguments[1]), callers = std::atoi(arguments[2]), calls = std::atoi(arguments[3]);
  Pool pool(threads);
  std::vector<std::thread> all;
  for (int c = 0; c < callers; ++c) {
    all.emplace_back([&, c] {
      for (int i = 0; i < calls; ++i) {
        call(pool, 1 + (c + i) % (threads + 1), 5);
        take(pool, 1 + i % (threads + 1), 3);
        // So that the next call often comes while another one has all threads, which it took when it was alone.
        std::this_thread::sleep_for(std::chrono::microseconds((c * 131 + i * 17) % 97));
      }
    });
  }
  std::atomic<bool> over{false};
  std::thread asking([&] {  // at any moment, and for more threads than a waiting call may have
    while (!over) pool.needs(threads);
  });
  for (std::thread& one : all) one.join();
  over = true;
  asking.join();
  Pool::Share share(pool, threads);
  expect(share.threads() == threads, "threads were not given back");
  std::puts("done");
}
