// What the files of Python bindings share. Array arguments are never converted (noconvert), because a silent cast would
// give wrong results. The GIL is released while kernels run.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <cstddef>
#include <thread>

#include "expect.h"

namespace pruneofa {
namespace nb = nanobind;

void bind_pattern(nb::module_& m);
void bind_ceilings(nb::module_& m);

// Lets other Python threads run as long as it lives. A daemon thread that comes back after the interpreter has ended may
// not have the lock: up to Python 3.13 it is ended there by unwinding its stack, which C++ does not let pass through the
// functions that called this one. It waits instead, as from 3.14 on, until the process ends.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* const thread_;
};

template <class T, std::size_t Dimensions>
using Array = nb::ndarray<const T, nb::numpy, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = Array<T, 1>;
template <class T>
using Matrix = Array<T, 2>;

inline void expect_threads(int threads) { expect(threads >= 1 && threads <= 4096, "threads: wanted 1 to 4096"); }

}  // namespace pruneofa
