// What the paths for ARM name in PRUNEOFA_TARGET_BEGIN. GCC inlines its intrinsics into functions of ARMv8.2 only; to
// Clang that would mean to take from them what else the CPU has that it compiles for.
#pragma once

#include "target.h"

#if defined(__clang__)
#define PRUNEOFA_DOTPROD "dotprod"
#define PRUNEOFA_I8MM "dotprod,i8mm"
#else
#define PRUNEOFA_DOTPROD "arch=armv8.2-a+dotprod"
#define PRUNEOFA_I8MM "arch=armv8.2-a+dotprod+i8mm"
#endif
