#pragma once

#include "cuda_runtime_api.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};
inline uint16_t rounded_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {rounded_to_bf16(x), rounded_to_bf16(y)};
}
