// A step's elements in shared memory, and their sums: no fp64 for fp32, fp16 and bf16 but once
// a step.
#pragma once

#include "../rules/sketch.h"
#include "element.cuh"
#include "groups.cuh"
#include "stream.cuh"

namespace gradamp::cuda {

template <class E>
constexpr int kElementsPerRow = 32 * E::kPerVector;
template <class E>
constexpr int kElementsPerStep = kStepRows * kElementsPerRow<E>;

// This lane's elements of a row of which `left` elements lie inside the tensor.
template <class E>
__device__ inline int valid_elements(int left) {
  const int valid = left - lane_index() * E::kPerVector;
  return valid < 0 ? 0 : valid > E::kPerVector ? E::kPerVector : valid;
}

// ---- a step in shared memory --------------------------------------------------------

// Where a step's first element lies in its stage: 2 if that is half a word, else 0.
__device__ inline int stage_offset(const char* data) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 4);
}

// The lane's vector of a row; kOdd: the step begins with half a word.
template <bool kOdd>
__device__ inline uint4 load_vector(const Step& step, int row) {
  const char* const p = step.bytes + row * kRowBytes + lane_index() * 16;
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  if (!kOdd) return v;
  const bool last = row == kStepRows - 1 && lane_index() == 31;
  const uint32_t next = *(last ? step.after : reinterpret_cast<const uint32_t*>(p + 16));
  return make_uint4(__funnelshift_r(v.x, v.y, 16), __funnelshift_r(v.y, v.z, 16),
                    __funnelshift_r(v.z, v.w, 16), __funnelshift_r(v.w, next, 16));
}

// Where element i of a step is that begins at `offset`.
template <class E>
__device__ inline const char* element_at(const Step& step, int offset, int i) {
  const int at = offset + i * kElementBytes<E>;
  return at < kStepBytes ? step.bytes + at : reinterpret_cast<const char*>(step.after);
}
template <class E>
__device__ inline typename E::Wide load_element(const Step& step, int offset, int i) {
  return load_element<E>(element_at<E>(step, offset, i));
}

// Multiplies `count` elements of a step, of which the first belongs to `to`. Neighbouring
// lanes write neighbouring elements, whatever the alignment.
template <class E>
__device__ inline void write_elements(char* to, const Step& step, int offset, int count,
                                      typename E::Wide factor) {
#pragma unroll 4
  for (int i = lane_index(); i < count; i += 32)
    scale_element<E>(element_at<E>(step, offset, i), in_global(to) + i * kElementBytes<E>, factor);
}

// ---- per element: no fp64 for fp32, fp16 and bf16 -----------------------------------

// Sums of one vector's elements x.
template <class E>
struct VectorSums {
  typename E::Wide d, d2;  // of x - shift and its square
  typename E::Wide part;   // of x with its sign in the sketch
};

// Bit e of `signs` is element e's. Only the first `valid` elements count unless kFull.
template <class E, bool kFull>
__device__ inline VectorSums<E> add_up(uint4 raw, typename E::Wide shift, uint32_t signs,
                                       int valid) {
  using Wide = typename E::Wide;
  VectorSums<E> sums = {};
  Wide x[E::kPerVector];
  E::unpack(raw, x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) {
    const bool counts = kFull || e < valid;
    const Wide delta = counts ? x[e] - shift : Wide(0);
    sums.d += delta;
    sums.d2 += delta * delta;
    const uint32_t minus = (signs << (31 - e)) & 0x80000000u;
    Wide signed_x;
    if constexpr (sizeof(Wide) == 4) {
      signed_x = __uint_as_float(__float_as_uint(x[e]) ^ minus);
    } else {
      signed_x = __hiloint2double(__double2hiint(x[e]) ^ static_cast<int>(minus),
                                  __double2loint(x[e]));
    }
    sums.part += counts ? signed_x : Wide(0);
  }
  return sums;
}

template <class E>
__device__ inline bool squares_out_of_range(typename E::Wide d2) {
  return sizeof(d2) == 4 && !squares_in_range(static_cast<float>(d2));
}

// A lane's sums over a tile.
struct LaneSums {
  double d = 0.0, d2 = 0.0;  // of x - shift and its square
  SketchSums sketch;
};

// Adds up a vector whose squares leave the range of fp32, scaled, which d2 tells how.
template <class E, bool kFull>
__device__ inline void add_scaled(LaneSums& lane, uint4 raw, typename E::Wide shift,
                                  typename E::Wide d2, int valid) {
  using Wide = typename E::Wide;
  // Differences of large elements could overflow before they are scaled, and small ones' could
  // not after: equal elements, however large, differ by nothing.
  const bool small = d2 < 1;
  const Wide before = small ? 1.0f : 0x1p-96f, after = small ? 0x1p96f : 1.0f;
  Wide x[E::kPerVector], sum_d = 0, sum_d2 = 0;
  E::unpack(raw, x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) {
    const Wide delta = kFull || e < valid ? (x[e] * before - shift * before) * after : 0;
    sum_d += delta;
    sum_d2 += delta * delta;
  }
  const double back = small ? 0x1p-96 : 0x1p96;
  lane.d += sum_d * back;
  lane.d2 += sum_d2 * (back * back);
}

// Of all bits but the elements' signs.
template <class E>
__device__ inline bool is_zero(uint4 v) {
  const uint32_t any = v.x | v.y | v.z | v.w;
  return (any & (E::kPerVector == 8 ? 0x7fff7fffu : 0x7fffffffu)) == 0;
}

// The same for a whole step.
template <class E, bool kOdd>
__device__ inline void add_step_scaled(LaneSums& lane, const Step& step,
                                       typename E::Wide shift, typename E::Wide d2) {
#pragma unroll 1
  for (int j = 0; j < kStepRows; ++j) {
    const uint4 raw = load_vector<kOdd>(step, j);
    // Zeros are common, where they add nothing: in the gradients of embeddings.
    if (shift != 0 || !is_zero<E>(raw)) add_scaled<E, true>(lane, raw, shift, d2, E::kPerVector);
  }
}

// What a tile's elements are taken from: the mean of its first row, which no single element
// leads astray, or its first element where the row is not whole.
template <class E>
__device__ inline typename E::Wide find_shift(const Step& step, int offset, int count) {
  using Wide = typename E::Wide;
  if (count < kElementsPerRow<E>) return load_element<E>(step, offset, 0);
  Wide x[E::kPerVector];
  E::unpack(offset ? load_vector<true>(step, 0) : load_vector<false>(step, 0), x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) x[e] *= Wide(1) / kElementsPerRow<E>;
#pragma unroll
  for (int half = E::kPerVector / 2; half > 0; half /= 2)
#pragma unroll
    for (int e = 0; e < half; ++e) x[e] += x[e + half];
  return butterfly_sum(x[0]);
}

}  // namespace gradamp::cuda
