// Per-sample cross-entropy, forward and backward: one launch each, the logits read once.
#include <algorithm>

#include "losses.cuh"

namespace esam::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 20;  // of a launch; more rows than that are taken in turn

template <typename T, bool kWeighted, int kSize>
__global__ void __launch_bounds__(kThreads)
    forward(const __grid_constant__ CrossEntropy inputs, float* losses, float* normalizer) {
  forward_rows<T, kWeighted, kSize>(inputs, losses, normalizer);
}

// Sum of q over a row of probabilities; 1 for a class.
template <int kSize>
__device__ float sum_of_weights(const CrossEntropy& inputs, int64_t row, int thread) {
  if (inputs.probability == nullptr) return 1.0f;
  RowSums sums;
  for (int64_t c = thread; c < inputs.classes; c += kSize) {
    float q[1];
    load_weights(inputs, row, c, q);
    sums.weights += q[0];
  }
  return (kSize == kWarp ? merge_over_warp(sums) : merge_over_block(sums)).weights;
}

// What a row's gradient is made of.
struct RowGradient {
  float grad_loss, sum_of_q;
  device::Normalizer normalizer;
  int64_t target;  // -1 for probabilities
};

template <typename T, int N>
__device__ Pack<T, N> gradient_pack(const CrossEntropy& inputs, int64_t row, int64_t first, const Pack<T, N>& logits,
                                    const RowGradient& values) {
  const float smoothing = inputs.smoothing;
  float q[N];
  if (values.target < 0) {
    load_weights(inputs, row, first, q);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      q[i] = device::smoothed(first + i == values.target ? 1.0f : 0.0f, smoothing, inputs.classes);
    }
  }
  Pack<T, N> gradient;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = device::widen(logits.value[i]);
    gradient.value[i] =
        device::narrow<T>(device::logit_gradient(x, values.normalizer, q[i], values.sum_of_q) * values.grad_loss);
  }
  return gradient;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ CrossEntropy inputs,
                                                     const float* grad_losses, const float* normalizer, T* gradient) {
  constexpr int kRows = kThreads / kSize;
  constexpr int N = kPackSize<T>;
  const int thread = threadIdx.x % kSize;
  const bool aligned = is_aligned<T>(inputs.logits, inputs.classes, inputs.row_stride);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kSize; row < inputs.rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    RowGradient values{grad_losses[row],
                       sum_of_weights<kSize>(inputs, row, thread),
                       {normalizer[row], normalizer[inputs.rows + row]},
                       -1};
    if (inputs.index != nullptr) {
      values.target = inputs.index[row];
      const bool ignored = values.target == inputs.ignore_index;
      if (!ignored && (values.target < 0 || values.target >= inputs.classes)) {
        values.grad_loss = device::bit_cast<float>(0x7FC00000u);  // as its loss
      }
      if (ignored) values.grad_loss = 0;
      if (values.target < 0) values.target = inputs.classes;  // no class of this row
    }
    const T* const x = static_cast<const T*>(inputs.logits) + row * inputs.row_stride;
    T* const out = gradient + row * inputs.classes;
    if (aligned) {
      for (int64_t c = thread * N; c < inputs.classes; c += kSize * N) {
        const auto logits = *reinterpret_cast<const Pack<T, N>*>(x + c);
        *reinterpret_cast<Pack<T, N>*>(out + c) = gradient_pack(inputs, row, c, logits, values);
      }
    } else {
      for (int64_t c = thread; c < inputs.classes; c += kSize) {
        out[c] = gradient_pack(inputs, row, c, Pack<T, 1>{{x[c]}}, values).value[0];
      }
    }
  }
}

int64_t blocks_for(const CrossEntropy& inputs) {
  const int64_t rows = rows_of_block(inputs);
  return std::min((inputs.rows + rows - 1) / rows, kMaxBlocks);
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& inputs, float* losses, float* normalizer, Dtype dtype,
                           cudaStream_t stream) {
  if (inputs.rows == 0) return;
  with_dtype("cross_entropy_forward", dtype, [&](auto element) {
    using T = decltype(element);
    const bool by_warp = rows_of_block(inputs) > 1;
    const auto kernel = is_weighted(inputs) ? (by_warp ? forward<T, true, kWarp> : forward<T, true, kThreads>)
                                            : (by_warp ? forward<T, false, kWarp> : forward<T, false, kThreads>);
    launch("cross_entropy_forward", kernel, blocks_for(inputs), stream, inputs, losses, normalizer);
  });
}

void cross_entropy_backward(const CrossEntropy& inputs, const float* grad_losses, const float* normalizer,
                            void* gradient, Dtype dtype, cudaStream_t stream) {
  if (inputs.rows == 0) return;
  with_dtype("cross_entropy_backward", dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = rows_of_block(inputs) > 1 ? backward<T, kWarp> : backward<T, kThreads>;
    launch("cross_entropy_backward", kernel, blocks_for(inputs), stream, inputs, grad_losses, normalizer,
           static_cast<T*>(gradient));
  });
}

}  // namespace esam::cuda
