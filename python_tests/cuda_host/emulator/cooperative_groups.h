// this_grid().sync() of the emulator.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Grid {
  void sync() const { emulator::wait(emulator::grid_barrier, /*for_grid=*/true); }
};

inline Grid this_grid() { return {}; }

}  // namespace cooperative_groups
