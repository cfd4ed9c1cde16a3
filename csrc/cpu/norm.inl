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

inline DoubleVector load_doubles(const BFloat16* values) {
#if ESAM_VECTOR_BYTES == 64
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return (DoubleVector)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
#elif ESAM_VECTOR_BYTES == 32
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
  return (DoubleVector)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16)));
#else
  DoubleVector result;
  for (int lane = 0; lane < kDoubles; ++lane) result[lane] = load(values[lane]);
  return result;
#endif
}

inline DoubleVector load_doubles(const double* values) {
  DoubleVector result;
  __builtin_memcpy(&result, values, sizeof(result));
  return result;
}

// The sum of f(i) over [0, n): `vector(i)` gives elements i .. i + kDoubles, `scalar(i)` one. They read `values`.
template <typename T, typename VectorTerm, typename ScalarTerm>
inline double sum_in_lanes(const T* values, int64_t n, VectorTerm vector, ScalarTerm scalar) {
  DoubleVector sums[kNormVectors] = {};
  int64_t i = 0;
  for (; i + kNormLanes <= n; i += kNormLanes) {
    prefetch(values + i, kNormLanes * sizeof(T));
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

// Half precision is summed so many elements at a time; float16 passes through a buffer in the first-level cache.
constexpr int64_t kNormBlock = 1024;

template <typename T>
struct Readable {
  const T* read(const T* source, int64_t) { return source; }
};

template <>
struct Readable<Float16> {
  float values[kNormBlock];

  const float* read(const Float16* source, int64_t n) {
    prefetch(source, n * sizeof(Float16));
    for (int64_t i = 0; i < n; ++i) values[i] = load(source[i]);
    return values;
  }
};

// How much is summed at a time.
template <typename T>
inline int64_t norm_block(int64_t n) {
  return std::is_same<T, Compute<T>>::value ? n : kNormBlock;
}

template <typename T>
double squared_norm(const void* grad, int64_t n) {
  Readable<T> readable;
  double total = 0;
  for (int64_t start = 0; start < n; start += norm_block<T>(n)) {
    const int64_t size = std::min(norm_block<T>(n), n - start);
    const auto* g = readable.read(static_cast<const T*>(grad) + start, size);
    total += sum_in_lanes(
        g, size,
        [=](int64_t i) {
          const DoubleVector x = load_doubles(g + i);
          return x * x;
        },
        [=](int64_t i) {
          const double x = load(g[i]);
          return x * x;
        });
  }
  return total;
}

template <typename T>
double scaled_squared_norm(const void* param, const void* grad, int64_t n, double eta) {
  Readable<T> readable_param, readable_grad;
  double total = 0;
  for (int64_t start = 0; start < n; start += norm_block<T>(n)) {
    const int64_t size = std::min(norm_block<T>(n), n - start);
    const auto* w = readable_param.read(static_cast<const T*>(param) + start, size);
    const auto* g = readable_grad.read(static_cast<const T*>(grad) + start, size);
    total += sum_in_lanes(
        g, size,
        [=](int64_t i) {
          const DoubleVector x = load_doubles(w + i);
          const DoubleVector scaled = load_doubles(g + i) * ((x < 0 ? -x : x) + eta);
          return scaled * scaled;
        },
        [=](int64_t i) {
          const double scaled = static_cast<double>(load(g[i])) * (std::fabs(static_cast<double>(load(w[i]))) + eta);
          return scaled * scaled;
        });
  }
  return total;
}
