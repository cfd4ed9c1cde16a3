// ||T(w) g||^2 of one piece. Included once per instruction set, inside its namespace.
//
// Squares of float32 are exact in float64, and the lanes are the same on every instruction set: so are the bits.

constexpr int kNormLanes = 32;
constexpr int kNormVectors = kNormLanes * 8 / kVectorBytes;
constexpr int kDoubles = kVectorBytes / 8;

typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef float HalfFloatVector __attribute__((vector_size(kVectorBytes / 2)));

inline DoubleVector load_doubles(const float* values) {
#if ESAM_VECTOR_BYTES == 64
  return (DoubleVector)_mm512_cvtps_pd(_mm256_loadu_ps(values));
#elif ESAM_VECTOR_BYTES == 32
  return (DoubleVector)_mm256_cvtps_pd(_mm_loadu_ps(values));
#else
  DoubleVector result;
  for (int lane = 0; lane < kDoubles; ++lane) result[lane] = values[lane];
  return result;
#endif
}

inline DoubleVector load_doubles(const double* values) {
  DoubleVector result;
  __builtin_memcpy(&result, values, sizeof(result));
  return result;
}

// The sum of f(i) over [0, n): `vector(i)` gives elements i .. i + kDoubles, `scalar(i)` one. They read `values`.
template <typename C, typename VectorTerm, typename ScalarTerm>
inline double sum_in_lanes(const C* values, int64_t n, VectorTerm vector, ScalarTerm scalar) {
  DoubleVector sums[kNormVectors] = {};
  int64_t i = 0;
  for (; i + kNormLanes <= n; i += kNormLanes) {
    prefetch(values + i, kNormLanes * sizeof(C));
#pragma GCC unroll 16
    for (int v = 0; v < kNormVectors; ++v) sums[v] += vector(i + v * kDoubles);
  }
  double lanes[kNormLanes];
  __builtin_memcpy(lanes, sums, sizeof(lanes));
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += scalar(i);
  for (int width = kNormLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Half precision passes through a buffer in the first-level cache; float32 and float64 are read where they are.
constexpr int64_t kNormBuffer = 1024;

template <typename C>
struct Buffered {
  C values[kNormBuffer];

  const C* read(const C* source, int64_t) { return source; }

  template <typename T>
  const C* read(const T* source, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = load(source[i]);
    return values;
  }
};

// How much is summed at a time.
template <typename T>
inline int64_t norm_block(int64_t n) {
  return std::is_same<T, Compute<T>>::value ? n : kNormBuffer;
}

template <typename T>
double squared_norm(const void* grad, int64_t n) {
  using C = Compute<T>;
  Buffered<C> buffer;
  double total = 0;
  for (int64_t start = 0; start < n; start += norm_block<T>(n)) {
    const int64_t size = std::min(norm_block<T>(n), n - start);
    const C* g = buffer.read(static_cast<const T*>(grad) + start, size);
    total += sum_in_lanes(
        g, size,
        [=](int64_t i) {
          const DoubleVector x = load_doubles(g + i);
          return x * x;
        },
        [=](int64_t i) { return static_cast<double>(g[i]) * static_cast<double>(g[i]); });
  }
  return total;
}

template <typename T>
double scaled_squared_norm(const void* param, const void* grad, int64_t n, double eta) {
  using C = Compute<T>;
  Buffered<C> param_buffer, grad_buffer;
  double total = 0;
  for (int64_t start = 0; start < n; start += norm_block<T>(n)) {
    const int64_t size = std::min(norm_block<T>(n), n - start);
    const C* w = param_buffer.read(static_cast<const T*>(param) + start, size);
    const C* g = grad_buffer.read(static_cast<const T*>(grad) + start, size);
    total += sum_in_lanes(
        g, size,
        [=](int64_t i) {
          const DoubleVector x = load_doubles(w + i);
          const DoubleVector scaled = load_doubles(g + i) * ((x < 0 ? -x : x) + eta);
          return scaled * scaled;
        },
        [=](int64_t i) {
          const double scaled = static_cast<double>(g[i]) * (std::fabs(static_cast<double>(w[i])) + eta);
          return scaled * scaled;
        });
  }
  return total;
}
