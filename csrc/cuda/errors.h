// What is said where CUDA refuses a call, and where the arguments of one cannot be right.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace esam::cuda {

// What a user can do about an error of CUDA.
inline const char* remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "The extension was compiled for other GPUs, or for a newer driver. Build it again on this machine: run "
             "`pip install --force-reinstall --no-deps .` in the source folder of esam_kernels with "
             "ESAM_KERNELS_CUDA=1; or use backend=\"triton\"";
    case cudaErrorInvalidDevice:
      return "This process has no such device: see CUDA_VISIBLE_DEVICES";
    default:
      return "CUDA may report here what an earlier kernel did wrong. Run the program with CUDA_LAUNCH_BLOCKING=1, "
             "which "
             "stops it at the first call that fails; if it is this one, use backend=\"triton\"";
  }
}

[[noreturn]] inline void refuse(const std::string& call, cudaError_t error) {
  throw std::runtime_error("esam_kernels: " + call + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error) + ". " + remedy(error));
}

// `call`: the function of CUDA that returned `error`.
inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) refuse(call, error);
}

inline void check_launch(cudaError_t error, const char* name, int64_t blocks, int threads) {
  if (error == cudaSuccess) return;
  refuse(std::string("the launch of ") + name + " (" + std::to_string(blocks) + " blocks of " +
             std::to_string(threads) + " threads)",
         error);
}

[[noreturn]] inline void refuse_dtype(const char* name, int dtype) {
  throw std::invalid_argument(std::string(name) + " got dtype " + std::to_string(dtype) +
                              ", and takes 0 (float32), 1 (bfloat16) and 2 (float16): convert the tensors, or use "
                              "backend=\"reference\"");
}

inline void check_count(const char* name, const std::string& what, int64_t found, int64_t expected,
                        const std::string& why) {
  if (found == expected) return;
  throw std::invalid_argument(std::string(name) + " got " + std::to_string(found) + " " + what + ", and needs " +
                              std::to_string(expected) + ": " + why);
}

inline void check_at_most(const char* name, const char* what, int64_t found, int64_t most) {
  if (found <= most) return;
  throw std::invalid_argument(std::string(name) + " got " + std::to_string(found) + " " + what + ", and takes " +
                              std::to_string(most) + " at most: call it for fewer tensors at a time");
}

}  // namespace esam::cuda
