// Sharpness-sensitive Data Selection (section 2.3): which samples, and their rows.
#pragma once

#include <cstdint>
#include <vector>

namespace esam::cpu {

// Writes the k samples with the largest after - before, ascending. Ties go to the lower index, NaN ranks last.
void select(const float* before, const float* after, int64_t samples, int64_t k, int64_t* indices);
void select(const double* before, const double* after, int64_t samples, int64_t k, int64_t* indices);

// `rows` rows of `row_bytes` bytes, one after the other.
struct Rows {
  const char* data;
  int64_t rows;
  int64_t row_bytes;
};

// destination[i] <- source[indices[i]]; the indices are within range.
void gather(const Rows& source, const int64_t* indices, int64_t count, char* destination);

}  // namespace esam::cpu
