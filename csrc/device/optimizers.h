// The updates of torch.optim.SGD, Adam and AdamW for one element, starting from the saved w.
// Operation by operation those of torch's single-tensor code, with its rounding to the storage type in between.
#pragma once

#include "numbers.h"

namespace esam::device {

struct SgdScalars {
  float lr, momentum, undamped, weight_decay;  // undamped = 1 - dampening
  bool nesterov, maximize;
};

// w - lr d. `buffer`: of momentum, on return the new one; with `first` what it held does not count.
template <typename T, bool kMomentum, bool kFirst>
ESAM_HOST_DEVICE T sgd(T saved, T grad, T& buffer, const SgdScalars& scalars) {
  const float w = widen(saved);
  float direction = scalars.maximize ? -widen(grad) : widen(grad);
  if (scalars.weight_decay != 0) direction = round_to<T>(fma(w, scalars.weight_decay, direction));
  if (kMomentum) {
    float velocity = direction;
    if (!kFirst) {
      velocity = round_to<T>(widen(buffer) * scalars.momentum);
      velocity = round_to<T>(fma(direction, scalars.undamped, velocity));
    }
    buffer = narrow<T>(velocity);
    direction = scalars.nesterov ? round_to<T>(fma(velocity, scalars.momentum, direction)) : velocity;
  }
  return narrow<T>(fma(direction, -scalars.lr, w));
}

struct AdamScalars {
  float lerp_weight, beta2, one_minus_beta2, eps;
  float weight_decay;  // added to the gradient; 0 where it is decoupled
  float shrink;        // 1 - lr weight_decay where it is decoupled, else 1
  bool maximize;
};

// What depends on how many steps a tensor has taken.
struct AdamBias {
  float step_size, correction2_sqrt;
};

ESAM_HOST_DEVICE AdamBias adam_bias(double lr, double beta1, double beta2, double steps) {
  return {static_cast<float>(lr / (1 - pow(beta1, steps))), static_cast<float>(sqrt(1 - pow(beta2, steps)))};
}

// torch.lerp, which starts from the nearer end.
ESAM_HOST_DEVICE float lerp(float start, float end, float weight) {
  return weight < 0.5f ? fma(weight, end - start, start) : fma(weight - 1, end - start, end);
}

// `mean`, `square` and, with kAmsgrad, `largest` are Adam's states, updated in place.
template <typename T, bool kAmsgrad>
ESAM_HOST_DEVICE T adam(T saved, T grad, T& mean, T& square, T& largest, const AdamScalars& scalars,
                        const AdamBias& bias) {
  const float w = round_to<T>(widen(saved) * scalars.shrink);
  float g = scalars.maximize ? -widen(grad) : widen(grad);
  if (scalars.weight_decay != 0) g = round_to<T>(fma(w, scalars.weight_decay, g));
  mean = narrow<T>(lerp(widen(mean), g, scalars.lerp_weight));
  square = narrow<T>(fma(g * scalars.one_minus_beta2, g, round_to<T>(widen(square) * scalars.beta2)));
  float root = widen(square);
  if (kAmsgrad) {
    const float before = widen(largest);
    root = before > root || before != before ? before : root;  // NaN stays
    largest = narrow<T>(root);
  }
  float denominator = round_to<T>(round_to<T>(sqrtf(root)) / bias.correction2_sqrt);
  denominator = round_to<T>(denominator + scalars.eps);
  return narrow<T>(w - widen(mean) * bias.step_size / denominator);
}

}  // namespace esam::device
