// B+ (Eq. 6): selection without a sort, gathering without a boolean index, and both behind the losses in one launch.
#include <cooperative_groups.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "../device/selection.h"
#include "losses.cuh"

namespace esam::cuda {
namespace {

// -- Selection: one block of threads ---------------------------------------------------------------------------------

constexpr int kKeptKeys = 4096;  // of that many samples the keys are computed once

// How many of the block's samples so far, in the order of their numbers, satisfy each of two conditions.
struct Counts {
  int64_t first, second;
};

// For each thread: the counts over the threads before it; and over all of them. kThreads take part.
__device__ Counts counts_before(bool first, bool second, Counts& total) {
  __shared__ int of_warp[2][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned firsts = __ballot_sync(kAllLanes, first), seconds = __ballot_sync(kAllLanes, second);
  __syncthreads();  // what an earlier call left has been read
  if (lane == 0) {
    of_warp[0][warp] = __popc(firsts);
    of_warp[1][warp] = __popc(seconds);
  }
  __syncthreads();
  const unsigned earlier = (1u << lane) - 1;
  Counts before{__popc(firsts & earlier), __popc(seconds & earlier)};
  total = {0, 0};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before = {before.first + of_warp[0][i], before.second + of_warp[1][i]};
    total = {total.first + of_warp[0][i], total.second + of_warp[1][i]};
  }
  return before;
}

// Writes the ascending indices of B+. No data is shared with what the block does before or after.
__device__ void select_by_block(const Selection& selection) {
  __shared__ uint32_t kept[kKeptKeys];
  __shared__ int counts[2][kWarps];
  const int64_t samples = selection.samples;
  const auto computed = [&](int64_t i) {
    return device::ordered_key(selection.loss_before[i], selection.loss_after[i]);
  };
  __syncthreads();
  for (int64_t i = threadIdx.x; i < samples && i < kKeptKeys; i += kThreads) kept[i] = computed(i);
  __syncthreads();
  const auto key = [&](int64_t i) { return i < kKeptKeys ? kept[i] : computed(i); };

  int turn = 0;  // two sets of counters: one is written while the other may still be read
  const uint32_t threshold = device::kth_largest(selection.k, [&](uint32_t candidate) {
    int count = 0;
    for (int64_t first = 0; first < samples; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      count += __popc(__ballot_sync(kAllLanes, i < samples && key(i) >= candidate));
    }
    turn ^= 1;
    if (threadIdx.x % kWarp == 0) counts[turn][threadIdx.x / kWarp] = count;
    __syncthreads();
    int64_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += counts[turn][warp];
    return sum;
  });

  // Two walks over the samples: how many are larger, then where each goes.
  Counts passed{0, 0};
  for (int64_t first = 0; first < samples; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    Counts here;
    counts_before(i < samples && key(i) > threshold, false, here);
    passed.first += here.first;
  }
  const int64_t wanted_ties = selection.k - passed.first;
  passed = {0, 0};
  for (int64_t first = 0; first < samples; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t mine = i < samples ? key(i) : 0;
    Counts here;
    const Counts before = counts_before(i < samples && mine > threshold, i < samples && mine == threshold, here);
    if (i < samples) {
      const int64_t position = device::selected_position(mine, threshold, passed.first + before.first,
                                                         passed.second + before.second, wanted_ties);
      if (position >= 0) selection.indices[position] = i;
    }
    passed = {passed.first + here.first, passed.second + here.second};
  }
}

__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ Selection selection) {
  select_by_block(selection);
}

// -- Gathering -------------------------------------------------------------------------------------------------------

constexpr int kMaxGathered = 64;  // tensors of a launch
constexpr int kCopies = 4;        // accesses in flight for each thread

// Rows move in lanes, the widest power of two of bytes that divides rows and addresses. Several short rows share a
// block of threads; a long row is cut into segments. A unit is what a block of threads copies at a time.
struct GatherTable {
  const char* source[kMaxGathered];
  char* destination[kMaxGathered];
  int64_t samples[kMaxGathered];  // rows of the source
  int64_t lanes_of_row[kMaxGathered];
  int64_t segments[kMaxGathered];  // of a row
  int64_t first_unit[kMaxGathered + 1];
  int8_t lane_bytes[kMaxGathered];
  int16_t threads_of_row[kMaxGathered];  // a power of two
  int32_t num_tensors;
  int64_t k;
};

template <typename Lane>
__device__ void copy_unit(const GatherTable& table, const int64_t* indices, int tensor, int64_t unit) {
  const int threads = table.threads_of_row[tensor];
  const int64_t lanes = table.lanes_of_row[tensor], segments = table.segments[tensor];
  const int64_t row = unit / segments * (kThreads / threads) + threadIdx.x / threads;
  if (row >= table.k) return;
  const int64_t sample = indices[row];
  // An index outside the batch names no row: it gives zeros, not somebody else's memory.
  const bool is_sample = static_cast<uint64_t>(sample) < static_cast<uint64_t>(table.samples[tensor]);
  const Lane* const source = reinterpret_cast<const Lane*>(table.source[tensor]) + (is_sample ? sample * lanes : 0);
  Lane* const destination = reinterpret_cast<Lane*>(table.destination[tensor]) + row * lanes;
  const int64_t first = unit % segments * (kCopies * threads) + threadIdx.x % threads;
  Lane values[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    values[i] = is_sample && first + i * threads < lanes ? source[first + i * threads] : Lane{};
  }
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    if (first + i * threads < lanes) destination[first + i * threads] = values[i];
  }
}

