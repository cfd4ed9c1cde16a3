#include "autograd.h"

#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <optional>
#include <string>
#include <typeinfo>
#include <vector>

#include "refusals.h"

namespace esam {
namespace {

namespace py = pybind11;

// Which gradients there are, and at which version. A gradient that is marked is not kept alive: only the few bytes that
// identify it are.
class GradientMarks {
 public:
  void set(const py::list& params) {
    seen_.clear();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      const at::Tensor& grad = unpack(params, i).grad();
      if (grad.defined()) {
        seen_.emplace_back(Mark{WeakImpl(grad.getIntrusivePtr()), grad._version()});
      } else {
        seen_.emplace_back(std::nullopt);
      }
    }
  }

  bool are_all(const py::list& params) const {
    return !any(params, [](std::optional<int64_t> since) { return !since || *since != 0; });
  }

  bool any_other(const py::list& params) const {
    return any(params, [](std::optional<int64_t> since) { return !since; });
  }

  bool any_written(const py::list& params) const {
    return any(params, [](std::optional<int64_t> since) { return since && *since != 0; });
  }

 private:
  using WeakImpl = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Mark {
    WeakImpl impl;
    int64_t version;
  };

  // Whether `is_so` of any gradient that there is, given how often it was written to since; nothing: it is another one.
  template <typename Predicate>
  bool any(const py::list& params, Predicate is_so) const {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      const at::Tensor& grad = unpack(params, i).grad();
      if (!grad.defined()) continue;
      std::optional<int64_t> since;
      const auto place = static_cast<size_t>(i);
      if (place < seen_.size() && seen_[place] &&
          seen_[place]->impl._unsafe_get_target() == grad.unsafeGetTensorImpl()) {
        since = grad._version() - seen_[place]->version;
      }
      if (is_so(since)) return true;
    }
    return false;
  }

  std::vector<std::optional<Mark>> seen_;
};

// torch does not export the type information of PyNode, which dynamic_cast would need.
bool is_python_function(const torch::autograd::Node& node) {
  return std::strcmp(typeid(node).name(), "N5torch8autograd6PyNodeE") == 0;
}

// Functions of torch for operators and compiled graphs, and of this package: all that they differentiate is in their
// edges.
bool hides_nothing(const std::string& name) {
  return name == "CompiledFunctionBackward" || name == "_CrossEntropyBackward" ||
         name.rfind("GeneratedBackwardFor", 0) == 0;
}

// Calls `on_leaf` with each variable that a backward of `output` adds a gradient to, and `on_node` with each other node
// of its graph, once.
template <typename OnLeaf, typename OnNode>
void walk(const at::Tensor& output, OnLeaf on_leaf, OnNode on_node) {
  std::vector<torch::autograd::Node*> open;
  ska::flat_hash_set<torch::autograd::Node*> seen;
  const auto visit = [&](torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) open.push_back(node);
  };
  visit(output.grad_fn().get());
  while (!open.empty()) {
    torch::autograd::Node* const node = open.back();
    open.pop_back();
    if (const auto* const leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      on_leaf(leaf->variable);
      continue;
    }
    on_node(*node);
    for (const torch::autograd::Edge& edge : node->next_edges()) visit(edge.function.get());
  }
}

// Of the graph of a loss: whether it holds a torch.autograd.Function whose backward has this name, and whether a
// backward of it may compute gradients of `params` that its edges do not show.
py::tuple inspect_graph(const py::object& loss, const py::list& params, const std::string& name) {
  ska::flat_hash_set<const at::TensorImpl*> reached;
  bool is_found = false, has_functions = false;
  walk(
      unpack(loss, "loss"), [&](const at::Tensor& leaf) { reached.insert(leaf.unsafeGetTensorImpl()); },
      [&](const torch::autograd::Node& node) {
        if (!is_python_function(node)) return;
        const std::string its_name = node.name();
        is_found = is_found || its_name == name;
        has_functions = has_functions || !hides_nothing(its_name);
      });
  bool hides = false;
  for (Py_ssize_t i = 0; has_functions && !hides && i < PyList_GET_SIZE(params.ptr()); ++i) {
    hides = reached.count(unpack(params, i).unsafeGetTensorImpl()) == 0;
  }
  return py::make_tuple(is_found, hides);
}

// The tensors that a backward of `output` adds gradients to, but for `known` ones.
py::list leaves(const py::object& output, const py::list& known) {
  ska::flat_hash_set<const at::TensorImpl*> left_out;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(known.ptr()); ++i) left_out.insert(unpack(known, i).unsafeGetTensorImpl());
  py::list found;
  walk(
      unpack(output, "output"),
      [&](const at::Tensor& leaf) {
        if (left_out.count(leaf.unsafeGetTensorImpl()) == 0) {
          found.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf)));
        }
      },
      [](const torch::autograd::Node&) {});
  return found;
}

}  // namespace

void register_autograd(py::module_& module) {
  py::class_<GradientMarks>(module, "GradientMarks")
      .def(py::init<>())
      .def("set", &GradientMarks::set)
      .def("are_all", &GradientMarks::are_all)
      .def("any_other", &GradientMarks::any_other)
      .def("any_written", &GradientMarks::any_written);
  module.def("inspect_graph", &inspect_graph);
  module.def("leaves", &leaves);
}

}  // namespace esam
