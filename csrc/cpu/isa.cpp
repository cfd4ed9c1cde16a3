#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace esam::cpu {
namespace {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> result;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) result.push_back(&kAvx512Kernels);
  if (avx2) result.push_back(&kAvx2Kernels);
#endif
  result.push_back(&kPortableKernels);
  return result;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{available_kernels().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

void use_isa(const std::string& name) {
  std::string allowed;
  for (const Kernels* kernels : available_kernels()) {
    if (name == kernels->name) {
      current().store(kernels, std::memory_order_relaxed);
      return;
    }
    allowed += std::string(allowed.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("no instruction set \"" + name + "\" on this machine: choose one of " + allowed);
}

}  // namespace esam::cpu
