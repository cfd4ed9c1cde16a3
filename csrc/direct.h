// Sharpness-sensitive Data Selection of plain CPU tensors, each in one call from tensors to tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace esam {

void register_direct(pybind11::module_& module);

}  // namespace esam
