// As much of CUDA as csrc/cuda uses, on the CPU: every thread of a block is a
// fiber, which runs until it has to wait for the others. Slow and in order, but
// the source is the one that a GPU will run: indices, tails, masks, barriers
// and shared memory are exercised as they are. What it cannot show: races that
// need two threads at the very same time, memory ordering, and time.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__                                                             \
  static // one block at a time runs between two waits for the grid

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kWarp = 32;

// -- What a test may set
// ---------------------------------------------------------------------------------------------

inline bool reversed = false; // fibers run from the last to the first
inline bool cooperative_launches = true; // whether the device has them
inline int multiprocessors = 3;
inline int usable_multiprocessors =
    3; // fewer than it says: MPS, green contexts
inline int device = 0;
inline int devices = 4;
inline int launches = 0;
inline std::vector<size_t> argument_bytes; // of each launch

// -- Fibers
// ----------------------------------------------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t exchanged[kWarp];
};

struct Block {
  unsigned index;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block *block;
  unsigned thread;
  const int *waits_for = nullptr; // a generation, and the one that it was
  int generation = 0;
  bool waits_for_grid = false, finished = false;
};

inline ucontext_t scheduler;
inline Fiber *current = nullptr;
inline Barrier grid_barrier;
inline unsigned grid_size = 0, block_size = 0;
inline const std::function<void()> *body = nullptr;
inline std::vector<std::unique_ptr<char[]>> free_stacks;

[[noreturn]] inline void fail(const char *what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

inline void wait(Barrier &barrier, bool for_grid = false) {
  Fiber *const self = current;
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    if (!for_grid)
      return;
  }
  self->waits_for = &barrier.generation;
  self->generation = generation;
  self->waits_for_grid = for_grid;
  swapcontext(&self->context, &scheduler);
  self->waits_for = nullptr;
  self->waits_for_grid = false;
}

inline void run_fiber() {
  (*body)();
  current->finished = true;
  swapcontext(&current->context, &scheduler);
}

inline std::unique_ptr<Fiber> new_fiber(Block &block, unsigned thread) {
  auto fiber = std::make_unique<Fiber>();
  fiber->block = &block;
  fiber->thread = thread;
  if (free_stacks.empty()) {
    fiber->stack.reset(new char[kStackBytes]);
  } else {
    fiber->stack = std::move(free_stacks.back());
    free_stacks.pop_back();
  }
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = &scheduler;
  makecontext(&fiber->context, run_fiber, 0);
  return fiber;
}

// Runs the fibers of a block until all are finished or wait for the grid.
// Returns whether any ran.
inline bool run_block(std::vector<std::unique_ptr<Fiber>> &fibers) {
  bool any = false, progress = true;
  while (progress) {
    progress = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber &fiber = *fibers[reversed ? fibers.size() - 1 - i : i];
      const bool waits =
          fiber.waits_for != nullptr && *fiber.waits_for == fiber.generation;
      if (fiber.finished || waits)
        continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      progress = any = true;
    }
  }
  for (const auto &fiber : fibers) {
    if (!fiber->finished && !fiber->waits_for_grid)
      fail("threads of a block wait for others that have left");
  }
  return any;
}

inline void run_grid(unsigned blocks, unsigned threads, bool cooperative,
                     const std::function<void()> &kernel) {
  ++launches;
  grid_size = blocks;
  block_size = threads;
  body = &kernel;
  grid_barrier = {static_cast<int>(blocks * threads)};
  const unsigned together = cooperative ? blocks : 1;
  for (unsigned first = 0; first < blocks; first += together) {
    std::vector<Block> running(together);
    std::vector<std::vector<std::unique_ptr<Fiber>>> fibers(together);
    for (unsigned b = 0; b < together; ++b) {
      running[b].index = first + b;
      running[b].barrier.expected = static_cast<int>(threads);
      running[b].warps.resize((threads + kWarp - 1) / kWarp);
      for (Warp &warp : running[b].warps)
        warp.barrier.expected = kWarp;
      for (unsigned t = 0; t < threads; ++t)
        fibers[b].push_back(new_fiber(running[b], t));
    }
    for (bool any = true; any;) {
      any = false;
      for (auto &of_block : fibers)
        any |= run_block(of_block);
    }
    for (auto &of_block : fibers) {
      for (auto &fiber : of_block) {
        if (!fiber->finished)
          fail("threads wait for a grid that has left");
        free_stacks.push_back(std::move(fiber->stack));
      }
    }
  }
}

