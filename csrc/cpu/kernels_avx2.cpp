// AVX2 and FMA (Haswell and Zen onwards).
#if defined(__x86_64__)

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../philox.h"

#include <immintrin.h>

#pragma GCC target("avx2,fma")
#define ESAM_ISA avx2
#define ESAM_VECTOR_BYTES 32
#include "kernels.inl"

namespace esam::cpu {
const Kernels kAvx2Kernels = avx2::make_kernels("avx2");
}  // namespace esam::cpu

#endif
