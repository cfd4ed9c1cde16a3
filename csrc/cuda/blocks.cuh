// One launch that walks over many tensors: the table of their addresses travels as the kernel's own argument (32,764
// bytes at most, since CUDA 12.1), so that nothing has to be uploaded, cached, or kept alive for a CUDA graph. A launch
// copies the whole argument, however many tensors there are: tables come in three sizes.
//
// Each tensor is cut into blocks of 8 KiB a list. A whole block whose addresses are all 16-byte aligned is read and
// written in 128-bit accesses; everything else (tails, views such as t[1:]) element by element, exactly to its end.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "../device/numbers.h"
#include "launch.cuh"

namespace esam::cuda {

using device::kPackSize;
using device::Pack;

constexpr int kMaxTensors = 448;   // of a table: the largest, Adam's, then fits into a kernel's arguments
constexpr int kFewTensors = 64;    // a ResNet-18 has 62
constexpr int kSomeTensors = 192;  // a ResNet-50 has 161, BERT-base 199 without its pooler and heads
constexpr int kPacks = 2;  // 128-bit accesses in flight for each list and thread: 32 KiB a multiprocessor and up
constexpr size_t kMaxArgumentBytes = 32764;

// Blocks of threads of kernels that begin with a sum over all partials, or end with one slot of it: about eight a
// multiprocessor on H100 and B200.
constexpr int kMaxPrograms = kNumPartials;

template <typename T>
constexpr int kBlock = kThreads * kPacks * kPackSize<T>;

template <int kLists, int kTensors>
struct Table {
  static constexpr int kCapacity = kTensors;

  void* address[kLists][kTensors];
  int64_t numel[kTensors];
  int32_t first_block[kTensors + 1];
  int32_t num_tensors;
  bool aligned[kTensors];  // all addresses, to 16 bytes

  __device__ int num_blocks() const { return first_block[num_tensors]; }

  __device__ int tensor_of(int block) const {
    int low = 0, high = num_tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// An access whose lines leave the caches first. T: a pack.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 16, uint4,
                                std::conditional_t<sizeof(T) == 8, unsigned long long,
                                                   std::conditional_t<sizeof(T) == 4, unsigned int, unsigned short>>>;

template <typename T>
__device__ T load_streaming(const T* address) {
  return device::bit_cast<T>(__ldcs(reinterpret_cast<const Word<T>*>(address)));
}

template <typename T>
__device__ void store_streaming(T* address, const T& value) {
  __stcs(reinterpret_cast<Word<T>*>(address), device::bit_cast<Word<T>>(value));
}

// What an operation of the streaming kernel has:
//   kName: the operator's, as Python calls it. Element: the storage type. kLists; reads(list), writes(list): what it
//   does with each. streams(list): nothing reads that list again before a whole forward pass: its lines leave the
//   caches first. kBackwards: whether it walks from the last block to the first. Table<kTensors>, Arguments: what the
//   kernel is given. an __device__ constructor from Arguments, executed by all threads of a block together;
//   enter(table, tensor): before the blocks of a tensor, by all threads together;
//   apply(pack, first): changes the packs in place, of the elements from number `first` of the tensor on;
//   leave(): at the end, by all threads together.
template <typename Op, int N, typename Table>
__device__ void read(const Table& table, int tensor, int64_t first,
                     Pack<typename Op::Element, N> (&packs)[Op::kLists]) {
  using P = Pack<typename Op::Element, N>;
#pragma unroll
  for (int list = 0; list < Op::kLists; ++list) {
    if (!Op::reads(list)) continue;
    const auto* const data = static_cast<const typename Op::Element*>(table.address[list][tensor]);
    const P* const address = reinterpret_cast<const P*>(data + first);
    packs[list] = Op::streams(list) ? load_streaming(address) : *address;
  }
}

template <typename Op, int N, typename Table>
__device__ void write(const Table& table, int tensor, int64_t first,
                      const Pack<typename Op::Element, N> (&packs)[Op::kLists]) {
  using P = Pack<typename Op::Element, N>;
#pragma unroll
  for (int list = 0; list < Op::kLists; ++list) {
    if (!Op::writes(list)) continue;
    auto* const data = static_cast<typename Op::Element*>(table.address[list][tensor]);
    P* const address = reinterpret_cast<P*>(data + first);
    if (Op::streams(list)) {
      store_streaming(address, packs[list]);
    } else {
      *address = packs[list];
    }
  }
}

template <typename Op, int kTensors>
__global__ void __launch_bounds__(kThreads) stream(const __grid_constant__ typename Op::template Table<kTensors> table,
                                                   const __grid_constant__ typename Op::Arguments arguments) {
  using T = typename Op::Element;
  constexpr int N = kPackSize<T>;
  Op op(arguments);
  for (int visited = blockIdx.x; visited < table.num_blocks(); visited += gridDim.x) {
    const int block = Op::kBackwards ? table.num_blocks() - 1 - visited : visited;
    const int tensor = table.tensor_of(block);
    const int64_t start = static_cast<int64_t>(block - table.first_block[tensor]) * kBlock<T>;
    const int64_t left = table.numel[tensor] - start;
    op.enter(table, tensor);
    if (left >= kBlock<T> && table.aligned[tensor]) {
      Pack<T, N> packs[kPacks][Op::kLists];
      const int64_t first = start + threadIdx.x * N;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) read<Op, N>(table, tensor, first + i * kThreads * N, packs[i]);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        op.apply(packs[i], first + i * kThreads * N);
        write<Op, N>(table, tensor, first + i * kThreads * N, packs[i]);
      }
    } else {
      const int64_t end = start + (left < kBlock<T> ? left : kBlock<T>);
      for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
        Pack<T, 1> pack[Op::kLists];
        read<Op, 1>(table, tensor, i, pack);
        op.apply(pack, i);
        write<Op, 1>(table, tensor, i, pack);
      }
    }
  }
  op.leave();
}

