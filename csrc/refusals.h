// What is said of arguments that cannot be right.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

namespace esam {

// "a Float tensor of shape [4, 3] on cpu, not contiguous"
inline std::string described(const at::Tensor& tensor) {
  std::string text =
      c10::str("a ", toString(tensor.scalar_type()), " tensor of shape ", tensor.sizes(), " on ", tensor.device());
  if (tensor.layout() != at::kStrided) return text + c10::str(", ", tensor.layout());
  return tensor.is_contiguous() ? text : text + ", not contiguous";
}

inline std::string no_memory(const std::string& name, const at::Tensor& tensor) {
  const size_t bytes = tensor.has_storage() ? tensor.storage().nbytes() : 0;
  return c10::str(name, " has no memory: it is ", described(tensor), ", and its storage has ", bytes, " bytes");
}

inline std::string not_aligned(const std::string& name) {
  return name + " lies at an address that is not aligned to its dtype: give a copy, tensor.clone()";
}

inline std::string class_out_of_range(int64_t target, int64_t classes, int64_t ignore_index) {
  return c10::str("Target ", target, " is out of bounds: classes are 0 to ", classes - 1, ", and ", ignore_index,
                  " is ignored");
}

// `number`: of the tensor that is gathered from.
inline std::string row_out_of_range(int64_t index, size_t number, int64_t rows) {
  return c10::str("index ", index, " is out of range: tensor ", number, " of those to gather from has ", rows, " rows");
}

// Throws a TypeError for anything else than a tensor.
inline const at::Tensor& unpack(const pybind11::handle& object, const std::string& name) {
  if (!THPVariable_Check(object.ptr())) {
    throw pybind11::type_error(name + " must be a torch.Tensor, got " + Py_TYPE(object.ptr())->tp_name);
  }
  return THPVariable_Unpack(object.ptr());
}

inline const at::Tensor& unpack(const pybind11::list& tensors, Py_ssize_t i) {
  PyObject* const object = PyList_GET_ITEM(tensors.ptr(), i);
  return THPVariable_Check(object) ? THPVariable_Unpack(object)
                                   : unpack(object, c10::str("tensor ", i, " of the list"));
}

}  // namespace esam
