#pragma once

#include "cuda_runtime_api.h"

struct float2 {
  float x, y;
};
struct __half2 {
  _Float16 x, y;
};
inline float2 __half22float2(__half2 h) { return {static_cast<float>(h.x), static_cast<float>(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<_Float16>(x), static_cast<_Float16>(y)};
}
// As __hmin2 and __hmax2 do, these take the number of a number and a NaN; with _nan, the NaN.
inline bool is_nan(_Float16 x) { return x != x; }
inline _Float16 larger(_Float16 a, _Float16 b) { return is_nan(a) || a < b ? b : a; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {larger(a.x, b.x), larger(a.y, b.y)}; }
inline _Float16 larger_nan(_Float16 a, _Float16 b) { return !is_nan(a) && (is_nan(b) || a < b) ? b : a; }
inline _Float16 smaller_nan(_Float16 a, _Float16 b) { return !is_nan(a) && (is_nan(b) || b < a) ? b : a; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {larger_nan(a.x, b.x), larger_nan(a.y, b.y)}; }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return {smaller_nan(a.x, b.x), smaller_nan(a.y, b.y)}; }
