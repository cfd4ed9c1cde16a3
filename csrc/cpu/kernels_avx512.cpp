// AVX-512 (F, BW, DQ, VL: Skylake-SP and Zen 4 onwards).
#if defined(__x86_64__)

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../philox.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ESAM_ISA avx512
#define ESAM_VECTOR_BYTES 64
#include "kernels.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace esam::cpu {
const Kernels kAvx512Kernels = avx512::make_kernels("avx512");
}  // namespace esam::cpu

#endif
