// Names every other file here uses; no torch, no CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GRADAMP_HD __host__ __device__ inline
#else
#define GRADAMP_HD inline
#endif

namespace gradamp {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// True for finite values only. Written so that -ffast-math style reordering of
// callers cannot turn a NaN into a pass: comparisons with NaN are false.
GRADAMP_HD bool is_finite(double x) { return x - x == 0.0; }

}  // namespace gradamp
