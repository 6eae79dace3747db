// A gradient's elements, one by one and in 16-byte vectors: unpacking, scaling.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../rules/common.h"

namespace gradamp::cuda {

// kPerVector elements fill 16 bytes; Wide is what is computed in.
struct Float32 {
  using Wide = float;
  using Raw = float;
  static constexpr int kPerVector = 4;
  __device__ static void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
  }
  __device__ static float widen(float x) { return x; }
  __device__ static float narrow(float x) { return x; }
};

struct BFloat16 {
  using Wide = float;
  using Raw = uint16_t;
  static constexpr int kPerVector = 8;
  __device__ static void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  __device__ static uint32_t pack_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_pair(x[0], x[1]), pack_pair(x[2], x[3]), pack_pair(x[4], x[5]),
                      pack_pair(x[6], x[7]));
  }
  __device__ static float widen(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
  __device__ static uint16_t narrow(float x) { return static_cast<uint16_t>(pack_pair(x, x)); }
};

struct Float16 {
  using Wide = float;
  using Raw = uint16_t;
  static constexpr int kPerVector = 8;
  __device__ static void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
  __device__ static uint32_t pack_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static uint4 pack(const float (&x)[8]) {
    return make_uint4(pack_pair(x[0], x[1]), pack_pair(x[2], x[3]), pack_pair(x[4], x[5]),
                      pack_pair(x[6], x[7]));
  }
  __device__ static float widen(uint16_t x) {
    const uint32_t pair = x;
    return __half22float2(*reinterpret_cast<const __half2*>(&pair)).x;
  }
  __device__ static uint16_t narrow(float x) { return static_cast<uint16_t>(pack_pair(x, x)); }
};

struct Float64 {
  using Wide = double;
  using Raw = double;
  static constexpr int kPerVector = 2;
  __device__ static void unpack(uint4 v, double (&x)[2]) {
    x[0] = __hiloint2double(static_cast<int>(v.y), static_cast<int>(v.x));
    x[1] = __hiloint2double(static_cast<int>(v.w), static_cast<int>(v.z));
  }
  __device__ static uint4 pack(const double (&x)[2]) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]),
                      __double2hiint(x[1]));
  }
  __device__ static double widen(double x) { return x; }
  __device__ static double narrow(double x) { return x; }
};

template <class E>
constexpr int kElementBytes = 16 / E::kPerVector;

// ---- one element --------------------------------------------------------------------

template <class E>
__device__ inline typename E::Wide load_element(const char* p) {
  using Raw = typename E::Raw;
  return E::widen(*reinterpret_cast<const Raw*>(p));
}

// ---- products -----------------------------------------------------------------------

// Two fp16 products of `v`: what is finite does not become infinite, but stops at the largest.
__device__ inline uint32_t saturated(uint32_t v, uint32_t product) {
  const auto halves = [](uint32_t word) { return *reinterpret_cast<const __half2*>(&word); };
  const auto word = [](__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); };
  const uint32_t limit = word(__hmax2(halves(v & 0x7fff7fffu), halves(0x7bff7bffu)));
  const __half2 below = __hmin2_nan(halves(product), halves(limit));
  return word(__hmax2_nan(below, halves(limit ^ 0x80008000u)));
}

template <class E>
__device__ inline uint4 scaled(uint4 v, typename E::Wide multiplier) {
  typename E::Wide x[E::kPerVector];
  E::unpack(v, x);
#pragma unroll
  for (int i = 0; i < E::kPerVector; ++i) x[i] *= multiplier;
  const uint4 y = E::pack(x);
  if constexpr (std::is_same_v<E, Float16>)
    return make_uint4(saturated(v.x, y.x), saturated(v.y, y.y), saturated(v.z, y.z),
                      saturated(v.w, y.w));
  return y;
}

// Of the element at `from`, to `to`.
template <class E>
__device__ inline void scale_element(const char* from, char* to, typename E::Wide multiplier) {
  using Raw = typename E::Raw;
  const Raw v = *reinterpret_cast<const Raw*>(from);
  const Raw y = E::narrow(E::widen(v) * multiplier);
  if constexpr (std::is_same_v<E, Float16>) {
    *reinterpret_cast<Raw*>(to) = static_cast<Raw>(saturated(v, y));
  } else {
    *reinterpret_cast<Raw*>(to) = y;
  }
}

}  // namespace gradamp::cuda
