// Launching, and sums over a block of threads.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "errors.h"
#include "launchers.h"

namespace esam::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// A launch of `kernel` on `blocks` blocks of kThreads threads; a cooperative one has all of them resident at once.
// Returns the launch's error.
template <typename... Parameters, typename... Arguments>
cudaError_t try_launch(void (*kernel)(Parameters...), int64_t blocks, bool cooperative, cudaStream_t stream,
                       Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// `name`: of the operator, as Python calls it.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream,
            Arguments&&... arguments) {
  check_launch(try_launch(kernel, blocks, /*cooperative=*/false, stream, std::forward<Arguments>(arguments)...), name,
               blocks, kThreads);
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// `f` called with a value of the storage type of `dtype`. `name`: of the operator, as Python calls it.
template <typename F>
void with_dtype(const char* name, Dtype dtype, const F& f) {
  switch (dtype) {
    case kFloat32:
      return f(float());
    case kBFloat16:
      return f(device::BFloat16());
    case kFloat16:
      return f(device::Float16());
  }
  refuse_dtype(name, dtype);
}

// The same order of additions in every block and run. All threads get the sum; kThreads of them take part.
__device__ inline double block_sum(double value) {
  __shared__ double of_warp[kWarps];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  __syncthreads();  // what an earlier sum left has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

}  // namespace esam::cuda
