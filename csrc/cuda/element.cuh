// A gradient's elements in 16-byte vectors: loading at any address, unpacking, scaling.
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
  static constexpr int kPerVector = 4;
  __device__ static void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 pack(const float (&x)[4]) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
  }
};

struct BFloat16 {
  using Wide = float;
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
};

struct Float16 {
  using Wide = float;
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
};

struct Float64 {
  using Wide = double;
  static constexpr int kPerVector = 2;
  __device__ static void unpack(uint4 v, double (&x)[2]) {
    x[0] = __hiloint2double(static_cast<int>(v.y), static_cast<int>(v.x));
    x[1] = __hiloint2double(static_cast<int>(v.w), static_cast<int>(v.z));
  }
  __device__ static uint4 pack(const double (&x)[2]) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]),
                      __double2hiint(x[1]));
  }
};

template <class E>
constexpr int kElementBytes = 16 / E::kPerVector;

// ---- one vector at any address ------------------------------------------------------

// Bytes offset ... offset + 15 of a and b, one behind the other; 0 < offset < 16.
__device__ inline uint4 realigned(uint4 a, uint4 b, unsigned offset) {
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (offset & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (offset & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = (offset & 3) * 8;
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

template <int kBytes>
struct Unit;
template <>
struct Unit<2> { using type = uint16_t; };
template <>
struct Unit<4> { using type = uint32_t; };
template <>
struct Unit<8> { using type = uint64_t; };

// The first `valid` elements, zeros behind them.
template <class E>
__device__ inline uint4 load_part(const char* p, int valid) {
  using U = typename Unit<kElementBytes<E>>::type;
  constexpr int kPerHalf = E::kPerVector / 2;
  constexpr int kBits = 8 * kElementBytes<E>;
  uint64_t half[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < E::kPerVector; ++i)
    if (i < valid)
      half[i / kPerHalf] |= static_cast<uint64_t>(reinterpret_cast<const U*>(p)[i])
                            << (i % kPerHalf * kBits);
  return make_uint4(static_cast<uint32_t>(half[0]), static_cast<uint32_t>(half[0] >> 32),
                    static_cast<uint32_t>(half[1]), static_cast<uint32_t>(half[1] >> 32));
}

// Elements begin ... end - 1 of a vector, to where they belong in the vector at p.
template <class E>
__device__ inline void store_part(char* p, uint4 v, int begin, int end) {
  using U = typename Unit<kElementBytes<E>>::type;
  constexpr int kPerHalf = E::kPerVector / 2;
  constexpr int kBits = 8 * kElementBytes<E>;
  const uint64_t half[2] = {v.x | static_cast<uint64_t>(v.y) << 32,
                            v.z | static_cast<uint64_t>(v.w) << 32};
#pragma unroll
  for (int i = 0; i < E::kPerVector; ++i)
    if (begin <= i && i < end)
      reinterpret_cast<U*>(p)[i] = static_cast<U>(half[i / kPerHalf] >> (i % kPerHalf * kBits));
}

constexpr float kLargestHalf = 65504.0f;

// A finite fp16 number does not become infinite: it stops at the largest. `x`: products of `v`.
__device__ inline void saturate(uint4 v, float (&x)[Float16::kPerVector]) {
  float largest = 0.0f;  // which a NaN does not change
#pragma unroll
  for (int i = 0; i < Float16::kPerVector; ++i) largest = fmaxf(largest, fabsf(x[i]));
  if (largest <= kLargestHalf) return;
  float before[Float16::kPerVector];
  Float16::unpack(v, before);
#pragma unroll
  for (int i = 0; i < Float16::kPerVector; ++i)
    if (fabsf(before[i]) <= kLargestHalf && fabsf(x[i]) > kLargestHalf)
      x[i] = copysignf(kLargestHalf, x[i]);
}

template <class E>
__device__ inline uint4 scaled(uint4 v, typename E::Wide multiplier) {
  typename E::Wide x[E::kPerVector];
  E::unpack(v, x);
#pragma unroll
  for (int i = 0; i < E::kPerVector; ++i) x[i] *= multiplier;
  if constexpr (std::is_same_v<E, Float16>) saturate(v, x);
  return E::pack(x);
}

}  // namespace gradamp::cuda
