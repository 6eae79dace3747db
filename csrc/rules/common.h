// Names every other file here uses; no torch, no CUDA runtime.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage: the same header is compiled for several instruction sets, and the
// linker must not merge their copies.
#if defined(__CUDACC__)
#define GRADAMP_HD static inline __host__ __device__
#define GRADAMP_HD_MEMBER __host__ __device__
#else
#define GRADAMP_HD static inline
#define GRADAMP_HD_MEMBER
#endif

namespace gradamp {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

GRADAMP_HD int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

GRADAMP_HD bool is_finite(double x) { return x - x == 0.0; }

}  // namespace gradamp
