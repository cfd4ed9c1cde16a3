// esam_kernels._native: the C++ kernels as esam_kernels/backends/native.py calls them.
// A function over lists of tensors returns false, having touched nothing, where a tensor is not one it takes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cross_entropy.h"
#include "cpu/isa.h"
#include "cpu/perturbation.h"
#include "cpu/selection.h"
#include "autograd.h"
#include "direct.h"
#include "host.h"
#include "sources.h"
#include "tensors.h"

namespace py = pybind11;

namespace esam {
namespace {

using cpu::Blocks;

constexpr int64_t kRandomState = 3;  // seed, step, bound

bool fits(const cpu::Scaling& scaling, const Blocks& params) {
  const int64_t groups = scaling.adaptive.size();
  return scaling.groups.size() == params.size() &&
         std::all_of(scaling.groups.begin(), scaling.groups.end(),
                     [groups](int64_t group) { return 0 <= group && group < groups; });
}

bool norm_partials(const py::list& params, const py::list& grads, const std::vector<int64_t>& groups,
                   const std::vector<bool>& adaptive, double eta, const py::object& partials) {
  TensorReader reader;
  const Blocks w = reader.read(params), g = reader.read(grads);
  const cpu::Scaling scaling{groups, adaptive, eta};
  if (!reader.ok() || !fits(scaling, w)) return false;
  double* const out = data<double>(partials, cpu::kNumPartials, "partials");
  py::gil_scoped_release release;
  cpu::norm_partials(w, g, scaling, out);
  return true;
}

bool are_aligned(std::initializer_list<std::pair<const char*, py::object>> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const auto& named) {
    return named.second.is_none() || is_aligned(unpack(named.second, named.first));
  });
}

bool perturb(const py::list& params, const py::list& grads, const py::list& backups, const std::vector<int64_t>& groups,
             const std::vector<int64_t>& offsets, const py::object& partials, const py::object& scale,
             const std::vector<bool>& adaptive, double eta, double norm_factor, double eps,
             const py::object& random_state) {
  TensorReader reader;
  const bool over_grads = backups.empty();
  const Blocks w = reader.write(params), g = over_grads ? reader.write(grads) : reader.read(grads);
  const Blocks b = over_grads ? g : reader.write(backups);
  const cpu::Scaling scaling{groups, adaptive, eta};
  if (!reader.ok() || !fits(scaling, w) || offsets.size() != w.size()) return false;
  if (!are_aligned({{"partials", partials}, {"scale", scale}, {"random_state", random_state}})) return false;
  const cpu::Perturbation perturbation{data<const double>(partials, cpu::kNumPartials, "partials"),
                                       data<const double>(scale, adaptive.size(), "scale"),
                                       offsets,
                                       norm_factor,
                                       eps,
                                       data_or_null<const int64_t>(random_state, kRandomState, "random_state")};
  py::gil_scoped_release release;
  cpu::perturb(w, g, b, scaling, perturbation);
  return true;
}

bool restore(const py::list& params, const py::list& backups) {
  TensorReader reader;
  const Blocks w = reader.write(params), b = reader.read(backups);
  if (!reader.ok()) return false;
  py::gil_scoped_release release;
  cpu::restore(w, b);
  return true;
}

bool restore_sgd(const py::list& params, const py::list& backups, const py::list& grads,
                 const py::list& momentum_buffers, bool first, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize) {
  TensorReader reader;
  const Blocks w = reader.write(params), b = reader.read(backups), g = reader.read(grads);
  const Blocks v = momentum == 0 ? Blocks() : reader.write(momentum_buffers);
  if (!reader.ok()) return false;
  py::gil_scoped_release release;
  cpu::restore_sgd(w, b, g, v, {lr, momentum, dampening, weight_decay, first, nesterov, maximize});
  return true;
}

// torch's step counters: one float32 each. Empty where one is anything else.
std::vector<float*> step_counters(const py::list& steps) {
  std::vector<float*> result;
  for (const py::handle step : steps) {
    const at::Tensor& tensor = unpack(step, "a step counter");
    const bool ok = tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat && tensor.numel() == 1;
    if (!ok || tensor.layout() != at::kStrided || !has_memory(tensor) || !is_aligned(tensor)) return {};
    result.push_back(static_cast<float*>(tensor.mutable_data_ptr()));
  }
  return result;
}

