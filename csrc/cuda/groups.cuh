// Threads that add up together, in a fixed order: see decide.h for what a Group is.
#pragma once

#include "../rules/common.h"

namespace gradamp::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Not threadIdx.x % 32, which costs an instruction more wherever it is not held.
__device__ inline int lane_index() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
__device__ inline int warp_index() { return threadIdx.x / 32u; }

// Over groups of 2 kTop lanes; every lane gets its group's sum.
template <int kTop = 16, class T>
__device__ inline T butterfly_sum(T x) {
#pragma unroll
  for (int mask = kTop; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

struct WarpGroup {
  __device__ int rank() const { return lane_index(); }
  __device__ int size() const { return 32; }
  __device__ double sum(double x) const { return butterfly_sum(x); }
  __device__ int64_t sum(int64_t x) const { return butterfly_sum(static_cast<long long>(x)); }
  __device__ void barrier() const { __syncwarp(); }
};

template <int kBlockThreads>
struct BlockGroup {
  double* scratch;  // shared, one for each warp

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kBlockThreads; }
  __device__ double sum(double x) const { return across_warps(butterfly_sum(x), scratch); }
  __device__ int64_t sum(int64_t x) const {
    const long long mine = butterfly_sum(static_cast<long long>(x));
    return across_warps(mine, reinterpret_cast<long long*>(scratch));
  }
  __device__ double least(double x) const {
    for (int mask = 16; mask > 0; mask /= 2) x = fmin(x, __shfl_xor_sync(kAllLanes, x, mask));
    gather(x, scratch);
    for (int w = 0; w < kBlockThreads / 32; ++w) x = fmin(x, scratch[w]);
    __syncthreads();
    return x;
  }
  __device__ void barrier() const { __syncthreads(); }

 private:
  template <class T>
  __device__ static void gather(T of_warp, T* slots) {
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = of_warp;
    __syncthreads();
  }
  template <class T>
  __device__ static T across_warps(T of_warp, T* slots) {
    gather(of_warp, slots);
    T total = 0;
    for (int w = 0; w < kBlockThreads / 32; ++w) total += slots[w];
    __syncthreads();
    return total;
  }
};

}  // namespace gradamp::cuda
