// Per-sample cross-entropy of one row (section 2.3). Included once per instruction set, inside its namespace.
//
// With q the smoothed target distribution and x shifted by its maximum:
//   loss = sum(q) log sum exp(x) - sum(q x),   d loss / d x = sum(q) softmax(x) - q
// Sums run in the same lanes on every instruction set, blocks in float32 and their totals in float64.

constexpr int kLanes = 32;
constexpr int kVectors = kLanes / kFloats;
constexpr int64_t kBlock = 1024;  // logits at a time: 4 KiB, at home in the first-level cache

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// One block of a row as float32, in whole lanes: what lies beyond the row reads as `padding`.
struct Block {
  alignas(64) float values[kBlock];

  template <typename T>
  const float* read(const T* source, int64_t n, float padding) {
    prefetch(source, n * sizeof(T));
    for (int64_t i = 0; i < n; ++i) values[i] = load(source[i]);
    for (int64_t i = n; i < whole_lanes(n); ++i) values[i] = padding;
    return values;
  }

  const float* read(const float* source, int64_t n, float padding) {
    return n % kLanes == 0 ? source : read<float>(source, n, padding);
  }
};

inline double total_of(const FloatVector* sums) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, sums, sizeof(lanes));
  double totals[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) totals[lane] = lanes[lane];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) totals[lane] += totals[lane + width];
  }
  return totals[0];
}

// sum of term(i) over whole lanes of a block, where term gives the vector that starts at i.
template <typename Term>
inline double sum_of(int64_t n, Term term) {
  FloatVector sums[kVectors] = {};
  for (int64_t i = 0; i < whole_lanes(n); i += kLanes) {
    for (int v = 0; v < kVectors; ++v) sums[v] += term(i + v * kFloats);
  }
  return total_of(sums);
}

// Calls body(start, size) for the blocks of a row.
template <typename Body>
inline void for_each_block(int64_t classes, Body body) {
  for (int64_t start = 0; start < classes; start += kBlock) body(start, std::min(kBlock, classes - start));
}

// A stretch of a row as whole lanes: those of `body`, and one more of `tail` where `size` is no multiple of them.
struct Stretch {
  const float* body;
  const float* tail;
  int64_t size;

  template <typename Visit>
  void for_each(Visit visit) const {
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) visit(body + i);
    if (whole < size) visit(tail);
  }
};

template <typename T>
inline Stretch lanes_of(const T* source, int64_t n, float padding, Block& block) {
  const float* const values = block.read<T>(source, n, padding);
  return {values, values + n / kLanes * kLanes, n};
}

// Float32 is read where it is, up to its last lanes.
inline Stretch lanes_of(const float* source, int64_t n, float padding, Block& block) {
  const int64_t whole = n / kLanes * kLanes;
  return {source, block.read<float>(source + whole, n - whole, padding), n};
}

