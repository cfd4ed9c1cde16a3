// What every 64-bit processor of the platform has.

#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ESAM_ISA portable
#define ESAM_VECTOR_BYTES 16
#include "kernels.inl"

namespace esam::cpu {
const Kernels kPortableKernels = portable::make_kernels("portable");
}  // namespace esam::cpu
