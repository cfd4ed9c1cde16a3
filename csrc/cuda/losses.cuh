// Losses of rows of logits, a row for each warp or for each block of threads. Used by the kernels of cross_entropy.cu,
// and by the one that goes on to select and gather.
#pragma once

#include "../device/cross_entropy.h"
#include "launch.cuh"

namespace esam::cuda {

using device::kPackSize;
using device::Pack;
using device::RowSums;

// Up to here a row is a few accesses of a warp; above, a block of threads reads it.
constexpr int64_t kMaxClassesOfWarp = 2048;

__device__ inline RowSums merge_over_warp(RowSums row) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const RowSums other{__shfl_xor_sync(kAllLanes, row.max, lane), __shfl_xor_sync(kAllLanes, row.exponentials, lane),
                        __shfl_xor_sync(kAllLanes, row.weights, lane), __shfl_xor_sync(kAllLanes, row.weighted, lane)};
    row = device::merge(row, other);
  }
  return row;
}

__device__ inline RowSums merge_over_block(RowSums row) {
  __shared__ float of_warp[4][kWarps];
  row = merge_over_warp(row);
  __syncthreads();  // what an earlier row left has been read
  if (threadIdx.x % kWarp == 0) {
    const int warp = threadIdx.x / kWarp;
    of_warp[0][warp] = row.max;
    of_warp[1][warp] = row.exponentials;
    of_warp[2][warp] = row.weights;
    of_warp[3][warp] = row.weighted;
  }
  __syncthreads();
  RowSums sum{of_warp[0][0], of_warp[1][0], of_warp[2][0], of_warp[3][0]};
  for (int warp = 1; warp < kWarps; ++warp) {
    sum = device::merge(sum, {of_warp[0][warp], of_warp[1][warp], of_warp[2][warp], of_warp[3][warp]});
  }
  return sum;
}

// Whether every row can be read in 128-bit accesses.
template <typename T>
__device__ bool is_aligned(const void* data, int64_t classes, int64_t row_stride) {
  const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(row_stride) * sizeof(T) |
                        static_cast<uint64_t>(classes) * sizeof(T);
  return bits % device::kPackBytes == 0;
}

// q of the classes `first` .. `first + N`, as far as the sums need it: 1 where a single class is smoothed.
template <int N>
__device__ void load_weights(const CrossEntropy& inputs, int64_t row, int64_t first, float (&q)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    q[i] = inputs.probability == nullptr ? 1.0f
                                         : device::smoothed(inputs.probability[row * inputs.classes + first + i],
                                                            inputs.smoothing, inputs.classes);
  }
}

// The sums of a row, by kSize threads that count from `thread`. kWeighted: q is not a single class without smoothing.
template <typename T, bool kWeighted, int kSize>
__device__ RowSums row_sums(const CrossEntropy& inputs, int64_t row, int thread) {
  const T* const x = static_cast<const T*>(inputs.logits) + row * inputs.row_stride;
  RowSums sums;
  if (is_aligned<T>(inputs.logits, inputs.classes, inputs.row_stride)) {
    constexpr int N = kPackSize<T>;
    for (int64_t c = thread * N; c < inputs.classes; c += kSize * N) {
      const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(x + c);
      float logits[N], q[N];
#pragma unroll
      for (int i = 0; i < N; ++i) logits[i] = device::widen(pack.value[i]);
      if (kWeighted) load_weights(inputs, row, c, q);
      device::add(sums, logits, kWeighted ? q : nullptr);
    }
  } else {
    for (int64_t c = thread; c < inputs.classes; c += kSize) {
      const float logit[1] = {device::widen(x[c])};
      float q[1];
      if (kWeighted) load_weights(inputs, row, c, q);
      device::add(sums, logit, kWeighted ? q : nullptr);
    }
  }
  return kSize == kWarp ? merge_over_warp(sums) : merge_over_block(sums);
}

// A class out of range has no loss: NaN says so, without a wait.
template <typename T, bool kWeighted>
__device__ float row_loss(const CrossEntropy& inputs, int64_t row, const RowSums& sums) {
  if (inputs.probability != nullptr) return device::distribution_loss(sums);
  const int64_t target = inputs.index[row];
  if (target == inputs.ignore_index) return 0.0f;
  if (target < 0 || target >= inputs.classes) return device::bit_cast<float>(0x7FC00000u);
  const T* const x = static_cast<const T*>(inputs.logits) + row * inputs.row_stride;
  const float logit = device::widen(x[target]);
  return kWeighted ? device::smoothed_class_loss(sums, logit, inputs.smoothing, inputs.classes)
                   : device::negative_log_probability(sums, logit);
}

// All rows, shared out between the grid's blocks of threads.
template <typename T, bool kWeighted, int kSize>
__device__ void forward_rows(const CrossEntropy& inputs, float* losses, float* normalizer) {
  constexpr int kRows = kThreads / kSize;
  const int thread = threadIdx.x % kSize;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kSize; row < inputs.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const RowSums sums = row_sums<T, kWeighted, kSize>(inputs, row, thread);
    if (thread != 0) continue;
    losses[row] = row_loss<T, kWeighted>(inputs, row, sums);
    if (normalizer == nullptr) continue;
    const device::Normalizer values = device::normalizer(sums);
    normalizer[row] = values.max;
    normalizer[inputs.rows + row] = values.log_sum;
  }
}

inline bool is_weighted(const CrossEntropy& inputs) { return inputs.probability != nullptr || inputs.smoothing != 0; }

inline int64_t rows_of_block(const CrossEntropy& inputs) {
  return inputs.classes <= kMaxClassesOfWarp ? kThreads / kWarp : 1;
}

}  // namespace esam::cuda
