#include "selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace esam::cpu {
namespace {

// Copying less than this a thread costs more in waking the thread than it saves.
constexpr int64_t kGrainBytes = 131072;

template <typename T>
struct Candidate {
  T rise;
  bool undefined;
  int64_t index;
};

// The order of Eq. 6: undefined rises last, then the larger rise, then the lower index. -0.0 equals 0.0 here.
template <typename T>
bool ranks_before(const Candidate<T>& a, const Candidate<T>& b) {
  if (a.undefined != b.undefined) return b.undefined;
  if (!a.undefined && a.rise != b.rise) return a.rise > b.rise;
  return a.index < b.index;
}

template <typename T>
void select_samples(const T* before, const T* after, int64_t samples, int64_t k, int64_t* indices) {
  std::vector<Candidate<T>> candidates(samples);
  for (int64_t i = 0; i < samples; ++i) {
    const T rise = after[i] - before[i];
    candidates[i] = {rise, std::isnan(rise), i};
  }
  std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), ranks_before<T>);
  for (int64_t i = 0; i < k; ++i) indices[i] = candidates[i].index;
  std::sort(indices, indices + k);
}

}  // namespace

void select(const float* before, const float* after, int64_t samples, int64_t k, int64_t* indices) {
  select_samples(before, after, samples, k, indices);
}

void select(const double* before, const double* after, int64_t samples, int64_t k, int64_t* indices) {
  select_samples(before, after, samples, k, indices);
}

void gather(const Rows& source, const int64_t* indices, int64_t count, char* destination) {
  if (source.row_bytes == 0) return;
  const auto copy = kernels().copy;
  parallel_for(count, std::max<int64_t>(1, kGrainBytes / source.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      copy(destination + i * source.row_bytes, source.data + indices[i] * source.row_bytes, source.row_bytes);
    }
  });
}

}  // namespace esam::cpu
