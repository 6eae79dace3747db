// One warp on one tile of one gradient: statistics, sketch and multiplication in one read.
//
// A tile comes in steps of several rows of one 16-byte vector in every lane. Which step, row
// and lane an element belongs to follows from its index alone, so sums do not depend on
// alignment. Whole steps are unrolled; what is left goes row by row.
#pragma once

#include "../moments.h"
#include "../sketch.h"
#include "element.cuh"
#include "groups.cuh"
#include "stream.cuh"

namespace gradamp::cuda {

template <class E>
constexpr int kElementsPerRow = 32 * E::kPerVector;
template <class E>
constexpr int kElementsPerStep = kStepRows * kElementsPerRow<E>;

template <class E>
constexpr int kBytesEach = sizeof(typename E::Raw);

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

// Element i of a step that begins at `offset`.
template <class E>
__device__ inline typename E::Wide load_element(const Step& step, int offset, int i) {
  const int at = offset + i * kBytesEach<E>;
  return load_element<E>(at < kStepBytes ? step.bytes + at
                                         : reinterpret_cast<const char*>(step.after));
}

// Multiplies `count` elements of a step, of which the first belongs to `to`. Neighbouring
// lanes write neighbouring elements, whatever the alignment.
template <class E>
__device__ inline void write_elements(char* to, const Step& step, int offset, int count,
                                      typename E::Wide factor) {
#pragma unroll 4
  for (int i = lane_index(); i < count; i += 32)
    store_element<E>(in_global(to) + i * kBytesEach<E>,
                     load_element<E>(step, offset, i) * factor);
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
  return sizeof(d2) == 4 && !(d2 >= typename E::Wide(1e-28f) && d2 <= typename E::Wide(1e34f));
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
  const bool small = d2 < 1;
  const Wide scale = small ? 0x1p96f : 0x1p-96f;
  Wide x[E::kPerVector], sum_d = 0, sum_d2 = 0;
  E::unpack(raw, x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) {
    const Wide delta = kFull || e < valid ? x[e] * scale - shift * scale : 0;
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

// ---- sketch -------------------------------------------------------------------------

__device__ inline void fold(const RunningMeans& means, int bucket, double s, float before,
                            SketchSums& sums) {
  in_global(means.after)[bucket] =
      update_bucket(static_cast<float>(s * means.inverse), before, means.weight, sums);
}

__device__ inline float mean_before(const Work& work, int bucket) {
  const bool exists = bucket << work.tile->bucket_log2 < work.tile->count;
  return work.means.before && exists ? in_global(work.means.before)[bucket] : 0.0f;
}

// Buckets of one element each: the `count` of a step, from element `begin` on.
template <class E>
__device__ inline void fold_elements(const Work& work, const Step& step, int offset, int begin,
                                     int count, SketchSums& sums) {
  const RunningMeans& means = work.means;
#pragma unroll 4
  for (int i = lane_index(); i < count; i += 32) {
    const double x = load_element<E>(step, offset, i);
    const bool minus = sign_is_minus(work.tile->first_word, begin + i);
    fold(means, begin + i, minus ? -x : x, in_global(means.before)[begin + i], sums);
  }
}

// Of the buckets of 16 in half a step each lane folds some.
constexpr int kHalfRows = kStepRows / 2;

template <class E>
struct Runs {
  static constexpr int kLanes = 16 / E::kPerVector;  // that share a bucket
  static constexpr int kPerRow = 32 / kLanes;
  static constexpr int kFolds = kHalfRows > kLanes ? kHalfRows / kLanes : 1;

  // The bucket of the half that the lane folds, beyond its last for none.
  __device__ static int bucket(int fold) {
    const int lane = lane_index();
    return (fold * kLanes + lane % kLanes) * kPerRow + lane / kLanes;
  }
};

template <class E>
__device__ inline void fold_runs(const RunningMeans& means, typename E::Wide (&part)[kHalfRows],
                                 int begin, const float (&before)[Runs<E>::kFolds],
                                 SketchSums& sums) {
  using R = Runs<E>;
  const int member = lane_index() % R::kLanes;
#pragma unroll
  for (int j = 0; j < kHalfRows; ++j) part[j] = butterfly_sum<R::kLanes / 2>(part[j]);
#pragma unroll
  for (int f = 0; f < R::kFolds; ++f) {
    typename E::Wide s = 0;
#pragma unroll
    for (int r = 0; r < R::kLanes && f * R::kLanes + r < kHalfRows; ++r)
      if (r == member) s = part[f * R::kLanes + r];
    if (member < kHalfRows)
      fold(means, begin / 16 + R::bucket(f), static_cast<float>(s), before[f], sums);
  }
}

// Of eight buckets of 512 each lane folds at most one: four add up one.
__device__ inline int long_bucket(int begin) { return begin / 512 + lane_index() / 4; }

// The buckets whose parts are there, the last of them being that of element `last`.
__device__ inline void fold_parts(const RunningMeans& means, int last, float before,
                                  SketchSums& sums) {
  const int begin = last / 512 / kPartBuckets * kPartBuckets * 512;
  const int lane = lane_index();
  __syncwarp();
  const float* const parts = &warp_memory().parts[0][0] + lane * 8;
  float s = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) s += parts[i];
  s = butterfly_sum<2>(s);
  if (means.before && lane % 4 == 0 && long_bucket(begin) <= last / 512)
    fold(means, long_bucket(begin), s, before, sums);
  __syncwarp();
}

// Adds the lane's part of the bucket of element `at`, of which `first` is the first.
__device__ inline void put_part(int at, bool first, float part) {
  float& to = warp_memory().parts[(at >> 9) & (kPartBuckets - 1)][lane_index()];
  to = first ? part : to + part;
}

// The same of half a step.
template <class E>
__device__ inline void put_parts(const typename E::Wide (&part)[kHalfRows], int begin) {
  constexpr int kAll = 512 / kElementsPerRow<E>;  // rows of a bucket
  constexpr int kSome = kAll < kHalfRows ? kAll : kHalfRows;
#pragma unroll
  for (int j = 0; j < kHalfRows; j += kSome) {
    typename E::Wide s = 0;
#pragma unroll
    for (int k = 0; k < kSome; ++k) s += part[j + k];
    const int at = begin + j * kElementsPerRow<E>;
    put_part(at, kAll <= kHalfRows || (at & 511) == 0, static_cast<float>(s));
  }
}

constexpr int kFoldedAtOnce = 512 * kPartBuckets;

// ---- a tile -------------------------------------------------------------------------

// Whole steps from element `begin` on, of which the first is there; returns where they end.
// That of the last is still to be called done.
template <class E, bool kOdd, bool kWrite, class Steps>
__device__ __forceinline__ int measure_whole(Steps& stream, const Work& work, int begin, LaneSums& sums) {
  using Wide = typename E::Wide;
  using R = Runs<E>;
  constexpr int kStep = kElementsPerStep<E>, kHalf = kStep / 2;
  // Lanes that share a sign word hold those of all rows between them.
  constexpr int kSharing = 32 / E::kPerVector;
  const int lane = lane_index();
  const int row = lane % kSharing;
  const uint32_t own_word = work.tile->first_word + row * E::kPerVector + lane / kSharing;
  const int count = work.tile->count;
  const bool in_runs = work.tile->bucket_log2 == 4;
  const bool aligned = reinterpret_cast<uintptr_t>(work.data) % 16 == 0;
  const auto shift = static_cast<Wide>(work.shift), factor = static_cast<Wide>(work.multiplier);
  float before[R::kFolds];
  const auto fetch_before = [&](int begin) {
    if (in_runs) {
#pragma unroll
      for (int f = 0; f < R::kFolds; ++f)
        before[f] = mean_before(work, begin / 16 + R::bucket(f));
    } else {
      before[0] = mean_before(work, long_bucket(begin));
    }
  };
  fetch_before(in_runs ? begin : begin / kFoldedAtOnce * kFoldedAtOnce);
#pragma unroll 1
  while (true) {
    const Step step = stream.take();
    Wide d = 0, d2 = 0;
#pragma unroll 1
    for (int first = 0; first < kStepRows; first += kHalfRows) {
      const uint32_t own_signs = sign_word(own_word + (begin >> 5));
      Wide part[kHalfRows];
#pragma unroll
      for (int j = 0; j < kHalfRows; ++j) {
        const uint4 raw = load_vector<kOdd>(step, first + j);
        const uint32_t signs =
            __shfl_sync(kAllLanes, own_signs, j, kSharing) >> (row * E::kPerVector);
        const VectorSums<E> v = add_up<E, true>(raw, shift, signs, E::kPerVector);
        part[j] = v.part;
        d += v.d, d2 += v.d2;
        if (kWrite && aligned)
          *reinterpret_cast<uint4*>(in_global(work.data) + begin * kBytesEach<E> + j * kRowBytes +
                                    lane * 16) = scaled<E>(raw, factor);
      }
      if (in_runs) {
        if (work.means.before) fold_runs<E>(work.means, part, begin, before, sums.sketch);
        fetch_before(begin + kHalf);
      } else {
        put_parts<E>(part, begin);
      }
      begin += kHalf;
    }
    if (kWrite && !aligned)
      write_elements<E>(work.data + (begin - kStep) * kBytesEach<E>, step, kOdd ? 2 : 0, kStep,
                        factor);
    if (squares_out_of_range<E>(d2)) {
      add_step_scaled<E, kOdd>(sums, step, shift, d2);
    } else {
      sums.d += d, sums.d2 += d2;
    }
    if (!in_runs && (begin & (kFoldedAtOnce - 1)) == 0) {
      fold_parts(work.means, begin - 1, before[0], sums.sketch);
      fetch_before(begin);
    }
    if (begin + kStep > count || !stream.comes_whole()) return begin;
    stream.done_whole();
  }
}

// What is left of a step, row by row, from element `begin` on: `left` elements.
template <class E>
__device__ __forceinline__ void measure_rows(const Work& work, const Step& step, int begin, int left,
                                    LaneSums& sums) {
  using R = Runs<E>;
  const int offset = stage_offset(work.data);
  const int log2 = work.tile->bucket_log2;
  const RunningMeans& means = work.means;
  const auto shift = static_cast<typename E::Wide>(work.shift);
  const int lane = lane_index();
#pragma unroll 1
  for (int j = 0; j * kElementsPerRow<E> < left; ++j) {
    const int row = begin + j * kElementsPerRow<E>;
    const int element = row + lane * E::kPerVector;
    const int valid = valid_elements<E>(left - j * kElementsPerRow<E>);
    const uint4 raw = offset ? load_vector<true>(step, j) : load_vector<false>(step, j);
    const uint32_t signs = sign_word(work.tile->first_word + element / 32) >> (element % 32);
    const VectorSums<E> v =
        add_up<E, false>(raw, shift, signs, valid);
    if (valid > 0 && squares_out_of_range<E>(v.d2)) {
      add_scaled<E, false>(sums, raw, shift, v.d2, valid);
    } else {
      sums.d += v.d, sums.d2 += v.d2;
    }
    if (log2 == 4) {
      const auto s = butterfly_sum<R::kLanes / 2>(v.part);
      const int bucket = element / 16;
      if (means.before && lane % R::kLanes == 0 && bucket * 16 < begin + left)
        fold(means, bucket, static_cast<float>(s), mean_before(work, bucket), sums.sketch);
    } else if (log2 != 0) {
      put_part(row, row % 512 == 0, static_cast<float>(v.part));
    }
  }
}

// One step from element `begin` on, or several whole ones; returns where they end. That of
// the last is still to be called done.
template <class E, class Steps>
__device__ __forceinline__ int measure_steps(Steps& stream, const Work& work, int begin,
                                             LaneSums& sums) {
  const int left = work.tile->count - begin, log2 = work.tile->bucket_log2;
  const int offset = sizeof(typename E::Raw) == 2 ? stage_offset(work.data) : 0;
  const bool write = work.multiplier != 1.0;
  const Step step = stream.take();
  if (begin == 0) {
    const double shift = find_shift<E>(step, offset, left);
    if (lane_index() == 0) warp_memory().work.shift = shift;
    __syncwarp();
  }
  if (log2 != 0 && left >= kElementsPerStep<E>) {
    if constexpr (sizeof(typename E::Raw) == 2) {
      if (offset)
        return write ? measure_whole<E, true, true>(stream, work, begin, sums)
                     : measure_whole<E, true, false>(stream, work, begin, sums);
    }
    return write ? measure_whole<E, false, true>(stream, work, begin, sums)
                 : measure_whole<E, false, false>(stream, work, begin, sums);
  }
  const int now = left < kElementsPerStep<E> ? left : kElementsPerStep<E>;
  measure_rows<E>(work, step, begin, now, sums);
  if (log2 == 0 && work.means.before)
    fold_elements<E>(work, step, offset, begin, now, sums.sketch);
  if (write)
    write_elements<E>(work.data + begin * kBytesEach<E>, step, offset, now,
                      static_cast<typename E::Wide>(work.multiplier));
  return begin + now;
}

// What the tile's end leaves of buckets that are folded several at once.
__device__ inline void fold_rest(const Work& work, LaneSums& sums) {
  const int count = work.tile->count;
  if (work.tile->bucket_log2 != 9 || count % kFoldedAtOnce == 0) return;
  const int block = count / kFoldedAtOnce * kFoldedAtOnce;
  fold_parts(work.means, count - 1, mean_before(work, long_bucket(block)), sums.sketch);
}

// Second phase: the whole block multiplies a tile where it lies.
template <class E>
__device__ inline void multiply_elements(char* data, int count, double multiplier) {
  constexpr int kAtOnce = 8;
  const auto factor = static_cast<typename E::Wide>(multiplier);
  const int thread = threadIdx.x;
  char* const p = in_global(data);
  uint4* const vectors = reinterpret_cast<uint4*>(p);
  const int whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? count / E::kPerVector : 0;
#pragma unroll 1
  for (int first = thread; first < whole; first += kAtOnce * kThreads) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * kThreads < whole) v[j] = vectors[first + j * kThreads];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * kThreads < whole) vectors[first + j * kThreads] = scaled<E>(v[j], factor);
  }
#pragma unroll 4
  for (int i = whole * E::kPerVector + thread; i < count; i += kThreads)
    store_element<E>(p + i * kBytesEach<E>, load_element<E>(p + i * kBytesEach<E>) * factor);
}

}  // namespace gradamp::cuda
