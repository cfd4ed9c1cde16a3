// AVX2 and FMA (Haswell and Zen onwards).
#if defined(__x86_64__)

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../philox.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ESAM_ISA avx2
#define ESAM_VECTOR_BYTES 32
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace esam::cpu {
const Kernels kAvx2Kernels = avx2::make_kernels("avx2");
}  // namespace esam::cpu

#endif
