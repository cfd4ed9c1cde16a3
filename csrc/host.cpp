#include "host.h"

#include <torch/csrc/autograd/python_variable.h>

namespace esam {
namespace {

namespace py = pybind11;

const at::Tensor* tensor_at(const py::list& list, Py_ssize_t i) {
  PyObject* const object = PyList_GET_ITEM(list.ptr(), i);
  return THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

// Whether tensors[i] lies in memory as params[i] does: same device, layout, dtype, shape and strides, for every i.
bool are_alike(const py::list& tensors, const py::list& params) {
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  if (PyList_GET_SIZE(tensors.ptr()) != size) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor *const a = tensor_at(tensors, i), *const b = tensor_at(params, i);
    if (a == nullptr || b == nullptr || a->layout() != at::kStrided || b->layout() != at::kStrided) return false;
    if (a->scalar_type() != b->scalar_type() || a->device() != b->device()) return false;
    if (a->sizes() != b->sizes() || a->strides() != b->strides()) return false;
  }
  return true;
}

// How many hold tensors[i] in Python, and how many its memory; the list is one of the former.
py::tuple holders(const py::list& tensors, Py_ssize_t i) {
  const at::Tensor* const tensor = tensor_at(tensors, i);
  if (tensor == nullptr) throw py::type_error("expected a torch.Tensor");
  return py::make_tuple(Py_REFCNT(PyList_GET_ITEM(tensors.ptr(), i)), tensor->storage().use_count());
}

// For each tensor, whether it is held as often as `expected` (from holders), needs no gradient, and fills its storage.
py::list are_held_alone(const py::list& tensors, Py_ssize_t expected_objects, size_t expected_storage) {
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  py::list result(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor* const tensor = tensor_at(tensors, i);
    const bool alone = tensor != nullptr && Py_REFCNT(PyList_GET_ITEM(tensors.ptr(), i)) == expected_objects &&
                       tensor->has_storage() && tensor->storage().use_count() == expected_storage &&
                       !tensor->requires_grad() && tensor->storage().nbytes() == tensor->nbytes();
    result[i] = py::bool_(alone);
  }
  return result;
}

}  // namespace

void register_host(py::module_& module) {
  module.def("are_alike", &are_alike);
  module.def("holders", &holders);
  module.def("are_held_alone", &are_held_alone);
}

}  // namespace esam
