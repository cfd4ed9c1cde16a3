// Stochastic Weight Perturbation of one piece (Eq. 4 and 5). Included once per instruction set, inside its namespace.

constexpr int64_t kMaskBuffer = 1024;  // Philox words at a time: 4 KiB, at home in the first-level cache

// Rounded after each operation, as the reference does it, so that the two agree bit for bit.
template <typename T, bool kAdaptive>
inline T moved(T param, T grad, Compute<T> factor, Compute<T> eta) {
  const Compute<T> w = load(param);
  Compute<T> direction = load(grad);
  if (kAdaptive) {
    const Compute<T> scaling = (w < 0 ? -w : w) + eta;
    direction = direction * (scaling * scaling);
  }
  return store<T>(w + factor * direction);
}

// `backup` may be `grad`: each element is read before it is written, so no iteration depends on another.
template <typename T, bool kAdaptive>
void perturb_all(T* param, const T* grad, T* backup, int64_t n, Compute<T> factor, Compute<T> eta) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T w = param[i];
    param[i] = moved<T, kAdaptive>(w, grad[i], factor, eta);
    backup[i] = w;
  }
}

template <typename T, bool kAdaptive>
void perturb_drawn(T* param, const T* grad, T* backup, int64_t n, Compute<T> factor, Compute<T> eta,
                   const uint32_t* words, uint32_t bound) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T w = param[i];
    const T perturbed = moved<T, kAdaptive>(w, grad[i], factor, eta);
    // As integers: gcc does not vectorise a choice between structs.
    const Bits<T> drawn = static_cast<Bits<T>>(-static_cast<Bits<T>>(words[i] <= bound));
    const Bits<T> chosen = (bit_cast<Bits<T>>(perturbed) & drawn) | (bit_cast<Bits<T>>(w) & ~drawn);
    param[i] = bit_cast<T>(chosen);
    backup[i] = w;
  }
}

template <typename T, bool kAdaptive>
void perturb_with(T* param, const T* grad, T* backup, int64_t n, int64_t element, const PerturbScalars& scalars) {
  const Compute<T> factor = static_cast<Compute<T>>(scalars.factor), eta = static_cast<Compute<T>>(scalars.eta);
  if (scalars.mask == nullptr) {
    perturb_all<T, kAdaptive>(param, grad, backup, n, factor, eta);
    return;
  }
  const ElementMask& mask = *scalars.mask;
  alignas(64) uint32_t words[kMaskBuffer];
  for (int64_t start = 0; start < n; start += kMaskBuffer) {
    const int64_t size = std::min(kMaskBuffer, n - start);
    philox_words(static_cast<uint64_t>(element + start) / 4, (size + 3) / 4, mask.step, mask.seed, words);
    perturb_drawn<T, kAdaptive>(param + start, grad + start, backup + start, size, factor, eta, words, mask.bound);
  }
}

template <typename T>
void perturb(void* param, const void* grad, void* backup, int64_t n, int64_t element, const PerturbScalars& scalars) {
  T* const w = static_cast<T*>(param);
  const T* const g = static_cast<const T*>(grad);
  T* const b = static_cast<T*>(backup);
  if (scalars.adaptive) {
    perturb_with<T, true>(w, g, b, n, element, scalars);
  } else {
    perturb_with<T, false>(w, g, b, n, element, scalars);
  }
}
