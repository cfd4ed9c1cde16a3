// Per-sample cross-entropy over rows of logits (section 2.3).
#pragma once

#include "kernels.h"

namespace esam::cpu {

// The first class index that is neither within [0, classes) nor ignore_index; null if there is none.
const int64_t* out_of_range(const CrossEntropyRows& rows, int64_t count);

// `normalizer` holds the maxima of all rows, and after them the logs of their sums (Normalizer).
void cross_entropy_forward(Dtype dtype, const CrossEntropyRows& rows, int64_t count, float* losses, float* normalizer);

void cross_entropy_backward(Dtype dtype, const CrossEntropyRows& rows, int64_t count, const float* grad_losses,
                            const float* normalizer, void* grad_logits);

}  // namespace esam::cpu
