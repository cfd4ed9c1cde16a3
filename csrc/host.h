// What the optimizer asks of lists of tensors at every step, without a Python object for each answer.
#pragma once

#include <pybind11/pybind11.h>

namespace esam {

void register_host(pybind11::module_& module);

}  // namespace esam
