// The functions of csrc/device one by one, over arrays, for test_device_functions.py (ctypes).
#include "device/cross_entropy.h"
#include "device/numbers.h"
#include "device/perturbation.h"
#include "device/selection.h"

using namespace esam::device;

extern "C" {

void philox_words(uint64_t first, int64_t n, uint64_t step, uint64_t seed, int64_t* words) {
  for (int64_t i = 0; i < n; ++i) {
    const esam::PhiloxWords four = esam::philox(first + i, step, seed);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four.word[j];
  }
}

void keep_one_by_one(uint64_t first, int64_t n, uint64_t step, uint64_t seed, int64_t bound, bool* kept) {
  for (int64_t i = 0; i < n; ++i) {
    bool one[1];
    element_mask(ElementMask{seed, step, bound}, first + i, one);
    kept[i] = one[0];
  }
}

void widen_bfloat16(const uint16_t* bits, int64_t n, float* values) {
  for (int64_t i = 0; i < n; ++i) values[i] = widen(BFloat16{bits[i]});
}

void widen_float16(const uint16_t* bits, int64_t n, float* values) {
  for (int64_t i = 0; i < n; ++i) values[i] = widen(Float16{bits[i]});
}

void narrow_bfloat16(const float* values, int64_t n, uint16_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[i] = narrow<BFloat16>(values[i]).bits;
}

void narrow_float16(const float* values, int64_t n, uint16_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[i] = narrow<Float16>(values[i]).bits;
}

void ordered_keys(const float* before, const float* after, int64_t n, int64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = ordered_key(before[i], after[i]);
}

int64_t kth_largest_key(const int64_t* keys, int64_t n, int64_t k) {
  return kth_largest(k, [&](uint32_t candidate) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= candidate;
    return count;
  });
}

// The sums of a row seen in pieces: n numbers, the first `split` of them by one thread and the rest by another.
void row_sums(const float* x, const float* q, int64_t n, int64_t split, float* sums) {
  RowSums parts[2];
  for (int64_t i = 0; i < n; ++i) {
    const float logit[1] = {x[i]};
    add(parts[i >= split], logit, q + i);
  }
  const RowSums row = merge(parts[0], parts[1]);
  const Normalizer values = normalizer(row);
  sums[0] = values.max;
  sums[1] = values.log_sum;
  sums[2] = row.weights;
  sums[3] = distribution_loss(row);
}

}  // extern "C"