bool restore_adam(const py::list& params, const py::list& backups, const py::list& grads, const py::list& exp_avgs,
                  const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs, const py::list& steps, double lr,
                  bool lr_is_float32, double beta1, double beta2, double eps, double weight_decay, bool amsgrad,
                  bool maximize, bool decoupled_weight_decay) {
  TensorReader reader;
  const Blocks w = reader.write(params), b = reader.read(backups), g = reader.read(grads);
  const Blocks m = reader.write(exp_avgs), v = reader.write(exp_avg_sqs);
  const Blocks largest = amsgrad ? reader.write(max_exp_avg_sqs) : Blocks();
  const std::vector<float*> counters = step_counters(steps);
  if (!reader.ok() || counters.size() != w.size()) return false;
  py::gil_scoped_release release;
  cpu::AdamScalars scalars{};
  scalars.lr = lr;
  scalars.lr_is_float32 = lr_is_float32;
  scalars.beta1 = beta1;
  scalars.beta2 = beta2;
  scalars.eps = eps;
  scalars.weight_decay = weight_decay;
  scalars.maximize = maximize;
  scalars.decoupled_weight_decay = decoupled_weight_decay;
  cpu::restore_adam(w, b, g, m, v, largest, counters, scalars);
  return true;
}

// Rows of contiguous logits. Throws an IndexError, as torch does, where a class index is out of range.
cpu::CrossEntropyRows cross_entropy_rows(const at::Tensor& logits, const py::object& index,
                                         const py::object& probability, double label_smoothing, int64_t ignore_index) {
  const auto dtype = supported_dtype(logits);
  const bool fits = logits.device().is_cpu() && logits.layout() == at::kStrided && logits.dim() == 2 &&
                    logits.is_contiguous() && logits.size(1) > 0 && dtype && *dtype != cpu::kFloat64;
  if (!fits) {
    throw py::value_error(
        "logits must be a contiguous Float, BFloat16 or Half tensor (rows, classes) on the CPU with a class at least, "
        "got " +
        described(logits));
  }
  if (!has_memory(logits)) throw py::value_error(no_memory("logits", logits));
  if (!is_aligned(logits)) throw py::value_error(not_aligned("logits"));
  if (index.is_none() == probability.is_none()) {
    throw py::value_error(std::string("index and probability are ") + (index.is_none() ? "both None" : "both given") +
                          ": give one of them and None for the other");
  }
  const cpu::CrossEntropyRows rows{logits.const_data_ptr(),
                                   data_or_null<const int64_t>(index, logits.size(0), "index"),
                                   data_or_null<const float>(probability, logits.numel(), "probability"),
                                   logits.size(1),
                                   label_smoothing,
                                   ignore_index};
  if (const int64_t* target = cpu::out_of_range(rows, logits.size(0))) {
    throw py::index_error(class_out_of_range(*target, rows.classes, ignore_index));
  }
  return rows;
}

void cross_entropy_forward(const py::object& logits, const py::object& index, const py::object& probability,
                           double label_smoothing, int64_t ignore_index, const py::object& losses,
                           const py::object& normalizer) {
  const at::Tensor& x = unpack(logits, "logits");
  const auto rows = cross_entropy_rows(x, index, probability, label_smoothing, ignore_index);
  float* const losses_out = data<float>(losses, x.size(0), "losses");
  float* const normalizer_out = data<float>(normalizer, 2 * x.size(0), "normalizer");
  py::gil_scoped_release release;
  cpu::cross_entropy_forward(*supported_dtype(x), rows, x.size(0), losses_out, normalizer_out);
}

void cross_entropy_backward(const py::object& grad_losses, const py::object& logits, const py::object& index,
                            const py::object& probability, const py::object& normalizer, double label_smoothing,
                            int64_t ignore_index, const py::object& grad_logits) {
  const at::Tensor& x = unpack(logits, "logits");
  const auto rows = cross_entropy_rows(x, index, probability, label_smoothing, ignore_index);
  const float* const upstream = data<const float>(grad_losses, x.size(0), "grad_losses");
  const float* const normalizer_in = data<const float>(normalizer, 2 * x.size(0), "normalizer");
  const at::Tensor& gradient = unpack(grad_logits, "grad_logits");
  const bool fits = gradient.device().is_cpu() && gradient.scalar_type() == x.scalar_type() &&
                    gradient.is_contiguous() && gradient.numel() == x.numel() && has_memory(gradient) &&
                    is_aligned(gradient);
  if (!fits) {
    throw py::value_error("grad_logits must be contiguous and aligned, with the dtype and size of logits, " +
                          described(x) + ", got " + described(gradient));
  }
  void* const out = gradient.mutable_data_ptr();
  py::gil_scoped_release release;
  cpu::cross_entropy_backward(*supported_dtype(x), rows, x.size(0), upstream, normalizer_in, out);
}

