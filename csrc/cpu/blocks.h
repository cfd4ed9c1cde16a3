// Many tensors as one run of work: cut into chunks, and shared out between the threads by elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace esam::cpu {

// A dense tensor as memory. `data` is in the order of its storage.
struct Block {
  char* data;
  int64_t numel;
  Dtype dtype;
};

inline int64_t element_size(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// A chunk is the unit in which gradients are summed, and what a thread handles at a time: 32 KiB of float32 an operand,
// so that a chunk's operands fit the second-level cache, and its bookkeeping costs nothing. A multiple of 4 elements.
constexpr int64_t kChunk = 8192;

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kGrain = 32768;

struct Chunk {
  int64_t tensor;
  int64_t start;  // first element within the tensor
  int64_t length;
  int64_t number;  // among all chunks of all tensors
};

class Chunks {
 public:
  explicit Chunks(const std::vector<Block>& blocks) {
    first_element_.reserve(blocks.size() + 1);
    first_chunk_.reserve(blocks.size() + 1);
    int64_t elements = 0, chunks = 0;
    for (const Block& block : blocks) {
      first_element_.push_back(elements);
      first_chunk_.push_back(chunks);
      elements += block.numel;
      chunks += (block.numel + kChunk - 1) / kChunk;
    }
    first_element_.push_back(elements);
    first_chunk_.push_back(chunks);
  }

  int64_t count() const { return first_chunk_.back(); }

  // Calls body(chunk) for every chunk. A thread takes those that start within its share of the elements, so what a
  // chunk holds never depends on the number of threads.
  template <typename Body>
  void for_each(const Body& body) const {
    parallel_for(first_element_.back(), kGrain, [&](int64_t begin, int64_t end) { visit(begin, end, body); });
  }

 private:
  template <typename Body>
  void visit(int64_t begin, int64_t end, const Body& body) const {
    const auto after = std::upper_bound(first_element_.begin(), first_element_.end() - 1, begin);
    for (int64_t tensor = after - first_element_.begin() - 1; first_element_[tensor] < end; ++tensor) {
      const int64_t first = first_element_[tensor], numel = first_element_[tensor + 1] - first;
      int64_t number = (std::max<int64_t>(begin - first, 0) + kChunk - 1) / kChunk;
      for (int64_t start = number * kChunk; start < numel && first + start < end; start += kChunk, ++number) {
        body(Chunk{tensor, start, std::min(kChunk, numel - start), first_chunk_[tensor] + number});
      }
    }
  }

  std::vector<int64_t> first_element_;  // of each tensor, and the total
  std::vector<int64_t> first_chunk_;
};

}  // namespace esam::cpu