// All units, shared out between the grid's blocks of threads.
__device__ void gather_units(const GatherTable& table, const int64_t* indices) {
  int tensor = 0;
  for (int64_t unit = blockIdx.x; unit < table.first_unit[table.num_tensors]; unit += gridDim.x) {
    while (unit >= table.first_unit[tensor + 1]) ++tensor;
    const int64_t of_tensor = unit - table.first_unit[tensor];
    switch (table.lane_bytes[tensor]) {
      case 16:
        copy_unit<uint4>(table, indices, tensor, of_tensor);
        break;
      case 8:
        copy_unit<uint2>(table, indices, tensor, of_tensor);
        break;
      case 4:
        copy_unit<uint32_t>(table, indices, tensor, of_tensor);
        break;
      case 2:
        copy_unit<uint16_t>(table, indices, tensor, of_tensor);
        break;
      default:
        copy_unit<uint8_t>(table, indices, tensor, of_tensor);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ GatherTable table, const int64_t* indices) {
  gather_units(table, indices);
}

// The table of the tensors from number `first` on.
GatherTable gather_table(const std::vector<Rows>& tensors, size_t first, int64_t k) {
  GatherTable table;
  table.num_tensors = static_cast<int32_t>(std::min<size_t>(tensors.size() - first, kMaxGathered));
  table.k = k;
  int64_t units = 0;
  for (int i = 0; i < table.num_tensors; ++i) {
    const Rows& rows = tensors[first + i];
    const uint64_t bits = reinterpret_cast<uint64_t>(rows.source) | reinterpret_cast<uint64_t>(rows.destination) |
                          static_cast<uint64_t>(rows.row_bytes);
    int lane = device::kPackBytes;
    while (bits % lane != 0) lane /= 2;
    const int64_t lanes = rows.row_bytes / lane;
    int threads = 1;
    while (threads < kThreads && threads < lanes) threads *= 2;
    const int64_t rows_of_unit = kThreads / threads, lanes_of_segment = static_cast<int64_t>(kCopies) * threads;
    table.source[i] = static_cast<const char*>(rows.source);
    table.destination[i] = static_cast<char*>(rows.destination);
    table.samples[i] = rows.samples;
    table.lanes_of_row[i] = lanes;
    table.segments[i] = std::max<int64_t>((lanes + lanes_of_segment - 1) / lanes_of_segment, 1);
    table.lane_bytes[i] = static_cast<int8_t>(lane);
    table.threads_of_row[i] = static_cast<int16_t>(threads);
    table.first_unit[i] = units;
    if (lanes > 0) units += (k + rows_of_unit - 1) / rows_of_unit * table.segments[i];
  }
  table.first_unit[table.num_tensors] = units;
  return table;
}

// -- Losses, selection and gathering in one launch -------------------------------------------------------------------

struct Fused {
  CrossEntropy before, after;  // no rows: the losses are there already
  float* loss_before;
  float* loss_after;
  Selection selection;
  GatherTable table;
};

template <typename T, bool kWeighted>
__device__ void losses_of(const CrossEntropy& inputs, float* losses) {
  if (inputs.classes <= kMaxClassesOfWarp) {
    forward_rows<T, kWeighted, kWarp>(inputs, losses, nullptr);
  } else {
    forward_rows<T, kWeighted, kThreads>(inputs, losses, nullptr);
  }
}

// Nothing in shared memory is kept across a wait for the grid.
template <typename T, bool kWeighted>
__global__ void __launch_bounds__(kThreads) fused_kernel(const __grid_constant__ Fused fused) {
  const auto grid = cooperative_groups::this_grid();
  losses_of<T, kWeighted>(fused.before, fused.loss_before);
  losses_of<T, kWeighted>(fused.after, fused.loss_after);
  grid.sync();
  if (blockIdx.x == 0) select_by_block(fused.selection);
  grid.sync();
  gather_units(fused.table, fused.selection.indices);
}

// How many blocks of threads a cooperative launch of each kernel may have, on each device: 0 where there is none.
class ResidentBlocks {
 public:
  template <typename Kernel>
  static int of(Kernel kernel) {
    const Key key = key_of(kernel);
    const std::lock_guard<std::mutex> lock(mutex());
    const auto [entry, is_new] = known().try_emplace(key, 0);
    if (is_new) {
      int supported = 0, processors = 0, blocks = 0;
      check(cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, key.second), "cudaDeviceGetAttribute");
      check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, key.second), "cudaDeviceGetAttribute");
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      if (supported) entry->second = blocks * processors;
    }
    return entry->second;
  }

  // Of MPS clients and green contexts the device's attributes say more than they may use. The refusal is remembered: a
  // launch that fails inside the capture of a graph would end it, and the step before the capture has found out.
  template <typename Kernel>
  static void refuse(Kernel kernel) {
    const std::lock_guard<std::mutex> lock(mutex());
    known()[key_of(kernel)] = 0;
  }

 private:
  using Key = std::pair<const void*, int>;

  template <typename Kernel>
  static Key key_of(Kernel kernel) {
    return {reinterpret_cast<const void*>(kernel), current_device()};
  }

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }

  static std::map<Key, int>& known() {
    static std::map<Key, int> all;
    return all;
  }
};

