// Stochastic Weight Perturbation (section 2.2) and the updates that follow it, over lists of blocks.
// Lists are parallel: grads[i], backups[i], ... have params[i]'s length and dtype.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"

namespace esam::cpu {

constexpr int64_t kNumPartials = 1024;

using Blocks = std::vector<Block>;

struct Scaling {
  std::vector<int64_t> groups;  // of each tensor
  std::vector<bool> adaptive;   // of each group
  double eta;

  bool is_adaptive(int64_t tensor) const { return adaptive[groups[tensor]]; }
};

// Writes kNumPartials sums that add up to ||T(w) g||^2. The order of additions is fixed.
void norm_partials(const Blocks& params, const Blocks& grads, const Scaling& scaling, double* partials);

struct Perturbation {
  const double* partials;        // (kNumPartials,)
  const double* scale;           // (groups,): rho / beta
  std::vector<int64_t> offsets;  // of each tensor: its first element's global number
  double norm_factor;
  double eps;
  const int64_t* random_state;  // null, or (seed, step, bound)
};

// w <- w + e, and the old w into the backups, which may be the gradients.
void perturb(const Blocks& params, const Blocks& grads, const Blocks& backups, const Scaling& scaling,
             const Perturbation& perturbation);

void restore(const Blocks& params, const Blocks& backups);

// `momentum_buffers` is empty at momentum 0.
void restore_sgd(const Blocks& params, const Blocks& backups, const Blocks& grads, const Blocks& momentum_buffers,
                 SgdScalars scalars);

// `steps` are torch's counters, one a tensor, incremented here; `max_exp_avg_sqs` is empty without amsgrad.
// The step-dependent scalars are filled in for each tensor.
void restore_adam(const Blocks& params, const Blocks& backups, const Blocks& grads, const Blocks& exp_avgs,
                  const Blocks& exp_avg_sqs, const Blocks& max_exp_avg_sqs, const std::vector<float*>& steps,
                  const AdamScalars& scalars);

}  // namespace esam::cpu
