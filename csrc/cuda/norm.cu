// Partial sums of ||T(w) g||^2: one pass over the gradients, one slot of float64 for each block of threads.
#include "../device/perturbation.h"
#include "blocks.cuh"

namespace esam::cuda {
namespace {

template <int kLists, int kTensors>
struct NormTable : Table<kLists, kTensors> {
  bool adaptive[kTensors];
};

template <typename T, bool kAnyAdaptive>
struct Norm {
  static constexpr const char* kName = "norm_partials";
  enum List { kGrad, kParam };
  static constexpr int kLists = kAnyAdaptive ? 2 : 1;
  using Element = T;
  template <int kTensors>
  using Table = NormTable<kLists, kTensors>;
  struct Arguments {
    double* partials;
    float eta;
    bool accumulate;
  };

  static __host__ __device__ constexpr bool reads(int) { return true; }
  static __host__ __device__ constexpr bool writes(int) { return false; }
  static __host__ __device__ constexpr bool streams(int) { return false; }
  static constexpr bool kBackwards = false;

  __device__ explicit Norm(const Arguments& given) : arguments(given) {}

  template <typename Table>
  __device__ void enter(const Table& table, int tensor) {
    adaptive = kAnyAdaptive && table.adaptive[tensor];
  }

  template <int N>
  __device__ void apply(Pack<T, N> (&packs)[kLists], int64_t) {
    sum += device::sum_of_squares(packs[kGrad], packs[kLists - 1], adaptive, arguments.eta);
  }

  __device__ void leave() {
    const double total = block_sum(sum);
    double* const partials = arguments.partials;
    if (threadIdx.x == 0) partials[blockIdx.x] = arguments.accumulate ? partials[blockIdx.x] + total : total;
    if (blockIdx.x == 0 && !arguments.accumulate) {
      for (int slot = gridDim.x + threadIdx.x; slot < kNumPartials; slot += kThreads) partials[slot] = 0;
    }
  }

  Arguments arguments;
  bool adaptive = false;
  double sum = 0;
};

template <typename Op>
void launch_norm(const Tensors& tensors, const std::vector<bool>& adaptive, double eta, double* partials,
                 bool accumulate, cudaStream_t cuda_stream) {
  stream_over<Op>(tensors, kMaxPrograms, !accumulate, cuda_stream, [&](auto& table, int first) {
    for (int i = 0; i < table.num_tensors; ++i) table.adaptive[i] = adaptive[first + i];
    return typename Op::Arguments{partials, static_cast<float>(eta), accumulate || first > 0};
  });
}

}  // namespace

void norm_partials(const Tensors& tensors, const std::vector<bool>& adaptive, double eta, double* partials,
                   bool accumulate, Dtype dtype, cudaStream_t cuda_stream) {
  const bool any_adaptive = std::find(adaptive.begin(), adaptive.end(), true) != adaptive.end();
  with_dtype("norm_partials", dtype, [&](auto element) {
    using T = decltype(element);
    if (any_adaptive) {
      launch_norm<Norm<T, true>>(tensors, adaptive, eta, partials, accumulate, cuda_stream);
    } else {
      launch_norm<Norm<T, false>>(tensors, adaptive, eta, partials, accumulate, cuda_stream);
    }
  });
}

}  // namespace esam::cuda
