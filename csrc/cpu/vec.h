// Sixteen fp32 lanes in the vector extensions of GCC and Clang: one zmm, two ymm, four
// xmm or four NEON registers. Loads and stores convert from and to a gradient's dtype.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace gradamp::cpu {
namespace {  // compiled for several instruction sets: the linker must not merge the copies

constexpr int kLanes = 16;

using f32x16 = float __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x8 = double __attribute__((vector_size(64)));
using f32x8 = float __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class To, class From>
inline To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
inline V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- to fp32 ------------------------------------------------------------------------

inline f32x16 load16(const float* p) { return load_bytes<f32x16>(p); }

inline f32x16 load16(const bf16* p) {
  return bits_as<f32x16>(__builtin_convertvector(load_bytes<u16x16>(p), u32x16) << 16);
}

inline f32x16 load16(const fp16* p) {
#if defined(__AVX512F__)
  return bits_as<f32x16>(_mm512_cvtph_ps(load_bytes<__m256i>(p)));
#elif defined(__F16C__)
  const __m256 halves[2] = {_mm256_cvtph_ps(load_bytes<__m128i>(p)),
                            _mm256_cvtph_ps(load_bytes<__m128i>(p + 8))};
  return load_bytes<f32x16>(halves);
#else
  // Shift the exponent and mantissa into place, then let the multiplication rebias the
  // exponent: it also normalises subnormals. Inf and NaN keep an all-ones exponent.
  const u32x16 h = __builtin_convertvector(load_bytes<u16x16>(p), u32x16);
  const u32x16 magnitude = (h & 0x7fffu) << 13;
  const f32x16 scaled = bits_as<f32x16>(magnitude) * 0x1p112f;
  const u32x16 special = bits_as<u32x16>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return bits_as<f32x16>(bits_as<u32x16>(scaled) | special | ((h & 0x8000u) << 16));
#endif
}

// ---- from fp32, to nearest even -----------------------------------------------------

inline void store16(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }

inline void store16(bf16* p, f32x16 x) {
  const u32x16 u = bits_as<u32x16>(x);
  const u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const u32x16 is_nan = bits_as<u32x16>(x != x);
  const u32x16 half = (is_nan & 0x7fc0u) | (~is_nan & rounded);
  const u16x16 packed = __builtin_convertvector(half, u16x16);
  std::memcpy(p, &packed, sizeof packed);
}

inline uint16_t to_fp16_bits(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the rounded subnormal in the low mantissa bits.
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline void store16(fp16* p, f32x16 x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (int i = 0; i < 2; ++i) {
    const __m128i half = _mm256_cvtps_ph(halves[i], _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p + 8 * i, &half, sizeof half);
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane].bits = to_fp16_bits(x[lane]);
#endif
}

// ---- reductions ---------------------------------------------------------------------

// A fixed tree: lanes i and i + 8, then i + 4, i + 2, i + 1.
inline float sum_lanes(f32x16 x) {
  float a[kLanes];
  std::memcpy(a, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

inline double sum_lanes(f64x8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline void widen(f32x16 x, f64x8 out[2]) {
  f32x8 halves[2];
  std::memcpy(halves, &x, sizeof x);
  out[0] = __builtin_convertvector(halves[0], f64x8);
  out[1] = __builtin_convertvector(halves[1], f64x8);
}

}  // namespace
}  // namespace gradamp::cpu
