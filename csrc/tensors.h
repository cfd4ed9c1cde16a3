// From Python's tensors to blocks of memory: the only file that knows what a torch.Tensor is.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/blocks.h"
#include "refusals.h"

namespace esam {

inline std::optional<cpu::Dtype> supported_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::kFloat32;
    case at::kBFloat16:
      return cpu::kBFloat16;
    case at::kHalf:
      return cpu::kFloat16;
    case at::kDouble:
      return cpu::kFloat64;
    default:
      return std::nullopt;
  }
}

// Whether memory is aligned to the tensor's type, as C++ wants it: torch.frombuffer takes memory at any byte.
inline bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

// Reads lists of tensors, and remembers whether all of them are such as the kernels take: plain dense CPU tensors of a
// supported dtype, every list parallel to the first. Nothing of a list is touched before `ok` was asked.
class TensorReader {
 public:
  bool ok() const { return ok_; }

  std::vector<cpu::Block> read(const pybind11::list& tensors) { return blocks(tensors, /*writable=*/false); }
  std::vector<cpu::Block> write(const pybind11::list& tensors) { return blocks(tensors, /*writable=*/true); }

 private:
  std::vector<cpu::Block> blocks(const pybind11::list& tensors, bool writable) {
    std::vector<cpu::Block> result;
    const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
    result.reserve(size);
    for (Py_ssize_t i = 0; i < size && ok_; ++i) {
      if (const auto block = this->block(PyList_GET_ITEM(tensors.ptr(), i), writable)) result.push_back(*block);
    }
    if (ok_) check_parallel(result);
    return result;
  }

  std::optional<cpu::Block> block(PyObject* object, bool writable) {
    if (!THPVariable_Check(object)) return refuse();
    const at::Tensor& tensor = THPVariable_Unpack(object);
    const auto dtype = supported_dtype(tensor);
    const bool plain = tensor.device().is_cpu() && tensor.layout() == at::kStrided && tensor.has_storage() &&
                       !tensor.is_neg() && tensor.is_non_overlapping_and_dense() && is_aligned(tensor);
    if (!plain || !dtype) return refuse();
    void* const data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    if (data == nullptr && tensor.numel() > 0) return refuse();
    return cpu::Block{static_cast<char*>(data), tensor.numel(), *dtype};
  }

  void check_parallel(const std::vector<cpu::Block>& blocks) {
    if (first_) shapes_ = blocks;
    first_ = false;
    ok_ = blocks.size() == shapes_.size();
    for (size_t i = 0; ok_ && i < blocks.size(); ++i) {
      ok_ = blocks[i].numel == shapes_[i].numel && blocks[i].dtype == shapes_[i].dtype;
    }
  }

  std::nullopt_t refuse() {
    ok_ = false;
    return std::nullopt;
  }

  bool ok_ = true;
  bool first_ = true;
  std::vector<cpu::Block> shapes_;
};

// Whether the storage has all the bytes that the tensor's shape and strides reach: it may have been freed or cut.
inline bool has_memory(const at::Tensor& tensor) {
  const int64_t numel = tensor.numel();
  if (numel == 0) return true;
  if (!tensor.has_storage()) return false;
  int64_t end = tensor.storage_offset() + numel;
  if (!tensor.is_non_overlapping_and_dense()) {
    end = tensor.storage_offset() + 1;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) end += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const c10::StorageImpl& storage = *tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return storage.data() != nullptr && storage.nbytes() >= static_cast<size_t>(end) * tensor.element_size();
}

// The data of one contiguous CPU tensor of at least `numel` elements of T, the argument `name`. Throws a ValueError for
// any other.
template <typename T>
inline T* data(const pybind11::handle& object, int64_t numel, const char* name) {
  const at::Tensor& tensor = unpack(object, name);
  constexpr c10::ScalarType dtype = c10::CppTypeToScalarType<std::remove_const_t<T>>::value;
  const bool fits =
      tensor.scalar_type() == dtype && tensor.device().is_cpu() && tensor.is_contiguous() && tensor.numel() >= numel;
  if (!fits) {
    throw pybind11::value_error(c10::str(name, " must be a contiguous ", toString(dtype), " tensor on the CPU of ",
                                         numel, " elements or more, got ", described(tensor)));
  }
  if (!has_memory(tensor)) throw pybind11::value_error(no_memory(name, tensor));
  if (!is_aligned(tensor)) throw pybind11::value_error(not_aligned(name));
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

// The same, or null for None.
template <typename T>
inline T* data_or_null(const pybind11::handle& object, int64_t numel, const char* name) {
  return object.is_none() ? nullptr : data<T>(object, numel, name);
}

}  // namespace esam
