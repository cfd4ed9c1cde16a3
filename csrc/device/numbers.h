// Storage types, the float32 that they are computed in, and packs of them that move in one access.
// Everything under csrc/device also compiles as host C++: python_tests/cuda_host runs it there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace esam::device {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
ESAM_HOST_DEVICE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// -- Widening: exact -------------------------------------------------------------------------------------------------

ESAM_HOST_DEVICE float widen(float value) { return value; }

ESAM_HOST_DEVICE float widen(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

ESAM_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(bit_cast<__half>(value));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFF) << 13;
  const bool special = magnitude >= (0x7C00u << 13);  // infinities and NaNs keep the highest exponent
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>((special ? magnitude | 0x7F800000u : finite) | sign);
#endif
}

// -- Narrowing: to nearest, ties to even -----------------------------------------------------------------------------

template <typename T>
ESAM_HOST_DEVICE T narrow(float value);

template <>
ESAM_HOST_DEVICE float narrow<float>(float value) {
  return value;
}

template <>
ESAM_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return bit_cast<BFloat16>(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
ESAM_HOST_DEVICE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return bit_cast<Float16>(__float2half_rn(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t result;
  if (magnitude > 0x7F800000u) {
    return {0x7FFF};
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above
    result = 0x7C00u;
  } else if (magnitude < (113u << 23)) {  // subnormal: adding 0.5 lines the last bits up, so that the addition rounds
    result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    result = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(result | sign)};
#endif
}

// What is left of a value after torch has stored it between two of its operations.
template <typename T>
ESAM_HOST_DEVICE float round_to(float value) {
  return widen(narrow<T>(value));
}

// x y + z, rounded once. Written out wherever torch's kernels fuse; the compilers are told to fuse nothing themselves.
ESAM_HOST_DEVICE float fma(float x, float y, float z) { return fmaf(x, y, z); }

// -- Packs -----------------------------------------------------------------------------------------------------------

constexpr int kPackBytes = 16;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(T));

}  // namespace esam::device
