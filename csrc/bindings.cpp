// esam_kernels._native: the C++ kernels as esam_kernels/backends/native.py calls them.
// A function over lists of tensors returns false, having touched nothing, where a tensor is not one it takes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/perturbation.h"
#include "tensors.h"

namespace py = pybind11;

namespace esam {
namespace {

using cpu::Blocks;

bool norm_partials(const py::list& params, const py::list& grads, const std::vector<int64_t>& groups,
                   const std::vector<bool>& adaptive, double eta, const py::object& partials) {
  TensorReader reader;
  const Blocks w = reader.read(params), g = reader.read(grads);
  if (!reader.ok()) return false;
  double* const out = data<double>(partials);
  py::gil_scoped_release release;
  cpu::norm_partials(w, g, {groups, adaptive, eta}, out);
  return true;
}

bool perturb(const py::list& params, const py::list& grads, const py::list& backups, const std::vector<int64_t>& groups,
             const std::vector<int64_t>& offsets, const py::object& partials, const py::object& scale,
             const std::vector<bool>& adaptive, double eta, double norm_factor, double eps,
             const py::object& random_state) {
  TensorReader reader;
  const bool over_grads = backups.empty();
  const Blocks w = reader.write(params), g = over_grads ? reader.write(grads) : reader.read(grads);
  const Blocks b = over_grads ? g : reader.write(backups);
  if (!reader.ok()) return false;
  const cpu::Perturbation perturbation{
      data<double>(partials), data<double>(scale), offsets, norm_factor, eps, data<int64_t>(random_state)};
  py::gil_scoped_release release;
  cpu::perturb(w, g, b, {groups, adaptive, eta}, perturbation);
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
  if (!reader.ok() || (momentum != 0 && v.size() != w.size())) return false;
  py::gil_scoped_release release;
  cpu::restore_sgd(w, b, g, v, {lr, momentum, dampening, weight_decay, first, nesterov, maximize});
  return true;
}

// torch's step counters: one float32 each. Empty where one is anything else.
std::vector<float*> step_counters(const py::list& steps) {
  std::vector<float*> result;
  for (const py::handle step : steps) {
    const at::Tensor& tensor = THPVariable_Unpack(step.ptr());
    if (!tensor.device().is_cpu() || tensor.scalar_type() != at::kFloat || tensor.numel() != 1) return {};
    result.push_back(static_cast<float*>(tensor.mutable_data_ptr()));
  }
  return result;
}

bool restore_adam(const py::list& params, const py::list& backups, const py::list& grads, const py::list& exp_avgs,
                  const py::list& exp_avg_sqs, const py::list& max_exp_avg_sqs, const py::list& steps, double lr,
                  double beta1, double beta2, double eps, double weight_decay, bool amsgrad, bool maximize,
                  bool decoupled_weight_decay) {
  TensorReader reader;
  const Blocks w = reader.write(params), b = reader.read(backups), g = reader.read(grads);
  const Blocks m = reader.write(exp_avgs), v = reader.write(exp_avg_sqs);
  const Blocks largest = amsgrad ? reader.write(max_exp_avg_sqs) : Blocks();
  const std::vector<float*> counters = step_counters(steps);
  if (!reader.ok() || m.size() != w.size() || v.size() != w.size() || counters.size() != w.size()) return false;
  if (amsgrad && largest.size() != w.size()) return false;
  py::gil_scoped_release release;
  cpu::AdamScalars scalars{};
  scalars.lr = lr;
  scalars.beta1 = beta1;
  scalars.beta2 = beta2;
  scalars.eps = eps;
  scalars.weight_decay = weight_decay;
  scalars.maximize = maximize;
  scalars.decoupled_weight_decay = decoupled_weight_decay;
  cpu::restore_adam(w, b, g, m, v, largest, counters, scalars);
  return true;
}

void philox_words(uint64_t first_counter, uint64_t step, uint64_t seed, const py::object& words) {
  const int64_t counters = THPVariable_Unpack(words.ptr()).numel() / 4;
  cpu::kernels().philox_words(first_counter, counters, step, seed, data<uint32_t>(words));
}

}  // namespace
}  // namespace esam

PYBIND11_MODULE(_native, module) {
  module.attr("TORCH_VERSION") = ESAM_TORCH_VERSION;
  module.def("available_isas", esam::cpu::available_isas);
  module.def("use_isa", esam::cpu::use_isa);
  module.def("isa", [] { return esam::cpu::kernels().name; });
  module.def("norm_partials", esam::norm_partials);
  module.def("perturb", esam::perturb);
  module.def("restore", esam::restore);
  module.def("restore_sgd", esam::restore_sgd);
  module.def("restore_adam", esam::restore_adam);
  module.def("philox_words", esam::philox_words);
}
