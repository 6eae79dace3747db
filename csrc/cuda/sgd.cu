#include "update.cuh"

namespace gradamp::cuda {

const void* sgd_kernel(int capacity, bool measures) {
  return update_kernel_for<UpdateRule::kSgd>(capacity, measures);
}

}  // namespace gradamp::cuda
