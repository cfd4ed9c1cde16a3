// Philox4x32-10 (Salmon et al., 2011), the counter-based generator behind the element masks of Eq. 5.
// The constants and the scalar form are shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ESAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ESAM_HOST_DEVICE inline
#endif

namespace esam {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85;

struct PhiloxWords {
  uint32_t word[4];
};

// The key is the 64-bit `seed`; the 128-bit counter is (counter, step), low word first.
ESAM_HOST_DEVICE PhiloxWords philox(uint64_t counter, uint64_t step, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace esam
