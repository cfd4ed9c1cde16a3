// Every kernel, compiled for the instruction set that the including file selected.
// ESAM_ISA names it; ESAM_VECTOR_BYTES is the width of its registers. Standard headers come before the target pragma,
// so that nothing they define is compiled for an instruction set that the machine may lack.

// Before a loop: no iteration depends on what another one has stored.
#if defined(__clang__)
#define ESAM_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define ESAM_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace esam::cpu {
namespace ESAM_ISA {
namespace {

constexpr int kVectorBytes = ESAM_VECTOR_BYTES;

#include "half.inl"

#include "philox.inl"

#include "stream.inl"

#include "norm.inl"

#include "perturb.inl"

#include "update.inl"

#include "exp.inl"

#include "cross_entropy.inl"

}  // namespace

#define ESAM_EACH_DTYPE(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>, kernel<double>}
#define ESAM_EACH_FLOAT(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>, nullptr}

constexpr Kernels make_kernels(const char* name) {
  return {
      name,
      ESAM_EACH_DTYPE(squared_norm),
      ESAM_EACH_DTYPE(scaled_squared_norm),
      ESAM_EACH_DTYPE(perturb),
      ESAM_EACH_DTYPE(sgd),
      ESAM_EACH_DTYPE(adam),
      ESAM_EACH_FLOAT(cross_entropy_forward),
      ESAM_EACH_FLOAT(cross_entropy_backward),
      philox_words,
      copy,
      stream,
  };
}

}  // namespace ESAM_ISA
}  // namespace esam::cpu
