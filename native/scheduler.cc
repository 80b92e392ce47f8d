#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "expect.h"

namespace pruneofa {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kSlice{250};

double seconds(Clock::time_point time) { return std::chrono::duration<double>(time.time_since_epoch()).count(); }

Sequences sequences_of(const Batch& batch) {
  Sequences all;
  all.ids = batch.ids.data();
  all.positions = batch.positions.data();
  all.types = batch.types.data();
  all.offsets = batch.offsets.data();
  all.tokens = static_cast<int>(batch.ids.size());
  all.count = static_cast<int>(batch.offsets.size()) - 1;
  return all;
}

// Parts of a batch with offsets of their own, which begin with 0.
struct Parts {
  explicit Parts(const Batch& batch) {
    const int count = static_cast<int>(batch.parts.size()) - 1;
    offsets.reserve(batch.offsets.size() + count);
    for (int p = 0; p < count; ++p) {
      const int first = batch.parts[p], last = batch.parts[p + 1], begin = batch.offsets[first];
      Sequences part = sequences_of(batch);
      part.ids += begin;
      part.positions += begin;
      part.types += begin;
      part.offsets = offsets.data() + offsets.size();
      part.tokens = batch.offsets[last] - begin;
      part.count = last - first;
      for (int s = first; s <= last; ++s) offsets.push_back(batch.offsets[s] - begin);
      begins.push_back(begin);
      parts.push_back(part);
      most = std::max(most, part.tokens);
    }
  }
  std::vector<int32_t> offsets, begins;
  std::vector<Sequences> parts;
  int most = 0;  // tokens
};

}  // namespace

Scheduler::Scheduler(Encoder encoder, int threads)
    : encoder_(std::move(encoder)), threads_(threads), workers_(new Workers(threads)) {}

Scheduler::~Scheduler() {
  // In a process forked off since, its threads do not exist and its locks may be held for ever: it is left alone.
  if (Workers* const own = workers_; own->forked == forks()) delete own;
}

Scheduler::Workers& Scheduler::workers() {
  Workers* now = workers_.load(std::memory_order_acquire);
  if (now->forked == forks()) return *now;
  auto made = std::make_unique<Workers>(threads_);
  // Unless another thread of this process came first.
  if (workers_.compare_exchange_strong(now, made.get(), std::memory_order_acq_rel)) return *made.release();
  return *now;
}

int Scheduler::forward(const Batch& batch, int teams, int width, float* out) {
  encoder_.check(sequences_of(batch));
  const int count = static_cast<int>(batch.parts.size()) - 1;
  bool fits = count >= 1 && batch.parts[0] == 0 && batch.parts[count] == static_cast<int>(batch.offsets.size()) - 1;
  for (int p = 0; fits && p < count; ++p) fits = batch.parts[p] < batch.parts[p + 1];
  expect(fits, "parts must increase from 0 to the number of sequences");
  const Parts parts(batch);

  Workers& workers = this->workers();
  if (workers.crowding.at(seconds(Clock::now()))) {
    teams *= width;
    width = 1;
  }
  teams = std::min(teams, count);
  Pool::Share share(workers.pool, teams * width);
  width = std::min(width, share.threads());
  teams = std::min(teams, share.threads() / width);
  struct Borrowed {  // teams go back to the idle ones whatever happens
    Workers& workers;
    std::vector<std::unique_ptr<Team>> teams;
    ~Borrowed() {
      const std::lock_guard<std::mutex> lock(workers.mutex);
      for (auto& team : teams) workers.idle.push_back(std::move(team));
    }
  } borrowed{workers, {}};
  {
    const std::lock_guard<std::mutex> lock(workers.mutex);
    borrowed.teams.reserve(teams);
    for (int t = 0; t < teams; ++t) {
      if (workers.idle.empty()) {
        workers.idle.reserve(workers.made + 1);  // so that giving them back, in a destructor, needs no memory
        workers.idle.push_back(std::make_unique<Team>());
        ++workers.made;
      }
      borrowed.teams.push_back(std::move(workers.idle.back()));
      workers.idle.pop_back();
    }
  }
  for (auto& team : borrowed.teams) encoder_.reserve(*team, width, parts.most);

  std::atomic<int> next{0};
  const Clock::time_point begin = Clock::now(), end = begin + kSlice;
  const double busy_before = busy_seconds();
  double left = 0, busy = 0;  // when thread 0 has no more parts: what it then waits for is other teams, not its own
  const auto take = [&](bool first_team) {
    if (!first_team && workers.pool.needs(width)) return count;
    if (next.load(std::memory_order_relaxed) > 0 && Clock::now() > end) return count;
    return std::min(next.fetch_add(1, std::memory_order_relaxed), count);
  };
  share.run(teams * width, width == 1, [&](int thread) {
    Team& team = *borrowed.teams[thread / width];
    const int member = thread % width;
    for (;;) {
      team.barrier.wait();  // all are done with the part before
      if (member == 0) {
        team.part = take(thread == 0);
        if (team.part < count) team.panels = round_up(parts.parts[team.part].tokens, kLanes) / kLanes;
      }
      team.barrier.wait();
      if (team.part == count) {
        if (thread == 0) {
          left = seconds(Clock::now());
          busy = busy_seconds() - busy_before;
        }
        return;
      }
      const std::ptrdiff_t first = parts.begins[team.part];
      encoder_.pass(team, member, parts.parts[team.part], out + first * encoder_.options().hidden);
    }
  });
  workers.crowding.saw(width, seconds(begin), left, busy);
  return std::min(next.load(), count);
}

}  // namespace pruneofa
