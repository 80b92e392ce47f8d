// Instructions of one path for the functions of one file: between PRUNEOFA_TARGET_BEGIN("avx2,fma") and
// PRUNEOFA_TARGET_END the compiler may use those that are named. No file gets a -m flag, so that no inline function of
// a header can be compiled for a CPU that the program may not run on.
#pragma once

#define PRUNEOFA_PRAGMA(text) _Pragma(#text)
#if defined(PRUNEOFA_EMULATE)  // see tests/kernels/emulated
#define PRUNEOFA_TARGET_BEGIN(instructions) \
  PRUNEOFA_PRAGMA(GCC push_options)         \
  PRUNEOFA_PRAGMA(GCC target("avx2,fma,f16c,popcnt"))
#define PRUNEOFA_TARGET_END PRUNEOFA_PRAGMA(GCC pop_options)
#elif defined(__clang__)
#define PRUNEOFA_TARGET_BEGIN(instructions) \
  PRUNEOFA_PRAGMA(clang attribute push(__attribute__((target(instructions))), apply_to = function))
#define PRUNEOFA_TARGET_END PRUNEOFA_PRAGMA(clang attribute pop)
#else
#define PRUNEOFA_TARGET_BEGIN(instructions) \
  PRUNEOFA_PRAGMA(GCC push_options)         \
  PRUNEOFA_PRAGMA(GCC target(instructions))
#define PRUNEOFA_TARGET_END PRUNEOFA_PRAGMA(GCC pop_options)
#endif