template <typename T> T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp &warp = current->block->warps[current->thread / kWarp];
  std::memcpy(&warp.exchanged[current->thread % kWarp], &value, sizeof(T));
  wait(warp.barrier);
  std::memcpy(&value, &warp.exchanged[from % kWarp], sizeof(T));
  wait(warp.barrier);
  return value;
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return current->thread; }
  } x;
};

struct BlockIndex {
  struct {
    operator unsigned() const { return current->block->index; }
  } x;
};

struct GridSize {
  struct {
    operator unsigned() const { return grid_size; }
  } x;
};

} // namespace emulator

inline emulator::ThreadIndex threadIdx;
inline emulator::BlockIndex blockIdx;
inline emulator::GridSize gridDim;

inline void __syncthreads() {
  emulator::wait(emulator::current->block->barrier);
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulator::exchange(
      value, (emulator::current->thread % emulator::kWarp) ^ lanes);
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned ballot = 0;
  emulator::Warp &warp =
      emulator::current->block
          ->warps[emulator::current->thread / emulator::kWarp];
  warp.exchanged[emulator::current->thread % emulator::kWarp] = predicate;
  emulator::wait(warp.barrier);
  for (int lane = 0; lane < emulator::kWarp; ++lane)
    ballot |= static_cast<unsigned>(warp.exchanged[lane] & 1) << lane;
  emulator::wait(warp.barrier);
  return ballot;
}

template <typename T> T __ldcs(const T *address) { return *address; }

template <typename T> void __stcs(T *address, T value) { *address = value; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// -- The runtime
// -----------------------------------------------------------------------------------------------------

using cudaStream_t = void *;
enum cudaError_t { // with CUDA's numbers
  cudaSuccess = 0,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMultiProcessorCount
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

namespace emulator {
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t next_error =
    cudaSuccess; // of the next launch, which then runs nothing
} // namespace emulator

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config,
                               void (*kernel)(Parameters...),
                               Arguments &&...arguments) {
  const bool cooperative = config->numAttrs > 0;
  if (emulator::next_error != cudaSuccess) {
    return emulator::last_error =
               std::exchange(emulator::next_error, cudaSuccess);
  }
  if (cooperative &&
      config->gridDim.x >
          static_cast<unsigned>(emulator::usable_multiprocessors)) {
    return emulator::last_error = cudaErrorCooperativeLaunchTooLarge;
  }
  emulator::argument_bytes.push_back((0 + ... + sizeof(Parameters)));
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  const std::function<void()> body = [&] { std::apply(kernel, held); };
  emulator::run_grid(config->gridDim.x, config->blockDim.x, cooperative, body);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulator::last_error, cudaSuccess);
}

inline const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
  case cudaErrorInvalidDevice:
    return "cudaErrorInvalidDevice";
  case cudaErrorNoKernelImageForDevice:
    return "cudaErrorNoKernelImageForDevice";
  case cudaErrorIllegalAddress:
    return "cudaErrorIllegalAddress";
  default:
    return "cudaErrorOther";
  }
}

inline const char *cudaGetErrorString(cudaError_t) {
  return "CUDA's own words";
}

inline cudaError_t cudaGetDevice(int *device) {
  *device = emulator::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::devices)
    return cudaErrorInvalidDevice;
  emulator::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute,
                                          int) {
  *value = attribute == cudaDevAttrCooperativeLaunch
               ? emulator::cooperative_launches
               : emulator::multiprocessors;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Kernel,
                                                          int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
