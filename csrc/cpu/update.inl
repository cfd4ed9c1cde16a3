// w <- backup, then a base optimizer's update, for one piece. Included once per instruction set, inside its namespace.
// The operations are those of torch's single-tensor optimizers on vectors, in their order, rounded where they round:
// after every operation, to the tensors' type; and the scalar of an addition (add, alpha=) before it, to the same.

template <typename T>
inline Compute<T> addition_scalar(double value) {
  return rounded<T>(static_cast<Compute<T>>(value));
}

// d of torch.optim.SGD before momentum.
template <typename T>
inline Compute<T> decayed(Compute<T> param, T grad, Compute<T> sign, Compute<T> weight_decay) {
  const Compute<T> g = sign * load(grad);
  return weight_decay != 0 ? rounded<T>(multiply_add(param, weight_decay, g)) : g;
}

template <typename T, bool kStreams>
void sgd_plain(T* param, const T* backup, const T* grad, int64_t n, const SgdScalars& scalars) {
  using C = Compute<T>;
  const C sign = scalars.maximize ? -1 : 1, weight_decay = addition_scalar<T>(scalars.weight_decay);
  const C step = addition_scalar<T>(-scalars.lr);
  for_each_element<kStreams>(param, n, [=](int64_t i) {
    const C w = load(backup[i]);
    return store<T>(multiply_add(decayed<T>(w, grad[i], sign, weight_decay), step, w));
  });
}

template <typename T, bool kStreams, bool kFirst, bool kNesterov>
void sgd_momentum(T* param, const T* backup, const T* grad, T* momentum_buffer, int64_t n, const SgdScalars& scalars) {
  using C = Compute<T>;
  const C sign = scalars.maximize ? -1 : 1, weight_decay = addition_scalar<T>(scalars.weight_decay);
  const C momentum = static_cast<C>(scalars.momentum), lookahead = addition_scalar<T>(scalars.momentum);
  const C share = addition_scalar<T>(1 - scalars.dampening);
  const C step = addition_scalar<T>(-scalars.lr);
  for_each_element<kStreams>(param, n, [=](int64_t i) {
    const C w = load(backup[i]);
    C d = decayed<T>(w, grad[i], sign, weight_decay);
    C velocity = d;
    if (!kFirst) velocity = rounded<T>(multiply_add(d, share, rounded<T>(load(momentum_buffer[i]) * momentum)));
    d = kNesterov ? rounded<T>(multiply_add(velocity, lookahead, d)) : velocity;
    momentum_buffer[i] = store<T>(velocity);
    return store<T>(multiply_add(d, step, w));
  });
}

template <typename T, bool kStreams>
void sgd_with(T* w, const T* b, const T* g, T* v, int64_t n, const SgdScalars& scalars) {
  if (scalars.momentum == 0) return sgd_plain<T, kStreams>(w, b, g, n, scalars);
  if (scalars.first && scalars.nesterov) return sgd_momentum<T, kStreams, true, true>(w, b, g, v, n, scalars);
  if (scalars.first) return sgd_momentum<T, kStreams, true, false>(w, b, g, v, n, scalars);
  if (scalars.nesterov) return sgd_momentum<T, kStreams, false, true>(w, b, g, v, n, scalars);
  return sgd_momentum<T, kStreams, false, false>(w, b, g, v, n, scalars);
}

template <typename T>
void sgd(void* param, const void* backup, const void* grad, void* momentum_buffer, int64_t n,
         const SgdScalars& scalars) {
  T* const w = static_cast<T*>(param);
  const T* const b = static_cast<const T*>(backup);
  const T* const g = static_cast<const T*>(grad);
  T* const v = static_cast<T*>(momentum_buffer);
  if (kCanStream && scalars.streams) {
    sgd_with<T, kCanStream>(w, b, g, v, n, scalars);
  } else {
    sgd_with<T, false>(w, b, g, v, n, scalars);
  }
}

// torch.lerp, which takes the end that is nearer as its base.
template <typename C>
inline C lerp(C start, C end, C weight) {
  return weight < C(0.5) ? multiply_add(weight, end - start, start) : multiply_add(weight - 1, end - start, end);
}

template <typename T, bool kStreams, bool kAmsgrad>
void adam_with(const AdamPointers& pointers, int64_t n, const AdamScalars& scalars) {
  using C = Compute<T>;
  T* const param = static_cast<T*>(pointers.param);
  const T* const backup = static_cast<const T*>(pointers.backup);
  const T* const grad = static_cast<const T*>(pointers.grad);
  T* const exp_avg = static_cast<T*>(pointers.exp_avg);
  T* const exp_avg_sq = static_cast<T*>(pointers.exp_avg_sq);
  T* const max_exp_avg_sq = static_cast<T*>(pointers.max_exp_avg_sq);

  const C sign = scalars.maximize ? -1 : 1;
  const C l2 = addition_scalar<T>(scalars.decoupled_weight_decay ? 0 : scalars.weight_decay);
  const double decay = scalars.decoupled_weight_decay ? scalars.weight_decay : 0;
  const float decay_of_tensor = static_cast<float>(scalars.lr) * static_cast<float>(decay);
  const C shrink = static_cast<C>(scalars.lr_is_float32 ? 1 - decay_of_tensor : 1 - scalars.lr * decay);
  const C weight1 = static_cast<C>(1 - scalars.beta1);
  const C beta2 = static_cast<C>(scalars.beta2), weight2 = static_cast<C>(1 - scalars.beta2);
  const C eps = addition_scalar<T>(scalars.eps), correction = static_cast<C>(scalars.bias_correction2_sqrt);
  const C step = static_cast<C>(-scalars.step_size);
  for_each_element<kStreams>(param, n, [=](int64_t i) {
    const C w = rounded<T>(load(backup[i]) * shrink);
    const C g = decayed<T>(w, grad[i], sign, l2);
    const C mean = rounded<T>(lerp(load(exp_avg[i]), g, weight1));
    C square = rounded<T>(load(exp_avg_sq[i]) * beta2);
    square = rounded<T>(multiply_add(weight2 * g, g, square));
    exp_avg[i] = store<T>(mean);
    exp_avg_sq[i] = store<T>(square);
    if (kAmsgrad) {
      const C largest = load(max_exp_avg_sq[i]);
      square = square > largest || square != square ? square : largest;
      max_exp_avg_sq[i] = store<T>(square);
    }
    const C root = rounded<T>(std::sqrt(square));
    const C denominator = rounded<T>(rounded<T>(root / correction) + eps);
    return store<T>(w + step * mean / denominator);
  });
}

template <typename T>
void adam(const AdamPointers& pointers, int64_t n, const AdamScalars& scalars) {
  if (pointers.max_exp_avg_sq != nullptr) {
    adam_with<T, false, true>(pointers, n, scalars);
  } else if (kCanStream && scalars.streams) {
    adam_with<T, kCanStream, false>(pointers, n, scalars);
  } else {
    adam_with<T, false, false>(pointers, n, scalars);
  }
}
