// The same function compiled for AVX2 + FMA and for any x86-64, chosen when the library is loaded:
// wheels run everywhere. Without it every fused multiply-add would be a call into libm.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FF_CPU_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FF_CPU_CLONES
#endif
