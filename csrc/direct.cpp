// For a small batch the way through torch's dispatcher and Python costs more than the work. These functions go without,
// and return None, having done nothing, where anything is out of the ordinary: the general way then does it, or says
// what is wrong.
#include "direct.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/selection.h"
#include "tensors.h"

namespace esam {
namespace {

namespace py = pybind11;

// Whether nobody wants to see the operators: no mode, no transform, no profiler.
bool nobody_looks_on() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set - c10::autocast_dispatch_keyset).empty() &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !at::hasCallbacks();
}

// Below autograd in the dispatcher's order. Those of functorch and of Python's subclasses are above autocast.
constexpr c10::DispatchKeySet kWrappers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::ZeroTensor});

// Whether a tensor is a dense and aligned one on the CPU and nothing else: no wrapper, no dual number.
bool is_plain(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.is_neg() || tensor.is_conj() ||
      tensor.is_quantized()) {
    return false;
  }
  const c10::DispatchKeySet keys = tensor.key_set();
  if (keys.has_any(kWrappers) || keys.highestPriorityTypeId() > c10::DispatchKey::AutocastCPU) return false;
  return !tensor._fw_grad(0).defined() && has_memory(tensor) && is_aligned(tensor);
}

// The tensor, if it is a plain one and of no subclass.
const at::Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
}

