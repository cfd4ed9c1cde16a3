// at::parallel_for is a template around an OpenMP region: compiled here, its GOMP_* calls are left undefined in the
// extension, which is linked to libtorch_cpu and to no OpenMP runtime. They bind to the runtime that torch loaded, so
// there is one pool of threads, and torch.set_num_threads governs it.
#include "parallel.h"

#include <ATen/Parallel.h>

namespace esam::cpu {

void parallel_for(int64_t total, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, total, grain, body);
}

}  // namespace esam::cpu
