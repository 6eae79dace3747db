// One warp on one tile of one gradient: statistics, sketch and multiplication in one read. Where
// something else is done with a step's elements, steps are measured one at a time.
//
// A tile comes in steps of several rows of one 16-byte vector in every lane. Which step, row
// and lane an element belongs to follows from its index alone, so sums do not depend on
// alignment. Whole steps are unrolled; what is left goes row by row.
#pragma once

#include "buckets.cuh"
#include "sums.cuh"

namespace gradamp::cuda {

// Whole steps from element `begin` on, of which the first is there, or with kOne that alone;
// returns where they end. That of the last is still to be called done.
template <class E, bool kOdd, bool kWrite, bool kOne, class Steps>
__device__ __forceinline__ int measure_whole(Steps& stream, const Work& work, int begin,
                                             LaneSums& sums) {
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
  const auto shift = static_cast<Wide>(work.shift);
  const auto factor = static_cast<Wide>(work.multiplier);
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
          *reinterpret_cast<uint4*>(in_global(work.data) + begin * kElementBytes<E> + j * kRowBytes +
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
      write_elements<E>(work.data + (begin - kStep) * kElementBytes<E>, step, kOdd ? 2 : 0, kStep,
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
    if (kOne || begin + kStep > count || !stream.comes_whole()) return begin;
    stream.done_whole();
  }
}

// What is left of a step, row by row, from element `begin` on: `left` elements.
template <class E>
__device__ __forceinline__ void measure_rows(const Work& work, const Step& step, int begin,
                                             int left, LaneSums& sums) {
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
    const VectorSums<E> v = add_up<E, false>(raw, shift, signs, valid);
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

// One step from element `begin` on, or, if the kernel multiplies, several whole ones; returns where
// they end. That of the last is still to be called done.
template <class E, bool kMultiplies, class Steps>
__device__ __forceinline__ int measure_steps(Steps& stream, const Work& work, int begin,
                                             LaneSums& sums) {
  const int left = work.tile->count - begin, log2 = work.tile->bucket_log2;
  const int offset = sizeof(typename E::Raw) == 2 ? stage_offset(work.data) : 0;
  const bool write = kMultiplies && work.multiplier != 1.0;
  const Step step = stream.take();
  if (begin == 0) {
    const double shift = find_shift<E>(step, offset, left);
    if (lane_index() == 0) warp_memory().work.shift = shift;
    __syncwarp();
  }
  if (log2 != 0 && left >= kElementsPerStep<E>) {
    if constexpr (sizeof(typename E::Raw) == 2) {
      if (offset)
        return write ? measure_whole<E, true, true, false>(stream, work, begin, sums)
                     : measure_whole<E, true, false, !kMultiplies>(stream, work, begin, sums);
    }
    return write ? measure_whole<E, false, true, false>(stream, work, begin, sums)
                 : measure_whole<E, false, false, !kMultiplies>(stream, work, begin, sums);
  }
  const int now = left < kElementsPerStep<E> ? left : kElementsPerStep<E>;
  measure_rows<E>(work, step, begin, now, sums);
  if (log2 == 0 && work.means.before)
    fold_elements<E>(work, step, offset, begin, now, sums.sketch);
  if (write)
    write_elements<E>(work.data + begin * kElementBytes<E>, step, offset, now,
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
  constexpr int kAtOnce = 4;
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
    scale_element<E>(p + i * kElementBytes<E>, p + i * kElementBytes<E>, factor);
}

}  // namespace gradamp::cuda
