// Cross-entropy of one row of logits x with target distribution q (section 2.3), by an online softmax.
//   loss = log(sum exp(x - m)) sum q - sum q (x - m),   m = max x
#pragma once

#include "numbers.h"

namespace esam::device {

ESAM_HOST_DEVICE float infinity() { return bit_cast<float>(0x7F800000u); }

// What has been seen of a row so far. The last two are kept where q is not a single class.
struct RowSums {
  float max = -infinity();
  float exponentials = 0;  // sum exp(x - max)
  float weights = 0;       // sum q
  float weighted = 0;      // sum q (x - max)
};

// Moves the sums to a larger max. Before the first finite logit there is no max that could have been subtracted.
ESAM_HOST_DEVICE void move_to(RowSums& row, float max) {
  if (max == row.max) return;
  if (row.max != -infinity()) {
    row.exponentials *= expf(row.max - max);
    row.weighted += row.weights * (row.max - max);
  }
  row.max = max;
}

// N more logits, and their q (a null `q` where that is a single class).
template <int N>
ESAM_HOST_DEVICE void add(RowSums& row, const float (&x)[N], const float* q) {
  float max = row.max;
#pragma unroll
  for (int i = 0; i < N; ++i) max = fmaxf(max, x[i]);
  move_to(row, max);
  const float shift = max == -infinity() ? 0.0f : max;
#pragma unroll
  for (int i = 0; i < N; ++i) row.exponentials += expf(x[i] - shift);
  if (q == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    row.weights += q[i];
    row.weighted = fma(q[i], x[i] - shift, row.weighted);
  }
}

ESAM_HOST_DEVICE RowSums merge(RowSums a, RowSums b) {
  const float max = fmaxf(a.max, b.max);
  move_to(a, max);
  move_to(b, max);
  return {max, a.exponentials + b.exponentials, a.weights + b.weights, a.weighted + b.weighted};
}

// What softmax is rebuilt from. Kept apart: their sum, rounded, would lose the digits of the second beside a large max.
struct Normalizer {
  float max;
  float log_sum;  // log sum exp(x - max)
};

ESAM_HOST_DEVICE Normalizer normalizer(const RowSums& row) { return {row.max, logf(row.exponentials)}; }

// The target of a row: a class and label smoothing, or probabilities (smoothed as well).
// q is (1 - smoothing) times the given distribution plus smoothing / classes.
ESAM_HOST_DEVICE float smoothed(float probability, float smoothing, int64_t classes) {
  return probability * (1 - smoothing) + smoothing / static_cast<float>(classes);
}

// -log softmax(x)_c for the logit x_c.
ESAM_HOST_DEVICE float negative_log_probability(const RowSums& row, float logit) {
  return logf(row.exponentials) + (row.max - logit);
}

// The loss of a row whose sums hold q = 1 for every class: of the class with this logit, smoothed.
ESAM_HOST_DEVICE float smoothed_class_loss(const RowSums& row, float logit, float smoothing, int64_t classes) {
  const float uniform = logf(row.exponentials) - row.weighted / static_cast<float>(classes);
  return (1 - smoothing) * negative_log_probability(row, logit) + smoothing * uniform;
}

// The loss of a row whose sums hold its q.
ESAM_HOST_DEVICE float distribution_loss(const RowSums& row) {
  return logf(row.exponentials) * row.weights - row.weighted;
}

// d loss / d x = softmax(x) sum q - q.
ESAM_HOST_DEVICE float logit_gradient(float x, const Normalizer& row, float q, float sum_of_q) {
  return expf(x - row.max - row.log_sum) * sum_of_q - q;
}

}  // namespace esam::device
