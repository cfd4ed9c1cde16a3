// Storage types and the type they are computed in. Included once per instruction set, inside its namespace.
// The conversions are branch-free integer arithmetic, which every instruction set vectorises.

template <typename To, typename From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

// An unsigned integer of the storage type's size.
template <typename T>
struct BitsType {
  using type = uint16_t;
};
template <>
struct BitsType<float> {
  using type = uint32_t;
};
template <>
struct BitsType<double> {
  using type = uint64_t;
};
template <typename T>
using Bits = typename BitsType<T>::type;

inline float load(float value) { return value; }
inline double load(double value) { return value; }

// The bits of a storage type in 32-bit lanes, and the value that they stand for.
template <typename T>
inline float value_of(uint32_t bits);
template <typename T>
inline uint32_t bits_of(float value);

template <>
inline float value_of<BFloat16>(uint32_t bits) {
  return bit_cast<float>(bits << 16);
}

template <>
inline float value_of<Float16>(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16;
  const uint32_t magnitude = (bits & 0x7FFF) << 13;
  // Rebias the exponent by 127 - 15; infinities and NaNs need it once more. The product is exact, subnormals included.
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7F800000u;
  return bit_cast<float>((magnitude >= (0x7C00u << 13) ? special : bit_cast<uint32_t>(finite)) | sign);
}

template <>
inline uint32_t bits_of<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return value != value ? 0x7FC0u : rounded;
}

template <>
inline uint32_t bits_of<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 2^-1 lines their last bit up with float32's, so the addition rounds them.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return result | sign;
}

inline float load(BFloat16 value) { return value_of<BFloat16>(value.bits); }
inline float load(Float16 value) { return value_of<Float16>(value.bits); }

template <typename T>
inline T store(Compute<T> value) {
  return {static_cast<Bits<T>>(bits_of<T>(value))};
}
template <>
inline float store<float>(float value) {
  return value;
}
template <>
inline double store<double>(double value) {
  return value;
}

// The value after a trip through memory: torch's unfused optimizers round to the storage type after every operation.
// It stays in 32-bit lanes.
template <typename T>
inline Compute<T> rounded(Compute<T> value) {
  if constexpr (std::is_same<T, Compute<T>>::value) {
    return value;
  } else {
    return value_of<T>(bits_of<T>(value));
  }
}

// a * b + c, rounded once, as torch's vectorised kernels do it. Without an instruction for it, float32 goes by way of
// float64, where the product is exact, and float64 through the C library.
inline float multiply_add(float a, float b, float c) {
#if ESAM_VECTOR_BYTES > 16
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
