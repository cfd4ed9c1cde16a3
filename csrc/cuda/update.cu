// w + e -> w, alone or in one pass with the base optimizer's update: the saved w is read in place of w, so that the
// restore moves no bytes of its own.
#include "../device/optimizers.h"
#include "blocks.cuh"

namespace esam::cuda {
namespace {

// Kernels without a sum at either end leave it to the device to hand out the blocks: none waits for a slow neighbour.
constexpr int kUnlimitedPrograms = std::numeric_limits<int32_t>::max() / 2;

__device__ double learning_rate(const LearningRate& lr) {
  if (lr.float64 != nullptr) return *lr.float64;
  return lr.float32 != nullptr ? static_cast<double>(*lr.float32) : lr.value;
}

// -- Restore ---------------------------------------------------------------------------------------------------------

// T: an unsigned integer of the elements' size. Bits are copied.
template <typename T>
struct Restore {
  static constexpr const char* kName = "restore";
  enum List { kParam, kBackup };
  static constexpr int kLists = 2;
  using Element = T;
  template <int kTensors>
  using Table = cuda::Table<kLists, kTensors>;
  struct Arguments {};

  static __host__ __device__ constexpr bool reads(int list) { return list == kBackup; }
  static __host__ __device__ constexpr bool writes(int list) { return list == kParam; }
  static __host__ __device__ constexpr bool streams(int list) { return list != kParam; }
  static constexpr bool kBackwards = false;

  __device__ explicit Restore(const Arguments&) {}
  template <typename Table>
  __device__ void enter(const Table&, int) {}
  template <int N>
  __device__ void apply(Pack<T, N> (&packs)[kLists], int64_t) {
    packs[kParam] = packs[kBackup];
  }
  __device__ void leave() {}
};

template <typename T>
void launch_restore(const Tensors& tensors, cudaStream_t cuda_stream) {
  using Op = Restore<T>;
  stream_over<Op>(tensors, kUnlimitedPrograms, false, cuda_stream, [](auto&, int) { return typename Op::Arguments{}; });
}

// -- SGD -------------------------------------------------------------------------------------------------------------

template <typename T, bool kMomentum, bool kFirst>
struct RestoreSgd {
  static constexpr const char* kName = "restore_sgd";
  enum List { kParam, kBackup, kGrad, kBuffer };
  static constexpr int kLists = kMomentum ? 4 : 3;
  using Element = T;
  template <int kTensors>
  using Table = cuda::Table<kLists, kTensors>;
  using Arguments = Sgd;

  static __host__ __device__ constexpr bool reads(int list) { return list != kParam && !(kFirst && list == kBuffer); }
  static __host__ __device__ constexpr bool writes(int list) { return list == kParam || list == kBuffer; }
  static __host__ __device__ constexpr bool streams(int list) { return list != kParam; }
  static constexpr bool kBackwards = false;

  __device__ explicit RestoreSgd(const Arguments& given)
      : scalars{static_cast<float>(learning_rate(given.lr)),
                static_cast<float>(given.momentum),
                static_cast<float>(1 - given.dampening),
                static_cast<float>(given.weight_decay),
                given.nesterov,
                given.maximize} {}

  template <typename Table>
  __device__ void enter(const Table&, int) {}

  template <int N>
  __device__ void apply(Pack<T, N> (&packs)[kLists], int64_t) {
    Pack<T, N>& buffers = packs[kLists - 1];  // unused without momentum
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T buffer = buffers.value[i];
      packs[kParam].value[i] =
          device::sgd<T, kMomentum, kFirst>(packs[kBackup].value[i], packs[kGrad].value[i], buffer, scalars);
      if (kMomentum) buffers.value[i] = buffer;
    }
  }

  __device__ void leave() {}

  device::SgdScalars scalars;
};

template <typename Op>
void launch_sgd(const Tensors& tensors, const Sgd& sgd, cudaStream_t cuda_stream) {
  stream_over<Op>(tensors, kUnlimitedPrograms, false, cuda_stream, [&](auto&, int) { return sgd; });
}

// -- Adam and AdamW --------------------------------------------------------------------------------------------------

template <int kLists, int kTensors>
struct AdamTable : Table<kLists, kTensors> {
  // Of each tensor: where its step counter is, or the bits of its number of steps.
  union Step {
    const float* counter;
    float steps;
  };
  Step step[kTensors];
};

struct AdamArguments {
  Adam adam;
  bool steps_on_device;
};

template <typename T, bool kAmsgrad>
struct RestoreAdam {
  static constexpr const char* kName = "restore_adam";
  enum List { kParam, kBackup, kGrad, kMean, kSquare, kLargest };
  static constexpr int kLists = kAmsgrad ? 6 : 5;
  using Element = T;
  template <int kTensors>
  using Table = AdamTable<kLists, kTensors>;
  using Arguments = AdamArguments;

  static __host__ __device__ constexpr bool reads(int list) { return list != kParam; }
  static __host__ __device__ constexpr bool writes(int list) { return list != kBackup && list != kGrad; }
  static __host__ __device__ constexpr bool streams(int list) { return list != kParam; }
  static constexpr bool kBackwards = false;

