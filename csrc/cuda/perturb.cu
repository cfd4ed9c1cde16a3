// w <- w + e (Eq. 4 and 5), keeping the old w: one pass over the weights and gradients.
#include "../device/perturbation.h"
#include "blocks.cuh"

namespace esam::cuda {
namespace {

template <int kTensors>
struct PerturbTable : Table<3, kTensors> {
  int64_t offset[kTensors];
  int32_t group[kTensors];
  bool adaptive[kTensors];
};

template <typename T, bool kMasked>
struct Perturb {
  static constexpr const char* kName = "perturb";
  enum List { kParam, kGrad, kBackup };
  static constexpr int kLists = 3;
  using Element = T;
  template <int kTensors>
  using Table = PerturbTable<kTensors>;
  using Arguments = Perturbation;

  static __host__ __device__ constexpr bool reads(int list) { return list != kBackup; }
  static __host__ __device__ constexpr bool writes(int list) { return list != kGrad; }
  static __host__ __device__ constexpr bool streams(int list) { return list != kParam; }
  static constexpr bool kBackwards = true;  // what the norm has read last is still in the cache

  // Every block of threads adds the partials up, in the same order, and divides once for each group.
  __device__ explicit Perturb(const Arguments& arguments) : eta(static_cast<float>(arguments.eta)) {
    __shared__ float factor_of_group[kMaxGroups];
    double sum = 0;
    for (int slot = threadIdx.x; slot < kNumPartials; slot += kThreads) sum += arguments.partials[slot];
    const double norm = arguments.norm_factor * sqrt(block_sum(sum));
    usable = device::is_usable(norm);
    for (int group = threadIdx.x; group < arguments.num_groups; group += kThreads) {
      factor_of_group[group] = static_cast<float>(arguments.scale[group] / (norm + arguments.eps));
    }
    __syncthreads();
    factors = factor_of_group;
    if (kMasked) {
      mask = {static_cast<uint64_t>(arguments.random_state[0]), static_cast<uint64_t>(arguments.random_state[1]),
              arguments.random_state[2]};
    }
  }

  template <typename Table>
  __device__ void enter(const Table& table, int tensor) {
    factor = factors[table.group[tensor]];
    adaptive = table.adaptive[tensor];
    offset = static_cast<uint64_t>(table.offset[tensor]);
  }

  template <int N>
  __device__ void apply(Pack<T, N> (&packs)[kLists], int64_t first) {
    bool kept[N];
    if (kMasked) device::element_mask(mask, offset + first, kept);
    packs[kBackup] = packs[kParam];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T moved = device::perturbed(packs[kParam].value[i], packs[kGrad].value[i], factor, adaptive, eta);
      if (usable && (!kMasked || kept[i])) packs[kParam].value[i] = moved;
    }
  }

  __device__ void leave() {}

  const float* factors;
  device::ElementMask mask;
  uint64_t offset;
  float factor, eta;
  bool usable, adaptive;
};

template <typename Op>
void launch_perturb(const Tensors& tensors, const std::vector<int64_t>& groups, const std::vector<int64_t>& offsets,
                    const std::vector<bool>& adaptive, const Perturbation& perturbation, cudaStream_t cuda_stream) {
  stream_over<Op>(tensors, kMaxPrograms, false, cuda_stream, [&](auto& table, int first) {
    for (int i = 0; i < table.num_tensors; ++i) {
      table.offset[i] = offsets[first + i];
      table.group[i] = static_cast<int32_t>(groups[first + i]);
      table.adaptive[i] = adaptive[first + i];
    }
    return perturbation;
  });
}

}  // namespace

void perturb(const Tensors& tensors, const std::vector<int64_t>& groups, const std::vector<int64_t>& offsets,
             const std::vector<bool>& adaptive, const Perturbation& perturbation, Dtype dtype,
             cudaStream_t cuda_stream) {
  check_at_most("perturb", "parameter groups", perturbation.num_groups, kMaxGroups);
  with_dtype("perturb", dtype, [&](auto element) {
    using T = decltype(element);
    if (perturbation.random_state != nullptr) {
      launch_perturb<Perturb<T, true>>(tensors, groups, offsets, adaptive, perturbation, cuda_stream);
    } else {
      launch_perturb<Perturb<T, false>>(tensors, groups, offsets, adaptive, perturbation, cuda_stream);
    }
  });
}

}  // namespace esam::cuda