py::object wrap(const at::Tensor& tensor) {
  PyObject* const object = THPVariable_Wrap(tensor);
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

cpu::CrossEntropyRows rows_of(const at::Tensor& logits, const at::Tensor& target, double label_smoothing,
                              int64_t ignore_index) {
  const int64_t* const index = target.const_data_ptr<int64_t>();
  return {logits.const_data_ptr(), index, nullptr, logits.size(1), label_smoothing, ignore_index};
}

// The gradient out of operators that have one themselves.
at::Tensor differentiable_gradient(const at::Tensor& grad_losses, const at::Tensor& logits, const at::Tensor& target,
                                   double label_smoothing, int64_t ignore_index) {
  const at::Tensor x = logits.to(at::kFloat), counted = target.ne(ignore_index).unsqueeze(1);
  const at::Tensor index = target.unsqueeze(1).masked_fill(counted.logical_not(), 0);
  const double share = label_smoothing / static_cast<double>(x.size(1));
  const at::Tensor q = at::full_like(x, share).scatter(1, index, 1 - label_smoothing + share);
  const at::Tensor gradient = (x.softmax(1) - q) * grad_losses.unsqueeze(1);
  return at::where(counted, gradient, 0.0).to(logits.scalar_type());
}

// What was saved may have been written to or swapped behind autograd's back since: nothing may be read or written out
// of bounds then.
void check_saved(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& normalizer,
                 int64_t ignore_index) {
  const auto dtype = supported_dtype(logits);
  const int64_t count = logits.dim() == 2 ? logits.size(0) : -1;
  const bool fits = dtype && *dtype != cpu::kFloat64 && count >= 0 && target.scalar_type() == at::kLong &&
                    target.numel() == count && normalizer.scalar_type() == at::kFloat &&
                    normalizer.numel() == 2 * count && is_plain(logits) && is_plain(target) && is_plain(normalizer);
  TORCH_CHECK_VALUE(fits,
                    "cross_entropy: what it saved for its backward has changed in dtype or size, or was freed: leave "
                    "logits and target as they are between the loss and its backward. Found logits, ",
                    described(logits), ", and target, ", described(target));
  const int64_t* const wrong = cpu::out_of_range(rows_of(logits, target, 0, ignore_index), count);
  TORCH_CHECK_INDEX(wrong == nullptr, class_out_of_range(wrong == nullptr ? 0 : *wrong, logits.size(1), ignore_index));
}

// The tensor, contiguous and aligned to its type.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return is_aligned(contiguous) ? contiguous : contiguous.clone();
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& target,
                            double label_smoothing, int64_t ignore_index) {
    const auto options = logits.options().dtype(at::kFloat).requires_grad(false);
    at::Tensor losses = at::empty({logits.size(0)}, options), normalizer = at::empty({2, logits.size(0)}, options);
    cpu::cross_entropy_forward(*supported_dtype(logits), rows_of(logits, target, label_smoothing, ignore_index),
                               logits.size(0), losses.mutable_data_ptr<float>(), normalizer.mutable_data_ptr<float>());
    if (ctx != nullptr) {
      ctx->save_for_backward({logits, target, normalizer});
      ctx->saved_data["label_smoothing"] = label_smoothing;
      ctx->saved_data["ignore_index"] = ignore_index;
    }
    return losses;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    // Contiguous and aligned they were, but hooks of the user's may have packed and unpacked them.
    const at::Tensor logits = aligned(saved[0]), target = aligned(saved[1]), normalizer = aligned(saved[2]);
    const double label_smoothing = ctx->saved_data["label_smoothing"].toDouble();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    at::Tensor gradient;
    if (at::GradMode::is_enabled() || !is_plain(grad_outputs[0])) {
      gradient = differentiable_gradient(grad_outputs[0], logits, target, label_smoothing, ignore_index);
    } else {
      const at::Tensor upstream = grad_outputs[0].to(at::kFloat).contiguous();
      check_saved(logits, target, normalizer, ignore_index);
      gradient = at::empty_like(logits, logits.options().requires_grad(false));
      cpu::cross_entropy_backward(*supported_dtype(logits), rows_of(logits, target, label_smoothing, ignore_index),
                                  logits.size(0), upstream.const_data_ptr<float>(), normalizer.const_data_ptr<float>(),
                                  gradient.mutable_data_ptr());
    }
    return {gradient, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// Losses of contiguous logits (rows, classes) in float32 or less, and class indices (rows,).
py::object cross_entropy(const py::handle& logits_object, const py::handle& target_object, double label_smoothing,
                         int64_t ignore_index) {
  const at::Tensor *const logits = plain(logits_object.ptr()), *const target = plain(target_object.ptr());
  if (logits == nullptr || target == nullptr || !nobody_looks_on()) return py::none();
  const auto dtype = supported_dtype(*logits);
  const bool fits = dtype && *dtype != cpu::kFloat64 && logits->dim() == 2 && logits->is_contiguous() &&
                    logits->numel() > 0 && target->scalar_type() == at::kLong && target->dim() == 1 &&
                    target->size(0) == logits->size(0) && target->is_contiguous() && 0 <= label_smoothing &&
                    label_smoothing <= 1;
  if (!fits) return py::none();
  const auto rows = rows_of(*logits, *target, label_smoothing, ignore_index);
  if (const int64_t* wrong = cpu::out_of_range(rows, logits->size(0))) {
    throw py::index_error(class_out_of_range(*wrong, rows.classes, ignore_index));
  }
  at::Tensor losses;
  {
    py::gil_scoped_release release;
    losses = at::GradMode::is_enabled() && logits->requires_grad()
                 ? CrossEntropy::apply(*logits, *target, label_smoothing, ignore_index)
                 : CrossEntropy::forward(nullptr, *logits, *target, label_smoothing, ignore_index);
  }
  return wrap(losses);
}

// Indices of the k samples whose losses rise most; both losses are contiguous float32 (b,).
py::object select(const py::handle& before_object, const py::handle& after_object, int64_t k) {
  const at::Tensor *const before = plain(before_object.ptr()), *const after = plain(after_object.ptr());
  if (before == nullptr || after == nullptr || !nobody_looks_on()) return py::none();
  const auto fits = [](const at::Tensor& losses) {
    return losses.dim() == 1 && losses.scalar_type() == at::kFloat && losses.is_contiguous();
  };
  const bool ok = fits(*before) && fits(*after) && before->size(0) == after->size(0) && 1 <= k && k <= before->size(0);
  if (!ok) return py::none();
  at::Tensor indices = at::empty({k}, at::TensorOptions().dtype(at::kLong));
  cpu::select(before->const_data_ptr<float>(), after->const_data_ptr<float>(), before->size(0), k,
              indices.mutable_data_ptr<int64_t>());
  return wrap(indices);
}

// How the rows of a tensor lie in memory, the batch outermost; nothing where they lie otherwise.
std::optional<at::MemoryFormat> format_of_rows(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return at::MemoryFormat::Contiguous;
  if (tensor.is_contiguous(at::MemoryFormat::ChannelsLast)) return at::MemoryFormat::ChannelsLast;
  return std::nullopt;
}

// The rows `indices`, int64 (k,), of each tensor. Nothing here is differentiated.
py::object gather(const py::list& tensors, const py::handle& indices_object) {
  const at::Tensor* const indices = plain(indices_object.ptr());
  if (indices == nullptr || !nobody_looks_on() || indices->scalar_type() != at::kLong || indices->dim() != 1 ||
      !indices->is_contiguous()) {
    return py::none();
  }
  const Py_ssize_t size = PyList_GET_SIZE(tensors.ptr());
  std::vector<at::Tensor> sources, gathered;
  for (Py_ssize_t i = 0; i < size; ++i) {
    const at::Tensor* const tensor = plain(PyList_GET_ITEM(tensors.ptr(), i));
    const bool ok = tensor != nullptr && tensor->dim() > 0 && tensor->size(0) > 0 && format_of_rows(*tensor) &&
                    !(at::GradMode::is_enabled() && tensor->requires_grad());
    if (!ok) return py::none();
    sources.push_back(*tensor);
  }
  const int64_t count = indices->numel();
  const int64_t* const index = indices->const_data_ptr<int64_t>();
  for (const at::Tensor& source : sources) {
    const auto outside = [&source](int64_t row) { return row < 0 || row >= source.size(0); };
    const int64_t* const wrong = std::find_if(index, index + count, outside);
    if (wrong != index + count) throw py::index_error(row_out_of_range(*wrong, gathered.size(), source.size(0)));
    auto shape = source.sizes().vec();
    shape[0] = count;
    gathered.push_back(at::empty(shape, source.options().requires_grad(false), format_of_rows(source)));
  }
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < sources.size(); ++i) {
      const int64_t row_bytes = static_cast<int64_t>(sources[i].nbytes()) / sources[i].size(0);
      const cpu::Rows rows{static_cast<const char*>(sources[i].const_data_ptr()), sources[i].size(0), row_bytes};
      cpu::gather(rows, index, count, static_cast<char*>(gathered[i].mutable_data_ptr()));
    }
  }
  py::list result(size);
  for (Py_ssize_t i = 0; i < size; ++i) result[i] = wrap(gathered[i]);
  return result;
}

}  // namespace

void register_direct(py::module_& module) {
  py::module_ direct = module.def_submodule("direct");
  direct.def("cross_entropy", &cross_entropy);
  direct.def("select", &select);
  direct.def("gather", &gather);
}

}  // namespace esam
