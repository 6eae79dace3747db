// The buckets of the sketch: their signed sums, and what these do to the running means. fp64.
#pragma once

#include "sums.cuh"

namespace gradamp::cuda {

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

}  // namespace gradamp::cuda
