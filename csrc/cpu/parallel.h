// PyTorch's own threads, without its headers.
#pragma once

#include <cstdint>
#include <functional>

namespace esam::cpu {

// Calls body(begin, end) over parts of [0, total), on at most torch.get_num_threads() threads, each with at least
// `grain` units of work; on the calling thread alone where there is no more than that.
void parallel_for(int64_t total, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace esam::cpu
