#include "update.cuh"

namespace gradamp::cuda {

const void* adam_kernel(int capacity, bool measures) {
  return update_kernel_for<UpdateRule::kAdam>(capacity, measures);
}

}  // namespace gradamp::cuda
