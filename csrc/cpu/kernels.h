// What one instruction set offers: kernels over one contiguous piece of memory, knowing nothing of tensors or threads.
// kernels.inl implements them; kernels_<isa>.cpp compiles it once for each instruction set.
#pragma once

#include <cstdint>

namespace esam::cpu {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kNumDtypes = 4 };

struct ElementMask {
  uint64_t seed;
  uint64_t step;
  uint32_t bound;  // an element moves where its Philox word is at most this
};

struct PerturbScalars {
  double factor;  // scale / (norm + eps)
  bool adaptive;  // T(w) = |w| + eta instead of 1
  double eta;
  const ElementMask* mask;  // null: every element moves
};

struct SgdScalars {
  double lr, momentum, dampening, weight_decay;
  bool first, nesterov, maximize;
  bool streams = false;  // the weights go past the caches; likewise below
};

struct AdamScalars {
  double lr, beta1, beta2, eps, weight_decay;
  double step_size, bias_correction2_sqrt;
  bool maximize, decoupled_weight_decay;
  bool lr_is_float32 = false;  // torch then computes what it derives from lr alone in float32
  bool streams = false;
};

// The pointers of one piece: `backup` may be `grad` itself. Unused ones are null.
struct AdamPointers {
  void* param;
  const void* backup;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
};

// A loss over rows of `classes` logits. Exactly one of `index` and `probability` (float32) is given.
struct CrossEntropyRows {
  const void* logits;
  const int64_t* index;
  const float* probability;
  int64_t classes;
  double label_smoothing;
  int64_t ignore_index;
};

// What a row's softmax is rebuilt from. Kept apart: their sum, rounded, would lose the digits of the second beside a
// large max.
struct Normalizer {
  float max;
  float log_sum;  // log sum exp(x - max)
};

struct Kernels {
  const char* name;

  double (*squared_norm[kNumDtypes])(const void* grad, int64_t n);
  double (*scaled_squared_norm[kNumDtypes])(const void* param, const void* grad, int64_t n, double eta);

  // `element` is the piece's first element's global number, a multiple of 4.
  void (*perturb[kNumDtypes])(void* param, const void* grad, void* backup, int64_t n, int64_t element,
                              const PerturbScalars& scalars);
  void (*sgd[kNumDtypes])(void* param, const void* backup, const void* grad, void* momentum_buffer, int64_t n,
                          const SgdScalars& scalars);
  void (*adam[kNumDtypes])(const AdamPointers& pointers, int64_t n, const AdamScalars& scalars);

  // One row each; float64 logits have no entry.
  Normalizer (*cross_entropy_forward[kNumDtypes])(const CrossEntropyRows& rows, int64_t row, float* loss);
  void (*cross_entropy_backward[kNumDtypes])(const CrossEntropyRows& rows, int64_t row, float grad_loss,
                                             const Normalizer& normalizer, void* grad_logits);

  void (*philox_words)(uint64_t first_counter, int64_t num_counters, uint64_t step, uint64_t seed, uint32_t* words);

  void (*copy)(void* destination, const void* source, int64_t bytes);
  void (*stream)(void* destination, const void* source, int64_t bytes);  // a copy past the caches
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace esam::cpu
