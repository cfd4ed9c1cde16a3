// exp over a vector of float32. Included once per instruction set, inside its namespace.

constexpr int kFloats = kVectorBytes / 4;

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));

inline FloatVector load_floats(const float* values) {
  FloatVector result;
  __builtin_memcpy(&result, values, sizeof(result));
  return result;
}

inline void store_floats(float* values, FloatVector vector) { __builtin_memcpy(values, &vector, sizeof(vector)); }

// For x up to 88: within 2 units in the last place; 0 where the result would be subnormal; NaN stays NaN.
inline FloatVector exp(FloatVector x) {
  constexpr float kSmallest = -87.33654f;  // log of the smallest normal number
  constexpr float kLog2E = 1.442695041f;
  constexpr float kRounding = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

  // x = k ln 2 + r, |r| <= ln 2 / 2; k kLn2High is exact
  const FloatVector shifted = x * kLog2E + kRounding;
  const FloatVector k = shifted - kRounding;
  const FloatVector r = (x - k * kLn2High) - k * kLn2Low;
  const FloatVector two_to_k = (FloatVector)(((IntVector)shifted + 127) << 23);

  // Minimax polynomial of (exp(r) - 1 - r) / r^2 (Cephes)
  FloatVector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const FloatVector result = (p * (r * r) + r + 1.0f) * two_to_k;
  return x < kSmallest ? FloatVector{} : result;
}
