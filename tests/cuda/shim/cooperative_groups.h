#pragma once

#include "cuda_runtime_api.h"

namespace cooperative_groups {
struct Grid {
  void sync() const {
    __syncthreads();
    if (threadIdx.x == 0) emulator::wait_for_all_blocks();
    __syncthreads();
  }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups
