#include "host.h"

#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "tensors.h"

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

// Whether all are alike, as above, and each has the memory that its shape reaches.
bool are_parallel(const py::list& tensors, const py::list& params) {
  if (!are_alike(tensors, params)) return false;
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!has_memory(*tensor_at(tensors, i)) || !has_memory(*tensor_at(params, i))) return false;
  }
  return true;
}

// Whether all are alike, as above, and none is empty or needs a gradient itself.
bool are_plainly_alike(const py::list& tensors, const py::list& params) {
  if (!are_alike(tensors, params)) return false;
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor& tensor = unpack(tensors, i);
    if (tensor.numel() == 0 || tensor.requires_grad()) return false;
  }
  return true;
}

// The numbers of the floating-point tensors that need a gradient.
py::list trained(const py::list& params) {
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  py::list result;
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor& param = unpack(params, i);
    if (param.requires_grad() && param.is_floating_point()) result.append(i);
  }
  return result;
}

// Where the memory of each begins.
py::list addresses(const py::list& tensors) {
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  py::list result(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    result[i] = py::int_(reinterpret_cast<uintptr_t>(unpack(tensors, i).const_data_ptr()));
  }
  return result;
}

// The tensors in the values of a dict of dicts, as a torch optimizer keeps its state.
py::list tensors_in(const py::dict& states) {
  py::list result;
  for (const auto& [key, values] : states) {
    if (!PyDict_Check(values.ptr())) continue;
    for (const auto& [name, value] : py::reinterpret_borrow<py::dict>(values)) {
      if (THPVariable_Check(value.ptr())) result.append(value);
    }
  }
  return result;
}

// Where tensors lie in memory, to know later whether one of them has moved. None of them is kept alive.
class MemoryMarks {
 public:
  explicit MemoryMarks(const py::list& tensors) {
    const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
    places_.reserve(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      const at::Tensor& tensor = unpack(tensors, i);
      places_.push_back({tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes().vec(), tensor.strides().vec()});
    }
  }

  // Whether these lie where those did, in the same order, with dtypes, shapes and strides alike.
  bool are_all(const py::list& tensors) const {
    if (static_cast<size_t>(PyList_GET_SIZE(tensors.ptr())) != places_.size()) return false;
    for (size_t i = 0; i < places_.size(); ++i) {
      const at::Tensor& tensor = unpack(tensors, static_cast<Py_ssize_t>(i));
      const Place& place = places_[i];
      if (tensor.const_data_ptr() != place.address || tensor.scalar_type() != place.dtype) return false;
      if (tensor.sizes() != place.sizes || tensor.strides() != place.strides) return false;
    }
    return true;
  }

 private:
  struct Place {
    const void* address;
    at::ScalarType dtype;
    std::vector<int64_t> sizes, strides;
  };

  std::vector<Place> places_;
};

// Whether both lists hold the same objects in the same order.
bool are_same(const py::list& one, const py::list& other) {
  const Py_ssize_t size = PyList_GET_SIZE(one.ptr());
  if (PyList_GET_SIZE(other.ptr()) != size) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (PyList_GET_ITEM(one.ptr(), i) != PyList_GET_ITEM(other.ptr(), i)) return false;
  }
  return true;
}

// How many hold tensors[i] in Python, and how many its memory; the list is one of the former.
py::tuple holders(const py::list& tensors, Py_ssize_t i) {
  if (i < 0 || i >= PyList_GET_SIZE(tensors.ptr())) {
    throw py::index_error(
        c10::str("there is no such tensor in the list: number ", i, " of ", PyList_GET_SIZE(tensors.ptr())));
  }
  const at::Tensor& tensor = unpack(tensors, i);
  return py::make_tuple(Py_REFCNT(PyList_GET_ITEM(tensors.ptr(), i)), tensor.storage().use_count());
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

// Bits of a tensor by which its values are not those in its memory; torch's dispatcher resolves them.
constexpr c10::DispatchKeySet kLazyBits({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate,
                                         c10::DispatchKey::ZeroTensor});

// Whether each is a torch.Tensor or a torch.nn.Parameter, no subclass of them, and holds in memory what it says.
bool are_exact(const py::list& tensors) {
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const object = PyList_GET_ITEM(tensors.ptr(), i);
    if (!THPVariable_CheckExact(object) || THPVariable_Unpack(object).key_set().has_any(kLazyBits)) return false;
  }
  return true;
}

// Whether torch's dispatcher would hand each argument on as it is: exact tensors, lists of them or of numbers, numbers.
bool are_plain(const py::tuple& arguments) {
  for (const py::handle& argument : arguments) {
    PyObject* const object = argument.ptr();
    if (PyList_CheckExact(object)) {
      const auto list = py::reinterpret_borrow<py::list>(argument);
      if (!list.empty() && tensor_at(list, 0) != nullptr && !are_exact(list)) return false;
    } else if (THPVariable_CheckExact(object)) {
      if (THPVariable_Unpack(object).key_set().has_any(kLazyBits)) return false;
    } else if (object != Py_None && !PyLong_CheckExact(object) && !PyFloat_CheckExact(object) &&
               !PyBool_Check(object)) {
      return false;
    }
  }
  return true;
}

// The .grad of each.
py::list gradients(const py::list& params) {
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  py::list result(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* const grad = THPVariable_Wrap(unpack(params, i).grad());
    if (grad == nullptr) throw py::error_already_set();
    result[i] = py::reinterpret_steal<py::object>(grad);
  }
  return result;
}

// Sets the .grad of each to None.
void drop_gradients(const py::list& params) {
  const Py_ssize_t size = PyList_GET_SIZE(params.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor& param = unpack(params, i);
    if (param.grad().defined()) param.mutable_grad().reset();
  }
}

// Tells autograd that each was written to, as torch.autograd.graph.increment_version does.
void increment_version(const py::list& tensors) {
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor& tensor = unpack(tensors, i);
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

void register_host(py::module_& module) {
  module.def("addresses", &addresses);
  module.def("are_alike", &are_alike);
  module.def("are_parallel", &are_parallel);
  module.def("are_plain", &are_plain);
  module.def("are_plainly_alike", &are_plainly_alike);
  module.def("are_same", &are_same);
  module.def("drop_gradients", &drop_gradients);
  module.def("gradients", &gradients);
  module.def("increment_version", &increment_version);
  module.def("holders", &holders);
  module.def("are_held_alone", &are_held_alone);
  module.def("tensors_in", &tensors_in);
  module.def("trained", &trained);
  py::class_<MemoryMarks>(module, "MemoryMarks").def(py::init<const py::list&>()).def("are_all", &MemoryMarks::are_all);
}

}  // namespace esam
