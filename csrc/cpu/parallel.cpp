// at::parallel_for is a template around an OpenMP region: compiled here, its GOMP_* calls are left undefined in the
// extension, which is linked to libtorch_cpu and to no OpenMP runtime. They bind to the runtime that torch loaded, so
// there is one pool of threads, and torch.set_num_threads governs it.
#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace esam::cpu {
namespace {

// The parts that one thread starts with. On a cache line of its own: its owner counts it up all the time.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace

void parallel_for(int64_t total, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t parts = (total + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(parts, at::get_num_threads());
  if (threads <= 1 || at::in_parallel_region()) {
    if (total > 0) body(0, total);
    return;
  }
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = parts * i / threads;
    shares[i].end = parts * (i + 1) / threads;
  }
  // The same memory falls to the same thread in every call, which is where its pages and caches are; a thread that is
  // done helps the others, so that one whose core is busy with something else does not hold up the rest.
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(thread + i) % threads];
        for (int64_t part = share.next++; part < share.end; part = share.next++) {
          body(part * grain, std::min(total, (part + 1) * grain));
        }
      }
    }
  });
}

}  // namespace esam::cpu
