// Sharpness-sensitive Data Selection (section 2.3): the order of the samples, and which of them are in B+.
#pragma once

#include "numbers.h"

namespace esam::device {

// The rise of a loss as an integer in the same order. NaN comes last, -0.0 equals 0.0.
ESAM_HOST_DEVICE uint32_t ordered_key(float loss_before, float loss_after) {
  const float rise = loss_after - loss_before + 0.0f;  // -0.0 + 0.0 = 0.0
  if (rise != rise) return 0;
  const uint32_t bits = bit_cast<uint32_t>(rise);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k-th largest key: the largest threshold that at least k keys reach. `count(candidate)` says how many keys are
// `candidate` or larger; it is asked once for each bit, by all threads of a block together.
template <typename Count>
ESAM_HOST_DEVICE uint32_t kth_largest(int64_t k, const Count& count) {
  uint32_t threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = threshold | (1u << bit);
    if (count(candidate) >= k) threshold = candidate;
  }
  return threshold;
}

// Of the samples whose key is the threshold the first `k - above` belong to B+, where `above` keys are larger.
// Given how many samples before this one are larger than the threshold, and how many equal it: where a sample goes
// in the ascending indices, or -1.
ESAM_HOST_DEVICE int64_t selected_position(uint32_t key, uint32_t threshold, int64_t larger_before, int64_t ties_before,
                                           int64_t wanted_ties) {
  const int64_t ties_kept = ties_before < wanted_ties ? ties_before : wanted_ties;
  if (key > threshold) return larger_before + ties_kept;
  return key == threshold && ties_before < wanted_ties ? larger_before + ties_kept : -1;
}

}  // namespace esam::device
