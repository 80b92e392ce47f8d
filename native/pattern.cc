#include "pattern.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>

#include "expect.h"
#include "memory.h"
#include "pool.h"

namespace pruneofa {
namespace {

// Memory of a thread that only grows: for megabytes in every call the system would have to clear new pages.
template <int Purpose>
float* scratch(std::size_t count) {
  thread_local Aligned<float> memory;
  if (memory.size() < count) memory = Aligned<float>(count);
  return memory.data();
}

// The worker threads of one calling thread, so that calls never wait for each other.
struct LocalPool {
  std::unique_ptr<Pool> pool;
  int threads = 1;
  uint32_t forked = 0;
  ~LocalPool() { forget_if_forked(); }
  // In a process forked off since, they do not exist.
  void forget_if_forked() {
    if (forked != forks()) static_cast<void>(pool.release());
  }
};

// Calls work(thread, item) for the items 0 .. count - 1, on up to `threads` threads, which take the next when they are
// done with one. `work` must not throw.
void parallel_for(int threads, int count, const std::function<void(int, int)>& work) {
  if (threads == 1) {
    for (int i = 0; i < count; ++i) work(0, i);
    return;
  }
  thread_local LocalPool local;
  local.forget_if_forked();
  if (local.pool == nullptr || local.threads < threads) {
    local.pool = std::make_unique<Pool>(threads);
    local.threads = threads;
    local.forked = forks();
  }
  std::atomic<int> next{0};
  Pool::Share share(*local.pool, threads);
  share.run(threads, true, [&](int thread) {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(thread, i);
  });
}

}  // namespace

Pattern::Pattern(const bool* kept, std::size_t outputs, std::size_t inputs, const Kernels& kernels)
    : kernels_(kernels) {
  expect(outputs >= 1 && inputs >= 1 && outputs < 1 << 16 && inputs < 1 << 16,
         "a pattern needs 1 to 65535 outputs and inputs");
  rows_.row_start.assign(outputs + 1, 0);
  columns_.row_start.assign(inputs + 1, 0);
  for (std::size_t n = 0; n < outputs; ++n) {
    for (std::size_t k = 0; k < inputs; ++k) {
      if (!kept[n * inputs + k]) continue;
      rows_.index.push_back(static_cast<uint16_t>(k));
      ++columns_.row_start[k + 1];
    }
    rows_.row_start[n + 1] = static_cast<uint32_t>(rows_.index.size());
  }
  for (std::size_t k = 0; k < inputs; ++k) columns_.row_start[k + 1] += columns_.row_start[k];
  columns_.index.resize(rows_.index.size());
  transposed_position_.resize(rows_.index.size());
  std::vector<uint32_t> next(columns_.row_start.begin(), columns_.row_start.end() - 1);
  for (std::size_t n = 0; n < outputs; ++n) {
    for (uint32_t e = rows_.row_start[n]; e < rows_.row_start[n + 1]; ++e) {
      transposed_position_[e] = next[rows_.index[e]]++;
      columns_.index[transposed_position_[e]] = static_cast<uint16_t>(n);
    }
  }
  for (Lists* lists : {&rows_, &columns_}) lists->index.resize(lists->index.size() + 4 + kEntriesAhead, 0);
  rows_.entries = {static_cast<int>(outputs), static_cast<int>(inputs), rows_.row_start.data(), rows_.index.data()};
  columns_.entries = {static_cast<int>(inputs), static_cast<int>(outputs), columns_.row_start.data(),
                      columns_.index.data()};
}

void Pattern::multiply(const Lists& lists, const float* values, const float* bias, const float* x, std::size_t tokens,
                       float* y, int threads) const {
  const Entries& entries = lists.entries;
  // Fewer at a time where that gives each of several threads as many.
  const std::size_t unit = threads > 1 ? (kernels_.train_tokens + 1) / 2 : kernels_.train_tokens;
  const int units = static_cast<int>((tokens + unit - 1) / unit);
  threads = std::max(1, std::min(threads, units));
  const std::size_t size = train_scratch(entries.columns, kernels_.train_tokens);
  float* const memory = scratch<0>(size * threads);
  parallel_for(threads, units, [&](int thread, int i) {
    const std::size_t begin = i * unit, count = std::min(unit, tokens - begin);
    kernels_.multiply_entries(entries, values, bias, x + begin * entries.columns, static_cast<int>(count),
                              y + begin * entries.rows, memory + thread * size);
  });
}

void Pattern::multiply(const float* x, std::size_t tokens, const float* weight, const float* bias, float* y,
                       int threads) const {
  float* values = scratch<1>(transposed_position_.size());
  for (int n = 0; n < outputs(); ++n) {
    const float* row = weight + static_cast<std::size_t>(n) * inputs();
    for (uint32_t e = rows_.row_start[n]; e < rows_.row_start[n + 1]; ++e) values[e] = row[rows_.index[e]];
  }
  multiply(rows_, values, bias, x, tokens, y, threads);
}

void Pattern::multiply_transposed(const float* dy, std::size_t tokens, const float* weight, float* dx,
                                  int threads) const {
  float* values = scratch<1>(transposed_position_.size());
  for (int n = 0; n < outputs(); ++n) {
    const float* row = weight + static_cast<std::size_t>(n) * inputs();
    for (uint32_t e = rows_.row_start[n]; e < rows_.row_start[n + 1]; ++e) {
      values[transposed_position_[e]] = row[rows_.index[e]];
    }
  }
  multiply(columns_, values, nullptr, dy, tokens, dx, threads);
}

void Pattern::weight_gradient(const float* x, const float* dy, std::size_t tokens, float* dw, int threads) const {
  const Entries& entries = rows_.entries;
  float* const sums = scratch<1>(transposed_position_.size());
  // Every part of the rows transposes all of x, and has about as many entries as the others.
  const int parts = std::min(threads, outputs());
  const auto first_row = [&](int part) {
    const uint64_t entry = static_cast<uint64_t>(transposed_position_.size()) * part / parts;
    return static_cast<int>(std::lower_bound(rows_.row_start.begin(), rows_.row_start.end() - 1, entry) -
                            rows_.row_start.begin());
  };
  const std::size_t size = train_scratch(inputs(), kernels_.train_tokens), unit = kernels_.train_tokens;
  float* const memory = scratch<0>(size * parts);
  parallel_for(parts, parts, [&](int thread, int part) {
    const int begin = part == 0 ? 0 : first_row(part), end = part == parts - 1 ? outputs() : first_row(part + 1);
    std::fill(sums + rows_.row_start[begin], sums + rows_.row_start[end], 0.0f);
    for (std::size_t t = 0; t < tokens; t += unit) {
      kernels_.sample_entries(entries, x + t * inputs(), dy + t * outputs(),
                              static_cast<int>(std::min(unit, tokens - t)), begin, end, sums, memory + thread * size);
    }
    for (int n = begin; n < end; ++n) {
      float* row = dw + static_cast<std::size_t>(n) * inputs();
      std::fill(row, row + inputs(), 0.0f);
      for (uint32_t e = rows_.row_start[n]; e < rows_.row_start[n + 1]; ++e) row[rows_.index[e]] = sums[e];
    }
  });
}

}  // namespace pruneofa
