#include "perturbation.h"

#include <cmath>
#include <numeric>

#include "isa.h"

namespace esam::cpu {
namespace {

// From so many bytes of weights on, what a pass writes has left the caches before anybody reads it.
constexpr int64_t kStreamBytes = 16 << 20;

bool outgrow_caches(const Blocks& blocks) {
  int64_t bytes = 0;
  for (const Block& block : blocks) bytes += block.numel * element_size(block.dtype);
  return bytes >= kStreamBytes;
}

// Where a chunk begins in a block parallel to the one it was cut from; null in a list that is not used.
char* at(const Blocks& blocks, const Chunk& chunk) {
  if (blocks.empty()) return nullptr;
  const Block& block = blocks[chunk.tensor];
  return block.data + chunk.start * element_size(block.dtype);
}

}  // namespace

void norm_partials(const Blocks& params, const Blocks& grads, const Scaling& scaling, double* partials) {
  const Kernels& isa = kernels();
  const Chunks chunks(grads);
  std::vector<double> sums(chunks.count());
  chunks.for_each([&](const Chunk& chunk) {
    const Dtype dtype = grads[chunk.tensor].dtype;
    sums[chunk.number] =
        scaling.is_adaptive(chunk.tensor)
            ? isa.scaled_squared_norm[dtype](at(params, chunk), at(grads, chunk), chunk.length, scaling.eta)
            : isa.squared_norm[dtype](at(grads, chunk), chunk.length);
  });
  std::fill(partials, partials + kNumPartials, 0.0);
  for (size_t i = 0; i < sums.size(); ++i) partials[i % kNumPartials] += sums[i];
}

void perturb(const Blocks& params, const Blocks& grads, const Blocks& backups, const Scaling& scaling,
             const Perturbation& perturbation) {
  const double squared_norm = std::accumulate(perturbation.partials, perturbation.partials + kNumPartials, 0.0);
  const double norm = perturbation.norm_factor * std::sqrt(squared_norm);
  const bool usable = std::isfinite(norm) && norm > 0;
  const int64_t* const state = perturbation.random_state;
  if (!usable || (state != nullptr && state[2] < 0)) {  // a bound below 0: nothing is drawn
    restore(backups, params);
    return;
  }
  ElementMask mask{};
  if (state != nullptr) {
    const int64_t bound = std::min<int64_t>(state[2], UINT32_MAX);
    mask = {static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1]), static_cast<uint32_t>(bound)};
  }
  const Kernels& isa = kernels();
  Chunks(params).for_each([&](const Chunk& chunk) {
    PerturbScalars scalars{};
    scalars.factor = perturbation.scale[scaling.groups[chunk.tensor]] / (norm + perturbation.eps);
    scalars.adaptive = scaling.is_adaptive(chunk.tensor);
    scalars.eta = scaling.eta;
    scalars.mask = state == nullptr ? nullptr : &mask;
    const int64_t element = perturbation.offsets[chunk.tensor] + chunk.start;
    isa.perturb[params[chunk.tensor].dtype](at(params, chunk), at(grads, chunk), at(backups, chunk), chunk.length,
                                            element, scalars);
  });
}

void restore(const Blocks& params, const Blocks& backups) {
  const auto copy = outgrow_caches(params) ? kernels().stream : kernels().copy;
  Chunks(params).for_each([&](const Chunk& chunk) {
    copy(at(params, chunk), at(backups, chunk), chunk.length * element_size(params[chunk.tensor].dtype));
  });
}

void restore_sgd(const Blocks& params, const Blocks& backups, const Blocks& grads, const Blocks& momentum_buffers,
                 SgdScalars scalars) {
  scalars.streams = outgrow_caches(params);
  const Kernels& isa = kernels();
  Chunks(params).for_each([&](const Chunk& chunk) {
    isa.sgd[params[chunk.tensor].dtype](at(params, chunk), at(backups, chunk), at(grads, chunk),
                                        at(momentum_buffers, chunk), chunk.length, scalars);
  });
}

void restore_adam(const Blocks& params, const Blocks& backups, const Blocks& grads, const Blocks& exp_avgs,
                  const Blocks& exp_avg_sqs, const Blocks& max_exp_avg_sqs, const std::vector<float*>& steps,
                  const AdamScalars& scalars) {
  std::vector<AdamScalars> of_tensor(params.size(), scalars);
  const bool streams = outgrow_caches(params);
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = *steps[i] += 1;
    of_tensor[i].streams = streams;
    const double correction1 = 1 - std::pow(scalars.beta1, step);
    of_tensor[i].step_size = scalars.lr_is_float32 ? static_cast<float>(scalars.lr) / static_cast<float>(correction1)
                                                   : scalars.lr / correction1;
    of_tensor[i].bias_correction2_sqrt = std::pow(1 - std::pow(scalars.beta2, step), 0.5);
  }
  const Kernels& isa = kernels();
  Chunks(params).for_each([&](const Chunk& chunk) {
    const AdamPointers pointers{at(params, chunk),   at(backups, chunk),     at(grads, chunk),
                                at(exp_avgs, chunk), at(exp_avg_sqs, chunk), at(max_exp_avg_sqs, chunk)};
    isa.adam[params[chunk.tensor].dtype](pointers, chunk.length, of_tensor[chunk.tensor]);
  });
}

}  // namespace esam::cpu
