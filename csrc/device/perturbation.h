// Stochastic Weight Perturbation (section 2.2), element by element.
#pragma once

#include "numbers.h"

namespace esam::device {

// -- ||T(w) g||^2 ----------------------------------------------------------------------------------------------------

// Within these bounds no square has overflowed, and what has been lost to underflow is below the last bit.
constexpr float kSmallestSafeSum = 0x1p-80f;
constexpr float kLargestSafeSum = 0x1p120f;

// T(w): the identity, or |w| + eta.
ESAM_HOST_DEVICE float scaling(float w, float eta) { return fabsf(w) + eta; }

// The sum of (T(w) g)^2 over a pack. float32 where that is safe, which it nearly always is: some devices have little
// float64 arithmetic.
template <typename T, int N>
ESAM_HOST_DEVICE double sum_of_squares(const Pack<T, N>& grad, const Pack<T, N>& param, bool adaptive, float eta) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float g = widen(grad.value[i]);
    if (adaptive) g = g * scaling(widen(param.value[i]), eta);
    sum = fma(g, g, sum);
  }
  if (sum > kSmallestSafeSum && sum < kLargestSafeSum) return sum;
  double exact = 0;
  for (int i = 0; i < N; ++i) {
    double g = widen(grad.value[i]);
    if (adaptive) g *= fabs(static_cast<double>(widen(param.value[i]))) + eta;
    exact += g * g;
  }
  return exact;
}

// -- w + e -----------------------------------------------------------------------------------------------------------

// Where the norm is 0 or not finite, e = 0.
ESAM_HOST_DEVICE bool is_usable(double norm) { return norm > 0 && norm <= 1.7976931348623157e308; }

// `random_state` of the operator: (seed, step, bound).
struct ElementMask {
  uint64_t seed;
  uint64_t step;
  int64_t bound;

  // A bound below 0 keeps nothing.
  ESAM_HOST_DEVICE bool keeps(uint32_t word) const { return static_cast<int64_t>(word) <= bound; }
};

// The counter that an element's word belongs to: rounded down for negative numbers too, as the reference divides.
ESAM_HOST_DEVICE uint64_t counter_of(uint64_t element) {
  return static_cast<uint64_t>(static_cast<int64_t>(element) >> 2);
}

// Which of the N elements from number `first` of the whole model on are perturbed. N is 1, or `first` and N are
// multiples of 4.
template <int N>
ESAM_HOST_DEVICE void element_mask(const ElementMask& mask, uint64_t first, bool (&kept)[N]) {
  if constexpr (N == 1) {
    const PhiloxWords words = philox(counter_of(first), mask.step, mask.seed);
    const uint32_t low = first % 2 == 0 ? words.word[0] : words.word[1];
    const uint32_t high = first % 2 == 0 ? words.word[2] : words.word[3];
    kept[0] = mask.keeps(first % 4 < 2 ? low : high);
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const PhiloxWords words = philox(counter_of(first) + i, mask.step, mask.seed);
#pragma unroll
      for (int j = 0; j < 4; ++j) kept[4 * i + j] = mask.keeps(words.word[j]);
    }
  }
}

// w + factor T(w)^2 g, rounded after each operation as the reference does it.
template <typename T>
ESAM_HOST_DEVICE T perturbed(T param, T grad, float factor, bool adaptive, float eta) {
  const float w = widen(param);
  float direction = widen(grad);
  if (adaptive) {
    const float t = scaling(w, eta);
    direction = direction * (t * t);
  }
  return narrow<T>(w + factor * direction);
}

}  // namespace esam::device
