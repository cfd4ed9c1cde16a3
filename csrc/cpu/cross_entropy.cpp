#include "cross_entropy.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace esam::cpu {
namespace {

// Rows that are worth a thread: an exponential costs about as much as ten elements of a streaming kernel.
int64_t row_grain(int64_t classes) { return std::max<int64_t>(1, 4096 / std::max<int64_t>(1, classes)); }

}  // namespace

const int64_t* out_of_range(const CrossEntropyRows& rows, int64_t count) {
  if (rows.index == nullptr) return nullptr;
  const int64_t* const end = rows.index + count;
  const int64_t* const found = std::find_if(rows.index, end, [&](int64_t target) {
    return (target < 0 || target >= rows.classes) && target != rows.ignore_index;
  });
  return found == end ? nullptr : found;
}

void cross_entropy_forward(Dtype dtype, const CrossEntropyRows& rows, int64_t count, float* losses, float* normalizer) {
  const auto forward = kernels().cross_entropy_forward[dtype];
  parallel_for(count, row_grain(rows.classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Normalizer values = forward(rows, row, losses + row);
      normalizer[row] = values.max;
      normalizer[count + row] = values.log_sum;
    }
  });
}

void cross_entropy_backward(Dtype dtype, const CrossEntropyRows& rows, int64_t count, const float* grad_losses,
                            const float* normalizer, void* grad_logits) {
  const auto backward = kernels().cross_entropy_backward[dtype];
  parallel_for(count, row_grain(rows.classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      backward(rows, row, grad_losses[row], {normalizer[row], normalizer[count + row]}, grad_logits);
    }
  });
}

}  // namespace esam::cpu
