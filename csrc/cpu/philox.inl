// Philox words for consecutive counters, vectorised. Included once per instruction set, inside its namespace.
//
// A counter's four state words live in the low halves of four vectors of 64-bit lanes. The 32 x 32 -> 64 multiply reads
// only low halves, so what accumulates in the high halves never matters and nothing is masked between rounds.

#if defined(__x86_64__)

constexpr int kCounters = kVectorBytes / 8;  // counters in a vector

typedef uint64_t Lanes __attribute__((vector_size(kVectorBytes)));

inline Lanes broadcast(uint64_t value) { return Lanes{} + value; }

inline Lanes multiply_low_halves(Lanes a, Lanes b) {
#if ESAM_VECTOR_BYTES == 64
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ESAM_VECTOR_BYTES == 32
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

inline Lanes interleave_even(Lanes a, Lanes b) {
#if ESAM_VECTOR_BYTES == 64
  return (Lanes)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif ESAM_VECTOR_BYTES == 32
  return (Lanes)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return (Lanes)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
#endif
}

inline Lanes interleave_odd(Lanes a, Lanes b) {
#if ESAM_VECTOR_BYTES == 64
  return (Lanes)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif ESAM_VECTOR_BYTES == 32
  return (Lanes)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return (Lanes)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
#endif
}

// The counters of a vector, in the order that makes interleave_even and interleave_odd write them out ascending.
inline Lanes counters_from(uint64_t first) {
  Lanes counters;
  for (int lane = 0; lane < kCounters; ++lane) counters[lane] = first + lane / 2 + (lane % 2) * (kCounters / 2);
  return counters;
}

inline void philox_vector(Lanes counter, uint64_t step, uint64_t seed, uint32_t* words) {
  const Lanes multiplier0 = broadcast(kPhiloxMultiplier0), multiplier1 = broadcast(kPhiloxMultiplier1);
  Lanes c0 = counter, c1 = counter >> 32, c2 = broadcast(step), c3 = broadcast(step >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes product0 = multiply_low_halves(c0, multiplier0);
    const Lanes product1 = multiply_low_halves(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ broadcast(k0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ broadcast(k1);
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  const Lanes low = broadcast(0xFFFFFFFF);
  const Lanes words01 = (c0 & low) | (c1 << 32), words23 = (c2 & low) | (c3 << 32);
  const Lanes first_half = interleave_even(words01, words23), second_half = interleave_odd(words01, words23);
  __builtin_memcpy(words, &first_half, sizeof(Lanes));
  __builtin_memcpy(words + 2 * kCounters, &second_half, sizeof(Lanes));
}

#endif

inline void philox_words(uint64_t first, int64_t n, uint64_t step, uint64_t seed, uint32_t* words) {
  int64_t i = 0;
#if defined(__x86_64__)
  Lanes counters = counters_from(first);
  for (; i + kCounters <= n; i += kCounters, counters += kCounters) {
    philox_vector(counters, step, seed, words + 4 * i);
  }
#endif
  for (; i < n; ++i) {
    const PhiloxWords four = philox(first + i, step, seed);
    for (int j = 0; j < 4; ++j) words[4 * i + j] = four.word[j];
  }
}

// The words of a constant number of counters: no loop remains.
constexpr int kBlockCounters = 16;

inline void philox_block(uint64_t first, uint64_t step, uint64_t seed, uint32_t* words) {
#if defined(__x86_64__)
  Lanes counters = counters_from(first);
  for (int i = 0; i < kBlockCounters; i += kCounters, counters += kCounters) {
    philox_vector(counters, step, seed, words + 4 * i);
  }
#else
  philox_words(first, kBlockCounters, step, seed, words);
#endif
}
