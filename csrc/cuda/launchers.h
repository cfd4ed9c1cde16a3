// What csrc/cuda offers: launchers over raw pointers and a stream. Free of torch; nothing waits for the device, nothing
// allocates, and everything can be captured in a CUDA graph. An error of the launch is thrown as std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace esam::cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kNumPartials = 1024;
constexpr int kMaxGroups = 1024;

using Addresses = std::vector<int64_t>;

// Parallel lists of dense tensors of one dtype: lists[i][t] is the address of tensor t's memory in list i.
struct Tensors {
  std::vector<Addresses> lists;
  std::vector<int64_t> numels;
};

// -- Stochastic Weight Perturbation ----------------------------------------------------------------------------------

// lists: grads, params. Writes (or, with `accumulate`, adds to) the kNumPartials slots of ||T(w) g||^2.
// `adaptive` holds one flag a tensor.
void norm_partials(const Tensors& tensors, const std::vector<bool>& adaptive, double eta, double* partials,
                   bool accumulate, Dtype dtype, cudaStream_t stream);

struct Perturbation {
  const double* partials;       // (kNumPartials,)
  const double* scale;          // (num_groups,): rho / beta
  const int64_t* random_state;  // null, or (seed, step, bound)
  double norm_factor, eps, eta;
  int num_groups;
};

// lists: params, grads, backups (which may be the grads).
void perturb(const Tensors& tensors, const std::vector<int64_t>& groups, const std::vector<int64_t>& offsets,
             const std::vector<bool>& adaptive, const Perturbation& perturbation, Dtype dtype, cudaStream_t stream);

// lists: params, backups, of elements of `element_size` bytes: 2, 4 or 8.
void restore(const Tensors& tensors, int element_size, cudaStream_t stream);

// A learning rate: the number that `float32` or `float64` points to on the device, else `value`.
struct LearningRate {
  double value;
  const float* float32;
  const double* float64;
};

struct Sgd {
  LearningRate lr;
  double momentum, dampening, weight_decay;
  bool first, nesterov, maximize;
};

// lists: params, backups, grads, and with momentum the momentum buffers.
void restore_sgd(const Tensors& tensors, const Sgd& sgd, Dtype dtype, cudaStream_t stream);

struct Adam {
  LearningRate lr;
  double beta1, beta2, eps, weight_decay;
  bool decoupled, amsgrad, maximize;
};

// lists: params, backups, grads, exp_avgs, exp_avg_sqs, and with amsgrad the max_exp_avg_sqs.
// The steps, this one included, are float32 numbers on the device at `step_addresses`, or, where that is empty,
// `steps`.
void restore_adam(const Tensors& tensors, const Addresses& step_addresses, const std::vector<float>& steps,
                  const Adam& adam, Dtype dtype, cudaStream_t stream);

// Adds one to each of torch's step counters, float32 numbers on the device.
void increment_steps(const Addresses& step_addresses, cudaStream_t stream);

// -- Sharpness-sensitive Data Selection ------------------------------------------------------------------------------

// Rows of logits and their targets: exactly one of `index` and `probability` is given.
struct CrossEntropy {
  const void* logits;
  int64_t rows, classes, row_stride;
  const int64_t* index;      // (rows,)
  const float* probability;  // (rows, classes), contiguous
  float smoothing;
  int64_t ignore_index;
};

// `normalizer`, which may be null: the rows' maxima, and after them their log sums of exp(x - maximum).
void cross_entropy_forward(const CrossEntropy& inputs, float* losses, float* normalizer, Dtype dtype,
                           cudaStream_t stream);

// `gradient`: (rows, classes), contiguous, in the logits' dtype.
void cross_entropy_backward(const CrossEntropy& inputs, const float* grad_losses, const float* normalizer,
                            void* gradient, Dtype dtype, cudaStream_t stream);

struct Selection {
  const float* loss_before;  // (samples,)
  const float* loss_after;   // (samples,)
  int64_t samples, k;
  int64_t* indices;  // (k,)
};

void select(const Selection& selection, cudaStream_t stream);

// A tensor of which rows are gathered: rows of `row_bytes` follow each other without gaps, in source and destination.
// The source has `samples` of them; an index outside them gives zeros.
struct Rows {
  const void* source;
  void* destination;
  int64_t row_bytes;
  int64_t samples;
};

void gather(const std::vector<Rows>& tensors, const int64_t* indices, int64_t k, cudaStream_t stream);

// B+ in one launch. Where logits are given (rows > 0), the losses are computed from them first, and written to where
// the selection reads them; `before` and `after` share dtype, classes and smoothing. One cooperative launch: the blocks
// wait for each other twice. Where the device has none, refuses it as too large (a client of MPS, a green context), or
// a batch has more than kMaxGathered tensors, the same phases run as launches of their own.
void losses_select_gather(const CrossEntropy& before, const CrossEntropy& after, const Selection& selection,
                          const std::vector<Rows>& tensors, Dtype dtype, cudaStream_t stream);

}  // namespace esam::cuda