// NaN is passed over; it comes back through the sum of exponentials.
inline float max_of(const Stretch& row) {
  FloatVector largest[kVectors];
  for (FloatVector& vector : largest) vector = FloatVector{} - INFINITY;
  row.for_each([&](const float* x) {
    for (int v = 0; v < kVectors; ++v) {
      const FloatVector value = load_floats(x + v * kFloats);
      largest[v] = value > largest[v] ? value : largest[v];
    }
  });
  float lanes[kLanes];
  __builtin_memcpy(lanes, largest, sizeof(lanes));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] = std::max(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

inline double sum_of_exponentials(const Stretch& row, float max) {
  FloatVector sums[kVectors] = {};
  row.for_each([&](const float* x) {
    prefetch(x, kLanes * sizeof(float));
    for (int v = 0; v < kVectors; ++v) sums[v] += exp(load_floats(x + v * kFloats) - max);
  });
  return total_of(sums);
}

struct MaxAndSum {
  float max;
  double sum;  // of exp(x - max)
};

// Block by block, each in the first-level cache: where the maximum grows, the sum so far is scaled down (online
// softmax).
template <typename T>
MaxAndSum max_and_sum(const T* logits, int64_t classes) {
  Block block;
  MaxAndSum row{-INFINITY, 0};
  for_each_block(classes, [&](int64_t start, int64_t size) {
    const Stretch lanes = lanes_of(logits + start, size, -INFINITY, block);
    const float max = std::max(row.max, max_of(lanes));
    if (max > row.max && row.sum != 0) row.sum *= std::exp(static_cast<double>(row.max) - max);
    row.max = max;
    // Where all so far is -inf, 0 in its place: they count nothing, but NaN stays NaN.
    row.sum += sum_of_exponentials(lanes, std::isinf(max) && max < 0 ? 0.0f : max);
  });
  return row;
}

// sum(x - max), for the uniform part of a smoothed target
template <typename T>
double sum_of_shifted(const T* logits, int64_t classes, float max) {
  Block block;
  double total = 0;
  for_each_block(classes, [&](int64_t start, int64_t size) {
    const float* x = block.read(logits + start, size, max);
    total += sum_of(size, [=](int64_t i) { return load_floats(x + i) - max; });
  });
  return total;
}

inline double sum_of_target(const float* probability, int64_t classes) {
  Block block;
  double total = 0;
  for_each_block(classes, [&](int64_t start, int64_t size) {
    const float* q = block.read(probability + start, size, 0);
    total += sum_of(size, [=](int64_t i) { return load_floats(q + i); });
  });
  return total;
}

// sum(q (x - max)), where q = probability * share + uniform. Smoothed before the product: 0 times a logit of -inf is
// NaN, the smoothed probability times it is not.
template <typename T>
double sum_of_products(const T* logits, const float* probability, int64_t classes, float max, float share,
                       float uniform) {
  Block logits_block, target_block;
  double total = 0;
  for_each_block(classes, [&](int64_t start, int64_t size) {
    const float* x = logits_block.read(logits + start, size, max);
    const float* q = target_block.read(probability + start, size, 0);
    total +=
        sum_of(size, [=](int64_t i) { return (load_floats(q + i) * share + uniform) * (load_floats(x + i) - max); });
  });
  return total;
}

template <typename T>
Normalizer cross_entropy_forward(const CrossEntropyRows& rows, int64_t row, float* loss) {
  const int64_t classes = rows.classes;
  const T* const logits = static_cast<const T*>(rows.logits) + row * classes;
  const auto [max, sum] = max_and_sum(logits, classes);
  const double log_sum = std::log(sum);
  const Normalizer normalizer{max, static_cast<float>(log_sum)};

  const double smoothing = rows.label_smoothing, uniform = smoothing / classes;
  double target_sum = 1, product_sum;
  if (rows.probability != nullptr) {
    const float* const q = rows.probability + row * classes;
    target_sum = sum_of_target(q, classes) * (1 - smoothing) + smoothing;
    product_sum = sum_of_products(logits, q, classes, max, 1 - smoothing, uniform);
  } else if (rows.index[row] == rows.ignore_index) {
    *loss = 0;
    return normalizer;
  } else {
    product_sum = load(logits[rows.index[row]]) - max;
    if (smoothing != 0) {
      product_sum = product_sum * (1 - smoothing) + sum_of_shifted(logits, classes, max) * uniform;
    }
  }
  *loss = static_cast<float>(target_sum * log_sum - product_sum);
  return normalizer;
}

// Where the results of a block are computed: in a buffer, or in place where they are float32 in whole lanes.
template <typename T>
inline float* room_for(T*, int64_t, Block& block) {
  return block.values;
}
inline float* room_for(float* destination, int64_t n, Block& block) {
  return n % kLanes == 0 ? destination : block.values;
}

template <typename T>
inline void write(T* destination, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) destination[i] = store<T>(values[i]);
}

// grad_logits[i] <- (softmax * target_sum - q) grad_loss, where q = probability * share + uniform
template <typename T>
void write_gradient(const T* logits, const float* probability, T* grad_logits, int64_t classes,
                    const Normalizer& normalizer, float target_sum, float share, float uniform, float grad_loss) {
  Block logits_block, target_block, result_block;
  for_each_block(classes, [&](int64_t start, int64_t size) {
    const float* x = logits_block.read(logits + start, size, -INFINITY);
    const float* q = probability == nullptr ? nullptr : target_block.read(probability + start, size, 0);
    float* const result = room_for(grad_logits + start, size, result_block);
    for (int64_t i = 0; i < whole_lanes(size); i += kLanes) {
      prefetch(x + i, kLanes * sizeof(float));
      for (int v = 0; v < kLanes; v += kFloats) {
        FloatVector target = FloatVector{} + uniform;
        if (q != nullptr) target += load_floats(q + i + v) * share;
        const FloatVector softmax = exp(load_floats(x + i + v) - normalizer.max - normalizer.log_sum);
        store_floats(result + i + v, (softmax * target_sum - target) * grad_loss);
      }
    }
    if (static_cast<const void*>(result) != grad_logits + start) write(grad_logits + start, result, size);
  });
}

template <typename T>
void cross_entropy_backward(const CrossEntropyRows& rows, int64_t row, float grad_loss, const Normalizer& normalizer,
                            void* grad_logits) {
  const int64_t classes = rows.classes;
  const T* const logits = static_cast<const T*>(rows.logits) + row * classes;
  T* const gradient = static_cast<T*>(grad_logits) + row * classes;
  const double smoothing = rows.label_smoothing, uniform = smoothing / classes;
  if (rows.probability != nullptr) {
    const float* const q = rows.probability + row * classes;
    const double target_sum = sum_of_target(q, classes) * (1 - smoothing) + smoothing;
    write_gradient(logits, q, gradient, classes, normalizer, target_sum, 1 - smoothing, uniform, grad_loss);
    return;
  }
  const int64_t target = rows.index[row];
  if (target == rows.ignore_index) {
    std::fill(gradient, gradient + classes, T{});
    return;
  }
  write_gradient<T>(logits, nullptr, gradient, classes, normalizer, 1, 1, uniform, grad_loss);
  const double softmax = std::exp(static_cast<double>(load(logits[target])) - normalizer.max - normalizer.log_sum);
  gradient[target] = store<T>(static_cast<float>((softmax - (1 - smoothing) - uniform) * grad_loss));
}