// `f` called with the smallest capacity, as a constant, that holds `tensors`.
template <typename F>
void with_capacity(int tensors, const F& f) {
  if (tensors <= kFewTensors) return f(std::integral_constant<int, kFewTensors>());
  if (tensors <= kSomeTensors) return f(std::integral_constant<int, kSomeTensors>());
  return f(std::integral_constant<int, kMaxTensors>());
}

// What a table holds of the tensors from number `first` on, and how many blocks these are.
template <typename Op, typename Table>
int64_t fill(Table& table, const Tensors& tensors, int first) {
  constexpr int64_t block = kBlock<typename Op::Element>;
  int64_t blocks = 0;
  for (int i = 0; i < table.num_tensors; ++i) {
    uint64_t bits = 0;
    for (int list = 0; list < Op::kLists; ++list) {
      const int64_t address = tensors.lists[list][first + i];
      table.address[list][i] = reinterpret_cast<void*>(address);
      bits |= static_cast<uint64_t>(address);
    }
    table.aligned[i] = bits % device::kPackBytes == 0;
    table.numel[i] = tensors.numels[first + i];
    table.first_block[i] = static_cast<int32_t>(blocks);
    blocks += (table.numel[i] + block - 1) / block;
    check_at_most(Op::kName, "blocks of 8 KiB", blocks, std::numeric_limits<int32_t>::max() / 2);
  }
  table.first_block[table.num_tensors] = static_cast<int32_t>(blocks);
  return blocks;
}

// Launches Op over all tensors, kMaxTensors at a time. `finish(table, first)` fills in what a table holds beside the
// addresses, for the tensors from number `first` on, and returns the Arguments.
template <typename Op, typename Finish>
void stream_over(const Tensors& tensors, int max_programs, bool even_if_empty, cudaStream_t cuda_stream,
                 const Finish& finish) {
  const int total = static_cast<int>(tensors.numels.size());
  const int tables = std::max((total + kMaxTensors - 1) / kMaxTensors, even_if_empty ? 1 : 0);
  for (int number = 0; number < tables; ++number) {
    const int first = (Op::kBackwards ? tables - 1 - number : number) * kMaxTensors;
    const int taken = std::min(total - first, kMaxTensors);
    with_capacity(taken, [&](auto capacity) {
      using Table = typename Op::template Table<decltype(capacity)::value>;
      static_assert(sizeof(Table) + sizeof(typename Op::Arguments) + 16 <= kMaxArgumentBytes);
      Table table;
      table.num_tensors = taken;
      const int64_t blocks = fill<Op>(table, tensors, first);
      const typename Op::Arguments arguments = finish(table, first);
      const int64_t programs = std::min<int64_t>(blocks, max_programs);
      if (programs == 0 && !even_if_empty) return;
      launch(Op::kName, stream<Op, decltype(capacity)::value>, std::max<int64_t>(programs, 1), cuda_stream, table,
             arguments);
    });
  }
}

}  // namespace esam::cuda
