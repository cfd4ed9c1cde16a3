// Stochastic Weight Perturbation of one piece (Eq. 4 and 5). Included once per instruction set, inside its namespace.

// Elements at a time: so few that the processor draws the next ones' words while it waits for these ones' memory.
constexpr int64_t kPerturbBlock = 4 * kBlockCounters;

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
inline void perturb_all(T* param, const T* grad, T* backup, int64_t n, Compute<T> factor, Compute<T> eta) {
  ESAM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const T w = param[i];
    param[i] = moved<T, kAdaptive>(w, grad[i], factor, eta);
    backup[i] = w;
  }
}

template <typename T, bool kAdaptive>
inline void perturb_drawn(T* param, const T* grad, T* backup, int64_t n, Compute<T> factor, Compute<T> eta,
                          const uint32_t* words, uint32_t bound) {
#if defined(__clang__)
  // clang folds the choice into the sum, w + (drawn ? step : -0), which would quiet a signalling NaN that is to stay.
  T values[kPerturbBlock];
  for (int64_t i = 0; i < n; ++i) values[i] = moved<T, kAdaptive>(param[i], grad[i], factor, eta);
  asm volatile("" : : "r"(values) : "memory");
#endif
  ESAM_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < n; ++i) {
    const T w = param[i];
#if defined(__clang__)
    const T perturbed = values[i];
#else
    const T perturbed = moved<T, kAdaptive>(w, grad[i], factor, eta);
#endif
    // As integers: gcc does not vectorise a choice between structs.
    const Bits<T> drawn = static_cast<Bits<T>>(-static_cast<Bits<T>>(words[i] <= bound));
    const Bits<T> chosen = (bit_cast<Bits<T>>(perturbed) & drawn) | (bit_cast<Bits<T>>(w) & ~drawn);
    param[i] = bit_cast<T>(chosen);
    backup[i] = w;
  }
}

// Calls body(start, size) for the blocks of a piece, having asked for memory further on. Whole blocks get their size as
// a constant.
template <typename T, typename Body>
inline void for_each_block_ahead(const T* param, const T* grad, int64_t n, const Body& body) {
  int64_t start = 0;
  for (; start + kPerturbBlock <= n; start += kPerturbBlock) {
    prefetch(param + start, kPerturbBlock * sizeof(T));
    prefetch(grad + start, kPerturbBlock * sizeof(T));
    body(start, kPerturbBlock);
  }
  if (start < n) body(start, n - start);
}

template <typename T, bool kAdaptive>
void perturb_with(T* param, const T* grad, T* backup, int64_t n, int64_t element, const PerturbScalars& scalars) {
  const Compute<T> factor = static_cast<Compute<T>>(scalars.factor), eta = static_cast<Compute<T>>(scalars.eta);
  if (scalars.mask == nullptr) {
    for_each_block_ahead(param, grad, n, [=](int64_t i, int64_t size) __attribute__((always_inline)) {
      perturb_all<T, kAdaptive>(param + i, grad + i, backup + i, size, factor, eta);
    });
    return;
  }
  const ElementMask& mask = *scalars.mask;
  for_each_block_ahead(param, grad, n, [=](int64_t i, int64_t size) __attribute__((always_inline)) {
    alignas(64) uint32_t words[kPerturbBlock];
    philox_block(static_cast<uint64_t>((element + i) >> 2), mask.step, mask.seed, words);
    perturb_drawn<T, kAdaptive>(param + i, grad + i, backup + i, size, factor, eta, words, mask.bound);
  });
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