// Whether the launch of everything at once was taken.
template <typename T, bool kWeighted>
bool launch_fused(const CrossEntropy& before, const CrossEntropy& after, const Selection& selection,
                  const std::vector<Rows>& tensors, cudaStream_t stream) {
  const auto kernel = fused_kernel<T, kWeighted>;
  const int resident = tensors.size() <= kMaxGathered ? ResidentBlocks::of(kernel) : 0;
  if (resident == 0) return false;
  const Fused fused{before,
                    after,
                    const_cast<float*>(selection.loss_before),
                    const_cast<float*>(selection.loss_after),
                    selection,
                    gather_table(tensors, 0, selection.k)};
  const int64_t rows = std::max(before.rows, after.rows),
                rows_together = rows_of_block(after.rows > 0 ? after : before);
  const int64_t wanted = std::max((rows + rows_together - 1) / rows_together, fused.table.first_unit[tensors.size()]);
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, resident);
  const cudaError_t error = try_launch(kernel, blocks, /*cooperative=*/true, stream, fused);
  if (error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // forgotten: it would be reported by whoever asks next
    ResidentBlocks::refuse(kernel);
    return false;
  }
  check_launch(error, "losses_select_gather", blocks, kThreads);
  return true;
}

}  // namespace

void select(const Selection& selection, cudaStream_t stream) { launch("select", select_kernel, 1, stream, selection); }

void gather(const std::vector<Rows>& tensors, const int64_t* indices, int64_t k, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 1 << 20;
  for (size_t first = 0; first < tensors.size(); first += kMaxGathered) {
    const GatherTable table = gather_table(tensors, first, k);
    const int64_t units = table.first_unit[table.num_tensors];
    if (units > 0) launch("gather", gather_kernel, std::min(units, kMaxBlocks), stream, table, indices);
  }
}

void losses_select_gather(const CrossEntropy& before, const CrossEntropy& after, const Selection& selection,
                          const std::vector<Rows>& tensors, Dtype dtype, cudaStream_t stream) {
  with_dtype("losses_select_gather", dtype, [&](auto element) {
    using T = decltype(element);
    const bool weighted = is_weighted(before) || is_weighted(after);
    const bool launched = weighted ? launch_fused<T, true>(before, after, selection, tensors, stream)
                                   : launch_fused<T, false>(before, after, selection, tensors, stream);
    if (launched) return;
    cross_entropy_forward(before, const_cast<float*>(selection.loss_before), nullptr, dtype, stream);
    cross_entropy_forward(after, const_cast<float*>(selection.loss_after), nullptr, dtype, stream);
    select(selection, stream);
    gather(tensors, selection.indices, selection.k, stream);
  });
}

}  // namespace esam::cuda
