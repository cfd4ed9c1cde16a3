// Stores past the caches. Included once per instruction set, inside its namespace.
//
// An ordinary store first reads the line that it writes to. Where all of a line is written, and nobody reads it soon,
// a non-temporal store spares that third of the traffic. The portable build has no such store, and no loop over lines:
// gcc 12 rounds the second multiply_add of some of their elements twice where it vectorises them for SSE2.

constexpr int64_t kLineBytes = 64;

// Asks the second-level cache for the lines that a stream of reads will come to: the hardware's own prefetching ends
// with the page.
inline void prefetch(const void* position, int64_t bytes) {
  constexpr int64_t kAhead = 8192;
  constexpr int kForReading = 0, kSecondLevel = 2;
  for (int64_t line = 0; line < bytes; line += kLineBytes) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(position) + kAhead + line;  // perhaps of nobody: no harm
    __builtin_prefetch(reinterpret_cast<const void*>(address), kForReading, kSecondLevel);
  }
}

constexpr bool kCanStream = kVectorBytes > 16;

inline void stream_line(void* destination, const void* source) {
#if ESAM_VECTOR_BYTES == 64
  _mm512_stream_si512(static_cast<__m512i*>(destination), _mm512_loadu_si512(source));
#elif ESAM_VECTOR_BYTES == 32
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(static_cast<__m256i*>(destination) + i,
                        _mm256_loadu_si256(static_cast<const __m256i*>(source) + i));
  }
#endif
}

// Makes them visible to other threads.
inline void stream_fence() {
#if ESAM_VECTOR_BYTES > 16
  _mm_sfence();
#endif
}

// Elements at a time: whole lines of every type, and more than gcc unrolls before it vectorises.
constexpr int64_t kStreamBlock = 64;

// out[i] = element(i). `element` may read and write other memory at i, but no other element's.
template <bool kStreams, typename T, typename Element>
inline void for_each_element(T* out, int64_t n, Element element) {
  static_assert(kCanStream || !kStreams);
  int64_t i = 0;
  if (kStreams) {
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out) % kLineBytes / sizeof(T);
    const int64_t head = std::min(n, (kLine - misaligned) % kLine);
    for (; i < head; ++i) out[i] = element(i);
    for (; i + kStreamBlock <= n; i += kStreamBlock) {
      alignas(kLineBytes) T lines[kStreamBlock];
      ESAM_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < kStreamBlock; ++j) lines[j] = element(i + j);
      for (int64_t j = 0; j < kStreamBlock; j += kLine) stream_line(out + i + j, lines + j);
    }
    stream_fence();
  }
  ESAM_INDEPENDENT_ITERATIONS
  for (int64_t j = i; j < n; ++j) out[j] = element(j);
}

// The C library's copy of many bytes is one instruction, which a page fault interrupts at a high price, or goes past
// the caches, where the kernel has just filled a new page with zeros.
inline void copy(void* destination, const void* source, int64_t bytes) {
  typedef char Line __attribute__((vector_size(kLineBytes), aligned(1), may_alias));
  char* const to = static_cast<char*>(destination);
  const char* const from = static_cast<const char*>(source);
  int64_t i = 0;
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    prefetch(from + i, kLineBytes);
    *reinterpret_cast<Line*>(to + i) = *reinterpret_cast<const Line*>(from + i);
  }
  __builtin_memcpy(to + i, from + i, bytes - i);
}

inline void stream(void* destination, const void* source, int64_t bytes) {
  if (!kCanStream) return copy(destination, source, bytes);
  char* const to = static_cast<char*>(destination);
  const char* const from = static_cast<const char*>(source);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(to) % kLineBytes;
  int64_t i = std::min(bytes, (kLineBytes - misaligned) % kLineBytes);
  __builtin_memcpy(to, from, i);
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    prefetch(from + i, kLineBytes);
    stream_line(to + i, from + i);
  }
  stream_fence();
  __builtin_memcpy(to + i, from + i, bytes - i);
}
