// The processor's own vectors in the extensions of GCC and Clang: 16 fp32 lanes with
// AVX-512, 8 with AVX2, else 4. Loads and stores convert from and to a gradient's dtype.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace gradamp::cpu {
namespace {  // compiled for several instruction sets: the linker must not merge the copies

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using f32v = float __attribute__((vector_size(4 * kLanes)));
using u32v = uint32_t __attribute__((vector_size(4 * kLanes)));
using u16v = uint16_t __attribute__((vector_size(2 * kLanes)));
using f64v = double __attribute__((vector_size(4 * kLanes)));    // half as many lanes
using f32half = float __attribute__((vector_size(2 * kLanes)));  // what it is converted from
constexpr int kWideLanes = kLanes / 2;

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

// GCC makes two halves of it, and puts them together.
inline u32v widen_words(const void* p) {
#if defined(__AVX512F__)
  return bits_as<u32v>(_mm512_maskz_cvtepu16_epi32(0xffff, load_bytes<__m256i>(p)));
#elif defined(__AVX2__)
  return bits_as<u32v>(_mm256_cvtepu16_epi32(load_bytes<__m128i>(p)));
#else
  return __builtin_convertvector(load_bytes<u16v>(p), u32v);
#endif
}

// ---- to fp32 ------------------------------------------------------------------------

inline f32v load(const float* p) { return load_bytes<f32v>(p); }

inline f32v load(const bf16* p) { return bits_as<f32v>(widen_words(p) << 16); }

inline f32v load(const fp16* p) {
#if defined(__AVX512F__)
  return bits_as<f32v>(_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(p)));
#elif defined(__F16C__)
  return bits_as<f32v>(_mm256_cvtph_ps(load_bytes<__m128i>(p)));
#else
  // Shift the exponent and mantissa into place, then let the multiplication rebias the
  // exponent: it also normalises subnormals. Inf and NaN keep an all-ones exponent.
  const u32v h = widen_words(p);
  const u32v magnitude = (h & 0x7fffu) << 13;
  const f32v scaled = bits_as<f32v>(magnitude) * 0x1p112f;
  const u32v special = bits_as<u32v>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return bits_as<f32v>(bits_as<u32v>(scaled) | special | ((h & 0x8000u) << 16));
#endif
}

// The last elements of a tile, fewer than a vector, with zeros behind them.
template <class T>
inline f32v load_last(const T* data, int64_t lanes) {
  T last[kLanes] = {};
  std::memcpy(last, data, lanes * sizeof(T));
  return load(last);
}

// ---- from fp32, to nearest even -----------------------------------------------------

inline void store(float* p, f32v x) { std::memcpy(p, &x, sizeof x); }

inline void store(bf16* p, f32v x) {
  const u32v u = bits_as<u32v>(x);
  const u32v rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const u32v half = (x != x ? u32v{} + 0x7fc00000u : rounded) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = bits_as<__m256i>(half);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  const u16v packed = __builtin_convertvector(half, u16v);
#endif
  std::memcpy(p, &packed, sizeof packed);
}

#if !defined(__F16C__)
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
#endif

inline void store(fp16* p, f32v x) {
#if defined(__AVX512F__)
  const __m256i half =
      _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &half, sizeof half);
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane].bits = to_fp16_bits(x[lane]);
#endif
}

template <class T>
inline void store_last(T* data, f32v x, int64_t lanes) {
  T last[kLanes];
  store(last, x);
  std::memcpy(data, last, lanes * sizeof(T));
}

// ---- arithmetic that operators have not ----------------------------------------------

inline f32v larger(f32v a, f32v b) { return a < b ? b : a; }

inline f32v root(f32v x) {
#if defined(__AVX512F__)
  return bits_as<f32v>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(x)));
#elif defined(__AVX2__)
  return bits_as<f32v>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// ---- fp64 ---------------------------------------------------------------------------

inline f64v widen(const float* p) {
  return __builtin_convertvector(load_bytes<f32half>(p), f64v);
}

inline f32half narrow(f64v x) { return __builtin_convertvector(x, f32half); }

inline void widen(f32v x, f64v out[2]) {
  float lanes[kLanes];
  store(lanes, x);
  out[0] = widen(lanes);
  out[1] = widen(lanes + kWideLanes);
}

// ---- reductions, each in a fixed order ----------------------------------------------

template <class V>
inline auto sum_lanes(V x) {
  constexpr int kCount = sizeof x / sizeof x[0];
  std::remove_cv_t<std::remove_reference_t<decltype(x[0])>> a[kCount];
  std::memcpy(a, &x, sizeof x);
  for (int width = kCount / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

#if __has_builtin(__builtin_shufflevector)
// Where lane `lane` finds its addend when vectors of groups of 2 * kHalf lanes, two vectors
// at a time, become one of twice as many groups of kHalf.
template <int kHalf>
constexpr int addend(int lane) {
  constexpr int kGroups = kLanes / (2 * kHalf);
  const int group = lane / kHalf;
  return group / kGroups * kLanes + group % kGroups * 2 * kHalf + lane % kHalf;
}

template <int kHalf, int... kLane>
inline f32v fold_pair(f32v a, f32v b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, addend<kHalf>(kLane)...) +
         __builtin_shufflevector(a, b, (addend<kHalf>(kLane) + kHalf)...);
}

template <int kHalf>
inline void fold_all(f32v (&v)[kLanes]) {
  for (int i = 0; i < kHalf; ++i)
    v[i] = fold_pair<kHalf>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>());
  if constexpr (kHalf > 1) fold_all<kHalf / 2>(v);
}

// Lane i of the result is the sum over v[i].
inline f32v sum_each(f32v (&v)[kLanes]) {
  fold_all<kLanes / 2>(v);
  return v[0];
}
#else
inline f32v sum_each(f32v (&v)[kLanes]) {
  f32v sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_lanes(v[i]);
  return sums;
}
#endif

}  // namespace
}  // namespace gradamp::cpu