  __device__ explicit RestoreAdam(const Arguments& given) : arguments(given), lr(learning_rate(given.adam.lr)) {
    const Adam& adam = arguments.adam;
    scalars.lerp_weight = static_cast<float>(1 - adam.beta1);
    scalars.beta2 = static_cast<float>(adam.beta2);
    scalars.one_minus_beta2 = static_cast<float>(1 - adam.beta2);
    scalars.eps = static_cast<float>(adam.eps);
    scalars.weight_decay = adam.decoupled ? 0.0f : static_cast<float>(adam.weight_decay);
    scalars.shrink = adam.decoupled ? static_cast<float>(1 - lr * adam.weight_decay) : 1.0f;
    scalars.maximize = adam.maximize;
  }

  // The tensors have mostly taken the same number of steps, so that one thread computes the powers once.
  template <typename Table>
  __device__ void enter(const Table& table, int tensor) {
    __shared__ device::AdamBias shared_bias;
    const float steps = arguments.steps_on_device ? *table.step[tensor].counter : table.step[tensor].steps;
    if (steps == known_steps) return;
    known_steps = steps;
    __syncthreads();  // the one before has been read
    if (threadIdx.x == 0) shared_bias = device::adam_bias(lr, arguments.adam.beta1, arguments.adam.beta2, steps);
    __syncthreads();
    bias = shared_bias;
  }

  template <int N>
  __device__ void apply(Pack<T, N> (&packs)[kLists], int64_t) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T unused{};
      T& largest = kAmsgrad ? packs[kLists - 1].value[i] : unused;
      packs[kParam].value[i] =
          device::adam<T, kAmsgrad>(packs[kBackup].value[i], packs[kGrad].value[i], packs[kMean].value[i],
                                    packs[kSquare].value[i], largest, scalars, bias);
    }
  }

  __device__ void leave() {}

  const Arguments& arguments;
  double lr;
  float known_steps = -1;
  device::AdamScalars scalars;
  device::AdamBias bias{};
};

template <typename Op>
void launch_adam(const Tensors& tensors, const Addresses& step_addresses, const std::vector<float>& steps,
                 const Adam& adam, cudaStream_t cuda_stream) {
  const bool on_device = !step_addresses.empty();
  stream_over<Op>(tensors, kUnlimitedPrograms, false, cuda_stream, [&](auto& table, int first) {
    for (int i = 0; i < table.num_tensors; ++i) {
      if (on_device) {
        table.step[i].counter = reinterpret_cast<const float*>(step_addresses[first + i]);
      } else {
        table.step[i].steps = steps[first + i];
      }
    }
    return AdamArguments{adam, on_device};
  });
}

template <int kTensors>
struct Counters {
  float* counter[kTensors];
  int32_t size;
};

template <int kTensors>
__global__ void __launch_bounds__(kThreads) increment(const __grid_constant__ Counters<kTensors> counters) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < counters.size) *counters.counter[i] += 1;
}

}  // namespace

void restore(const Tensors& tensors, int element_size, cudaStream_t cuda_stream) {
  switch (element_size) {
    case 2:
      return launch_restore<uint16_t>(tensors, cuda_stream);
    case 4:
      return launch_restore<uint32_t>(tensors, cuda_stream);
    case 8:
      return launch_restore<uint64_t>(tensors, cuda_stream);
    default:
      throw std::invalid_argument("restore got elements of " + std::to_string(element_size) +
                                  " bytes, and takes 2, 4 and 8: use backend=\"reference\"");
  }
}

void restore_sgd(const Tensors& tensors, const Sgd& sgd, Dtype dtype, cudaStream_t cuda_stream) {
  with_dtype("restore_sgd", dtype, [&](auto element) {
    using T = decltype(element);
    if (sgd.momentum == 0) {
      launch_sgd<RestoreSgd<T, false, false>>(tensors, sgd, cuda_stream);
    } else if (sgd.first) {
      launch_sgd<RestoreSgd<T, true, true>>(tensors, sgd, cuda_stream);
    } else {
      launch_sgd<RestoreSgd<T, true, false>>(tensors, sgd, cuda_stream);
    }
  });
}

void restore_adam(const Tensors& tensors, const Addresses& step_addresses, const std::vector<float>& steps,
                  const Adam& adam, Dtype dtype, cudaStream_t cuda_stream) {
  with_dtype("restore_adam", dtype, [&](auto element) {
    using T = decltype(element);
    if (adam.amsgrad) {
      launch_adam<RestoreAdam<T, true>>(tensors, step_addresses, steps, adam, cuda_stream);
    } else {
      launch_adam<RestoreAdam<T, false>>(tensors, step_addresses, steps, adam, cuda_stream);
    }
  });
}

void increment_steps(const Addresses& step_addresses, cudaStream_t cuda_stream) {
  const int total = static_cast<int>(step_addresses.size());
  for (int first = 0; first < total; first += kMaxTensors) {
    with_capacity(std::min(total - first, kMaxTensors), [&](auto capacity) {
      constexpr int kTensors = decltype(capacity)::value;
      Counters<kTensors> counters;
      counters.size = std::min(total - first, kTensors);
      for (int i = 0; i < counters.size; ++i) counters.counter[i] = reinterpret_cast<float*>(step_addresses[first + i]);
      launch("increment_steps", increment<kTensors>, (counters.size + kThreads - 1) / kThreads, cuda_stream, counters);
    });
  }
}

}  // namespace esam::cuda