// Both losses are contiguous and float32, or both are float64.
void select(const py::object& loss_before, const py::object& loss_after, int64_t k, const py::object& indices) {
  const int64_t samples = unpack(loss_before, "loss_before").numel();
  if (k < 1 || k > samples) {
    throw py::value_error(c10::str("k must lie in [1, ", samples, "], the number of samples, got ", k));
  }
  int64_t* const out = data<int64_t>(indices, k, "indices");
  if (unpack(loss_before, "loss_before").scalar_type() == at::kDouble) {
    cpu::select(data<const double>(loss_before, samples, "loss_before"),
                data<const double>(loss_after, samples, "loss_after"), samples, k, out);
  } else {
    cpu::select(data<const float>(loss_before, samples, "loss_before"),
                data<const float>(loss_after, samples, "loss_after"), samples, k, out);
  }
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.is_neg() &&
         !tensor.is_conj() && !tensor.is_quantized() && tensor.is_non_overlapping_and_dense();
}

// `destinations` hold the rows in the same order of memory as the sources, the batch outermost.
bool gather(const py::list& sources, const py::list& destinations, const py::object& indices) {
  const int64_t count = unpack(indices, "indices").numel();
  const int64_t* const index = data<const int64_t>(indices, count, "indices");
  if (destinations.size() != sources.size()) {
    throw py::value_error(c10::str("gather got ", destinations.size(), " destinations for ", sources.size(),
                                   " sources: as many destinations as sources are needed"));
  }
  std::vector<cpu::Rows> from;
  std::vector<char*> to;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& source = unpack(sources, i);
    if (source.dim() == 0 || source.size(0) == 0 || !is_plain(source)) return false;
    const int64_t rows = source.size(0);
    if (!has_memory(source)) throw py::value_error(no_memory(c10::str("sources[", i, "]"), source));
    const at::Tensor& destination = unpack(destinations, i);
    const bool fits = is_plain(destination) && destination.scalar_type() == source.scalar_type() &&
                      destination.numel() == source.numel() / rows * count && has_memory(destination);
    if (!fits) {
      throw py::value_error(c10::str("destinations[", i, "] must be a dense ", toString(source.scalar_type()),
                                     " tensor of ", source.numel() / rows * count, " elements, for ", count,
                                     " rows of ", described(source), ", got ", described(destination)));
    }
    const auto outside = [rows](int64_t row) { return row < 0 || row >= rows; };
    const int64_t* const wrong = std::find_if(index, index + count, outside);
    if (wrong != index + count) throw py::index_error(row_out_of_range(*wrong, i, rows));
    from.push_back({static_cast<const char*>(source.const_data_ptr()), rows,
                    source.numel() / rows * static_cast<int64_t>(source.element_size())});
    to.push_back(static_cast<char*>(destination.mutable_data_ptr()));
  }
  py::gil_scoped_release release;
  for (size_t i = 0; i < from.size(); ++i) cpu::gather(from[i], index, count, to[i]);
  return true;
}

void philox_words(uint64_t first_counter, uint64_t step, uint64_t seed, const py::object& words) {
  const int64_t counters = unpack(words, "words").numel() / 4;
  int32_t* const out = data<int32_t>(words, 4 * counters, "words");
  cpu::kernels().philox_words(first_counter, counters, step, seed, reinterpret_cast<uint32_t*>(out));
}

}  // namespace
}  // namespace esam

PYBIND11_MODULE(_native, module) {
  module.attr("TORCH_VERSION") = ESAM_TORCH_VERSION;
  module.attr("SOURCES") = ESAM_SOURCES;
  esam::register_autograd(module);
  esam::register_direct(module);
  esam::register_host(module);
  module.def("available_isas", esam::cpu::available_isas);
  module.def("use_isa", esam::cpu::use_isa);
  module.def("isa", [] { return esam::cpu::kernels().name; });
  module.def("norm_partials", esam::norm_partials);
  module.def("perturb", esam::perturb);
  module.def("restore", esam::restore);
  module.def("restore_sgd", esam::restore_sgd);
  module.def("restore_adam", esam::restore_adam);
  module.def("cross_entropy_forward", esam::cross_entropy_forward);
  module.def("cross_entropy_backward", esam::cross_entropy_backward);
  module.def("select", esam::select);
  module.def("gather", esam::gather);
  module.def("philox_words", esam::philox_words);
}
