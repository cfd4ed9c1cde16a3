// esam_kernels._cuda: the launchers as esam_kernels/backends/cuda.py calls them, with addresses as integers.
// `where` is (device index, stream): what is launched goes there, whichever device is current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "errors.h"
#include "launchers.h"

#if !defined(ESAM_CUDA_MODULE)
#define ESAM_CUDA_MODULE _cuda
#endif
#if !defined(ESAM_CUDA_EMULATED)
#include "sources.h"  // setup.py writes it
#endif

namespace py = pybind11;

namespace esam::cuda {
namespace {

using Lists = std::vector<Addresses>;
using Flags = std::vector<bool>;
using Numbers = std::vector<int64_t>;
using Where = std::pair<int, int64_t>;

// Makes the device of `where` the current one while it lives.
class On {
 public:
  explicit On(const Where& where) : stream(reinterpret_cast<cudaStream_t>(where.second)), device_(where.first) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device_) return;
    const cudaError_t error = cudaSetDevice(device_);
    if (error != cudaSuccess) refuse("cudaSetDevice(" + std::to_string(device_) + ")", error);
  }
  ~On() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  On(const On&) = delete;
  On& operator=(const On&) = delete;

  const cudaStream_t stream;

 private:
  int before_ = 0, device_;
};

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// `what`: the list that has one entry for each tensor.
void check_length(const char* name, const std::string& what, size_t length, size_t tensors) {
  check_count(name, what, static_cast<int64_t>(length), static_cast<int64_t>(tensors), "one for each tensor");
}

// `names`: of the lists that `name` takes; each has one address for each tensor.
Tensors tensors_of(const char* name, const std::vector<std::string>& names, Lists lists, Numbers numels) {
  std::string all;
  for (const std::string& one : names) all += (all.empty() ? "" : ", ") + one;
  check_count(name, "lists of addresses", static_cast<int64_t>(lists.size()), static_cast<int64_t>(names.size()), all);
  for (size_t i = 0; i < names.size(); ++i) {
    check_length(name, "addresses of " + names[i], lists[i].size(), numels.size());
  }
  return {std::move(lists), std::move(numels)};
}

void norm_partials_(const Where& where, int dtype, Lists lists, Numbers numels, const Flags& adaptive, double eta,
                    int64_t partials, bool accumulate) {
  const Tensors tensors = tensors_of("norm_partials", {"grads", "params"}, std::move(lists), std::move(numels));
  check_length("norm_partials", "adaptive flags", adaptive.size(), tensors.numels.size());
  const On on(where);
  norm_partials(tensors, adaptive, eta, pointer<double>(partials), accumulate, static_cast<Dtype>(dtype), on.stream);
}

void perturb_(const Where& where, int dtype, Lists lists, Numbers numels, const Numbers& groups, const Numbers& offsets,
              const Flags& adaptive, int num_groups, int64_t partials, int64_t scale, int64_t random_state, double eta,
              double norm_factor, double eps) {
  const Tensors tensors = tensors_of("perturb", {"params", "grads", "backups"}, std::move(lists), std::move(numels));
  check_length("perturb", "groups", groups.size(), tensors.numels.size());
  check_length("perturb", "offsets", offsets.size(), tensors.numels.size());
  check_length("perturb", "adaptive flags", adaptive.size(), tensors.numels.size());
  const Perturbation perturbation{pointer<double>(partials),
                                  pointer<double>(scale),
                                  pointer<int64_t>(random_state),
                                  norm_factor,
                                  eps,
                                  eta,
                                  num_groups};
  const On on(where);
  perturb(tensors, groups, offsets, adaptive, perturbation, static_cast<Dtype>(dtype), on.stream);
}

void restore_(const Where& where, int element_size, Lists lists, Numbers numels) {
  const Tensors tensors = tensors_of("restore", {"params", "backups"}, std::move(lists), std::move(numels));
  const On on(where);
  restore(tensors, element_size, on.stream);
}

// Where it is on the device, `address` says where, and `is_float64` what it is.
LearningRate learning_rate(double value, int64_t address, bool is_float64) {
  return {value, is_float64 ? nullptr : pointer<float>(address), is_float64 ? pointer<double>(address) : nullptr};
}

void restore_sgd_(const Where& where, int dtype, Lists lists, Numbers numels, bool first, double lr, int64_t lr_address,
                  bool lr_is_float64, double momentum, double dampening, double weight_decay, bool nesterov,
                  bool maximize) {
  std::vector<std::string> names{"params", "backups", "grads"};
  if (momentum != 0) names.emplace_back("momentum buffers");
  const Tensors tensors = tensors_of("restore_sgd", names, std::move(lists), std::move(numels));
  const Sgd sgd{
      learning_rate(lr, lr_address, lr_is_float64), momentum, dampening, weight_decay, first, nesterov, maximize};
  const On on(where);
  restore_sgd(tensors, sgd, static_cast<Dtype>(dtype), on.stream);
}

