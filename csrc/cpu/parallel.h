// PyTorch's own threads, without its headers.
#pragma once

#include <cstdint>
#include <functional>

namespace esam::cpu {

// Calls body(begin, end) over parts of [0, total) of at most `grain` each, on at most torch.get_num_threads() threads;
// on the calling thread alone, and in one call, where there is but one part or one thread.
void parallel_for(int64_t total, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace esam::cpu
