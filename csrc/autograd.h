// What the optimizer asks of gradients and of a loss's graph: which gradients are still those of the last step, and
// whether a graph recomputes parts of itself by a backward of its own.
#pragma once

#include <pybind11/pybind11.h>

namespace esam {

void register_autograd(pybind11::module_& module);

}  // namespace esam
