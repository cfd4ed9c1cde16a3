// The extension is compiled without -fopenmp and linked to no OpenMP runtime: clang would ask for one of its own. What
// gcc makes of a parallel region is written out, and binds to the runtime that torch has loaded (libgomp, or libiomp5,
// which offers the same names). So there is one pool of threads, and torch.set_num_threads governs it.
#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <mutex>

extern "C" {
void GOMP_parallel(void (*region)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace esam::cpu {
namespace {

// For ThreadSanitizer, which does not see how the OpenMP runtime starts and joins its threads.
void happens_before([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#endif
}
void happens_after([[maybe_unused]] void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#endif
}

struct Loop {
  int64_t total;
  int64_t grain;
  const std::function<void(int64_t, int64_t)>& body;
  std::mutex mutex;
  std::exception_ptr error;  // the first one: an exception may not leave a parallel region
};

// One thread's share: a piece of equal size for each thread, no smaller than the grain.
void run_share(Loop& loop) {
  const int64_t pieces = (loop.total + loop.grain - 1) / loop.grain;
  const int64_t threads = std::min<int64_t>(omp_get_num_threads(), pieces);
  const int64_t size = (loop.total + threads - 1) / threads;
  const int thread = omp_get_thread_num();
  const int64_t begin = thread * size;
  if (begin >= loop.total) return;
  try {
    const at::internal::ThreadIdGuard guard(thread);
    loop.body(begin, std::min(loop.total, begin + size));
  } catch (...) {
    const std::lock_guard<std::mutex> lock(loop.mutex);
    if (!loop.error) loop.error = std::current_exception();
  }
}

void region(void* loop) {
  happens_after(loop);
  run_share(*static_cast<Loop*>(loop));
  happens_before(loop);
}

}  // namespace

void parallel_for(int64_t total, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (total <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (total <= grain || at::get_num_threads() == 1 || at::in_parallel_region()) {
    const at::internal::ThreadIdGuard guard(0);
    body(0, total);
    return;
  }
  Loop loop{total, grain, body, {}, {}};
  constexpr unsigned kAsManyAsTorchHas = 0, kNoFlags = 0;
  happens_before(&loop);
  GOMP_parallel(region, &loop, kAsManyAsTorchHas, kNoFlags);
  happens_after(&loop);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace esam::cpu