void restore_adam_(const Where& where, int dtype, Lists lists, Numbers numels, const Addresses& step_addresses,
                   const std::vector<float>& steps, double lr, int64_t lr_address, bool lr_is_float64, double beta1,
                   double beta2, double eps, double weight_decay, bool amsgrad, bool maximize, bool decoupled) {
  std::vector<std::string> names{"params", "backups", "grads", "exp_avgs", "exp_avg_sqs"};
  if (amsgrad) names.emplace_back("max_exp_avg_sqs");
  const Tensors tensors = tensors_of("restore_adam", names, std::move(lists), std::move(numels));
  check_length("restore_adam", "steps", step_addresses.empty() ? steps.size() : step_addresses.size(),
               tensors.numels.size());
  const Adam adam{
      learning_rate(lr, lr_address, lr_is_float64), beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize};
  const On on(where);
  restore_adam(tensors, step_addresses, steps, adam, static_cast<Dtype>(dtype), on.stream);
}

void increment_steps_(const Where& where, const Addresses& step_addresses) {
  const On on(where);
  increment_steps(step_addresses, on.stream);
}

// Logits and targets: (logits, rows, classes, row stride, index or 0, probability or 0, smoothing, ignore_index).
using LogitRows = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, int64_t>;

CrossEntropy cross_entropy_of(const std::optional<LogitRows>& given) {
  if (!given) return {};
  const auto& [logits, rows, classes, row_stride, index, probability, smoothing, ignore_index] = *given;
  return {pointer<void>(logits),       rows,      classes,     row_stride, pointer<int64_t>(index),
          pointer<float>(probability), smoothing, ignore_index};
}

void cross_entropy_forward_(const Where& where, int dtype, const LogitRows& inputs, int64_t losses,
                            int64_t normalizer) {
  const On on(where);
  cross_entropy_forward(cross_entropy_of(inputs), pointer<float>(losses), pointer<float>(normalizer),
                        static_cast<Dtype>(dtype), on.stream);
}

void cross_entropy_backward_(const Where& where, int dtype, const LogitRows& inputs, int64_t grad_losses,
                             int64_t normalizer, int64_t gradient) {
  const On on(where);
  cross_entropy_backward(cross_entropy_of(inputs), pointer<float>(grad_losses), pointer<float>(normalizer),
                         pointer<void>(gradient), static_cast<Dtype>(dtype), on.stream);
}

Selection selection_of(int64_t loss_before, int64_t loss_after, int64_t samples, int64_t k, int64_t indices) {
  return {pointer<float>(loss_before), pointer<float>(loss_after), samples, k, pointer<int64_t>(indices)};
}

void select_(const Where& where, int64_t loss_before, int64_t loss_after, int64_t samples, int64_t k, int64_t indices) {
  const On on(where);
  select(selection_of(loss_before, loss_after, samples, k, indices), on.stream);
}

// Tensors whose rows are gathered: (source, destination, bytes of a row, rows of the source) each.
using RowsList = std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>>;

std::vector<Rows> rows_of(const RowsList& given) {
  std::vector<Rows> result;
  for (const auto& [source, destination, row_bytes, samples] : given) {
    result.push_back({pointer<void>(source), pointer<void>(destination), row_bytes, samples});
  }
  return result;
}

void gather_(const Where& where, const RowsList& tensors, int64_t indices, int64_t k) {
  const On on(where);
  gather(rows_of(tensors), pointer<int64_t>(indices), k, on.stream);
}

void losses_select_gather_(const Where& where, int dtype, const std::optional<LogitRows>& before,
                           const std::optional<LogitRows>& after, int64_t loss_before, int64_t loss_after,
                           int64_t samples, int64_t k, int64_t indices, const RowsList& tensors) {
  const On on(where);
  losses_select_gather(cross_entropy_of(before), cross_entropy_of(after),
                       selection_of(loss_before, loss_after, samples, k, indices), rows_of(tensors),
                       static_cast<Dtype>(dtype), on.stream);
}

}  // namespace
}  // namespace esam::cuda

PYBIND11_MODULE(ESAM_CUDA_MODULE, module) {
#if !defined(ESAM_CUDA_EMULATED)
  module.attr("SOURCES") = ESAM_SOURCES;
#endif
  module.attr("MAX_GROUPS") = esam::cuda::kMaxGroups;
  module.def("norm_partials", esam::cuda::norm_partials_);
  module.def("perturb", esam::cuda::perturb_);
  module.def("restore", esam::cuda::restore_);
  module.def("restore_sgd", esam::cuda::restore_sgd_);
  module.def("restore_adam", esam::cuda::restore_adam_);
  module.def("increment_steps", esam::cuda::increment_steps_);
  module.def("cross_entropy_forward", esam::cuda::cross_entropy_forward_);
  module.def("cross_entropy_backward", esam::cuda::cross_entropy_backward_);
  module.def("select", esam::cuda::select_);
  module.def("gather", esam::cuda::gather_);
  module.def("losses_select_gather", esam::cuda::losses_select_gather_);
#if defined(ESAM_CUDA_EMULATED)
  module.def("set_emulator", [](bool reversed, bool cooperative, int usable_multiprocessors) {
    emulator::reversed = reversed;
    emulator::cooperative_launches = cooperative;
    emulator::usable_multiprocessors = usable_multiprocessors;
  });
  module.def("fail_next_launch", [](int error) { emulator::next_error = static_cast<cudaError_t>(error); });
  module.def("take_error", [] { return static_cast<int>(cudaGetLastError()); });
  module.def("take_launches", [] { return std::exchange(emulator::launches, 0); });
  module.def("take_argument_bytes", [] { return std::exchange(emulator::argument_bytes, {}); });
#endif
}
