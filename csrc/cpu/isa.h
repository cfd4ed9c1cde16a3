// Which instruction set the kernels run on: the best that the machine has, unless told otherwise.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace esam::cpu {

// The kernels in use.
const Kernels& kernels();

// The names that use_isa takes on this machine, best first.
std::vector<std::string> available_isas();

// Switches every later call to `name`. Throws std::invalid_argument where the machine lacks it.
void use_isa(const std::string& name);

}  // namespace esam::cpu
