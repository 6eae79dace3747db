// One warp on one tile of one gradient: statistics, sketch and multiplication in one read.
//
// Element i of an iteration belongs to the lane and vector that its index says, whatever
// its address, so sums do not depend on alignment.
#pragma once

#include "../moments.h"
#include "../sketch.h"
#include "element.cuh"
#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

// 16-byte loads a lane has in flight. fp64 takes fewer: its sums need twice the registers.
template <class E>
constexpr int kVectors = kElementBytes<E> == 8 ? 4 : 8;

// An iteration: what a warp loads at once.
template <class E>
constexpr int kIterationElements = kVectors<E> * 32 * E::kPerVector;

constexpr int kMaxBuckets = kTileElements / 16;  // of a tile whose buckets are longer than one

struct TileData {
  char* data;       // the tile's first element, null: no gradient
  int64_t first;    // its index in the tensor
  int count;        // 1 ... kTileElements
  int bucket_log2;
};

// ---- per element: no fp64 for fp32, fp16 and bf16 -----------------------------------

// The part of an iteration that one lane holds.
template <class E>
struct Vectors {
  uint4 raw[kVectors<E>];
};

template <class E>
struct LaneSums {
  typename E::Wide shift, d, d2;       // of x - shift
  typename E::Wide part[kVectors<E>];  // signed sum of each vector
};

// Elements of vector j of this lane that lie inside the tile; `left` are those of the
// iteration.
template <class E>
__device__ inline int valid_elements(int j, int left) {
  const int valid = left - (j * 32 + static_cast<int>(threadIdx.x % 32)) * E::kPerVector;
  return valid < 0 ? 0 : valid > E::kPerVector ? E::kPerVector : valid;
}

// Keeps the compiler from holding what it unpacked before for use behind this point.
template <class E>
__device__ inline void forget_unpacked(Vectors<E>& v) {
#pragma unroll
  for (int j = 0; j < kVectors<E>; ++j)
    asm volatile("" : "+r"(v.raw[j].x), "+r"(v.raw[j].y), "+r"(v.raw[j].z), "+r"(v.raw[j].w));
}

template <class E, bool kFull>
__device__ inline void load(Vectors<E>& v, const char* data, int left) {
  const char* p = data + threadIdx.x % 32 * 16;
  const unsigned offset = reinterpret_cast<uintptr_t>(data) % 16;
#pragma unroll
  for (int j = 0; j < kVectors<E>; ++j) {
    const int valid = kFull ? E::kPerVector : valid_elements<E>(j, left);
    if (!kFull && valid < E::kPerVector) {
      v.raw[j] = load_part<E>(p + j * 512, valid);
    } else if (offset == 0) {
      v.raw[j] = *reinterpret_cast<const uint4*>(p + j * 512);
    } else {
      v.raw[j] = load_misaligned(p + j * 512, offset);
    }
  }
}

template <class E, bool kFull>
__device__ inline void store_scaled(const Vectors<E>& v, char* data, int left,
                                    typename E::Wide multiplier) {
  char* p = data + threadIdx.x % 32 * 16;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
#pragma unroll
  for (int j = 0; j < kVectors<E>; ++j) {
    const int valid = kFull ? E::kPerVector : valid_elements<E>(j, left);
    const uint4 product = scaled<E>(v.raw[j], multiplier);
    if (aligned && valid == E::kPerVector) {
      *reinterpret_cast<uint4*>(p + j * 512) = product;
    } else {
      store_part<E>(p + j * 512, product, valid);
    }
  }
}

// `words` are the sign words of the iteration, `words[k]` of lane l being word 32 k + l.
template <class E, bool kFull>
__device__ inline void accumulate(const Vectors<E>& v, const uint32_t* words, int left,
                                  LaneSums<E>& sums) {
  using Wide = typename E::Wide;
  constexpr int kPerWord = 32 / E::kPerVector;  // vectors of a sign word
  const int lane = threadIdx.x % 32;
  Wide x[E::kPerVector];
  E::unpack(v.raw[0], x);
  sums.shift = x[0], sums.d = 0, sums.d2 = 0;
#pragma unroll
  for (int j = 0; j < kVectors<E>; ++j) {
    const int word = (j * 32) / kPerWord + lane / kPerWord;
    const uint32_t own = words[j * 32 / kPerWord / 32];
    const uint32_t signs = __shfl_sync(kAllLanes, own, word) >> (lane % kPerWord * E::kPerVector);
    const int valid = kFull ? E::kPerVector : valid_elements<E>(j, left);
    E::unpack(v.raw[j], x);
    sums.part[j] = 0;
#pragma unroll
    for (int e = 0; e < E::kPerVector; ++e) {
      const Wide delta = kFull || e < valid ? x[e] - sums.shift : Wide(0);
      sums.d += delta;
      sums.d2 += delta * delta;
      const uint32_t minus = (signs << (31 - e)) & 0x80000000u;
      if constexpr (sizeof(Wide) == 4) {
        sums.part[j] += __uint_as_float(__float_as_uint(x[e]) ^ minus);
      } else {
        sums.part[j] += __hiloint2double(__double2hiint(x[e]) ^ static_cast<int>(minus),
                                         __double2loint(x[e]));
      }
    }
  }
}

// Moments of the lane's elements. Where squares leave the range of fp32 they are taken
// again, scaled into it.
template <class E, bool kFull>
__device__ inline Moments lane_moments(Vectors<E>& v, const LaneSums<E>& sums, int left) {
  double count = kVectors<E> * E::kPerVector;
  if (!kFull) {
    int valid = 0;
#pragma unroll
    for (int j = 0; j < kVectors<E>; ++j) valid += valid_elements<E>(j, left);
    if (valid == 0) return Moments{};
    count = valid;
  }
  if constexpr (sizeof(typename E::Wide) == 4) {
    if (!(sums.d2 >= 1e-28f && sums.d2 <= 1e34f)) {
      forget_unpacked(v);
      const float scale = sums.d2 < 1e-28f ? 0x1p96f : 0x1p-96f;
      const float shift = sums.shift * scale;
      float d = 0.0f, d2 = 0.0f;
#pragma unroll
      for (int j = 0; j < kVectors<E>; ++j) {
        float x[E::kPerVector];
        E::unpack(v.raw[j], x);
        const int valid = kFull ? E::kPerVector : valid_elements<E>(j, left);
#pragma unroll
        for (int e = 0; e < E::kPerVector; ++e) {
          const float delta = kFull || e < valid ? x[e] * scale - shift : 0.0f;
          d += delta;
          d2 += delta * delta;
        }
      }
      Moments m = shifted_moments(count, shift, d, d2);
      const double back = sums.d2 < 1e-28f ? 0x1p-96 : 0x1p96;
      m.mean *= back;
      m.m2 *= back * back;
      return m;
    }
  }
  return shifted_moments(count, sums.shift, sums.d, sums.d2);
}

// Signed sums of runs of 16 elements, those of neighbouring lanes, or of whole rows of
// vectors: 512 elements. `begin` is the iteration's first element in the tile.
template <class E>
__device__ inline void store_buckets(const LaneSums<E>& sums, int begin, int bucket_log2,
                                     float* buckets) {
  const int lane = threadIdx.x % 32;
  if (bucket_log2 == 4) {
    constexpr int kLanes = 16 / E::kPerVector;
#pragma unroll
    for (int j = 0; j < kVectors<E>; ++j) {
      const typename E::Wide s = butterfly_sum(sums.part[j], kLanes);
      if (lane % kLanes == 0)
        buckets[begin / 16 + (j * 32 + lane) / kLanes] = static_cast<float>(s);
    }
  } else {
    constexpr int kAll = 512 / (32 * E::kPerVector);
    constexpr int kRows = kAll < kVectors<E> ? kAll : kVectors<E>;
#pragma unroll
    for (int j0 = 0; j0 < kVectors<E>; j0 += kRows) {
      typename E::Wide s = 0;
#pragma unroll
      for (int k = 0; k < kRows; ++k) s += sums.part[j0 + k];
      s = butterfly_sum(s);
      const int element = begin + j0 * 32 * E::kPerVector;
      if (lane == 0) {
        float& bucket = buckets[element / 512];
        bucket = static_cast<float>(element % 512 == 0 ? s : bucket + s);
      }
    }
  }
}

// ---- a tile's elements --------------------------------------------------------------

// 1 / k: the part of the k-th of k equal sets.
__device__ constexpr double kShare[] = {
    0,        1,        1.0 / 2,  1.0 / 3,  1.0 / 4,  1.0 / 5,  1.0 / 6,  1.0 / 7, 1.0 / 8,
    1.0 / 9,  1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13, 1.0 / 14, 1.0 / 15, 1.0 / 16};

template <class E>
__device__ inline void sign_words(int64_t first, uint32_t (&words)[(kIterationElements<E> + 1023) / 1024]) {
#pragma unroll
  for (int w = 0; w < (kIterationElements<E> + 1023) / 1024; ++w)
    words[w] = sign_word(static_cast<uint32_t>(first >> 5) + w * 32 + threadIdx.x % 32);
}

// Moments of the lane's elements of a tile, and the tile's buckets where they are longer
// than one. Multiplies what was read unless the multiplier is 1.
template <class E, bool kFull>
__device__ inline Moments measure_vectors(const TileData& tile, typename E::Wide multiplier,
                                          uint4* kept, float* buckets) {
  Moments moments;
#pragma unroll 1
  for (int begin = 0, k = 1; begin < tile.count; begin += kIterationElements<E>, ++k) {
    char* data = tile.data + begin * kElementBytes<E>;
    const int left = tile.count - begin;
    Vectors<E> v;
    load<E, kFull>(v, data, left);
    LaneSums<E> sums;
    {
      uint32_t words[(kIterationElements<E> + 1023) / 1024];
      sign_words<E>(tile.first + begin, words);
      accumulate<E, kFull>(v, words, left, sums);
    }
    if (buckets) store_buckets<E>(sums, begin, tile.bucket_log2, buckets);
    const Moments part = lane_moments<E, kFull>(v, sums, left);
    moments = kFull ? merge(moments, part, kShare[k]) : merge(moments, part);
    if (kept) {
#pragma unroll
      for (int j = 0; j < kVectors<E>; ++j)
        kept[begin * kElementBytes<E> / 16 + j * 32 + threadIdx.x % 32] = v.raw[j];
    }
    if (multiplier != 1) {
      forget_unpacked(v);
      store_scaled<E, kFull>(v, data, left, multiplier);
    }
  }
  return moments;
}

template <class E>
__device__ inline Moments measure_elements(const TileData& tile, double multiplier, uint4* kept,
                                           float* buckets) {
  const auto narrow = static_cast<typename E::Wide>(multiplier);
  return tile.count == kTileElements ? measure_vectors<E, true>(tile, narrow, kept, buckets)
                                     : measure_vectors<E, false>(tile, narrow, kept, buckets);
}

// Second phase: from shared memory if the tile was kept there.
template <class E>
__device__ inline void multiply_elements(const TileData& tile, double multiplier,
                                         const uint4* kept) {
  const auto narrow = static_cast<typename E::Wide>(multiplier);
#pragma unroll 1
  for (int begin = 0; begin < tile.count; begin += kIterationElements<E>) {
    char* data = tile.data + begin * kElementBytes<E>;
    const int left = tile.count - begin;
    Vectors<E> v;
    if (kept) {
#pragma unroll
      for (int j = 0; j < kVectors<E>; ++j)
        v.raw[j] = kept[begin * kElementBytes<E> / 16 + j * 32 + threadIdx.x % 32];
    } else {
      load<E, false>(v, data, left);
    }
    store_scaled<E, false>(v, data, left, narrow);
  }
}

// ---- a tile's buckets: fp64 ---------------------------------------------------------

struct RunningMeans {
  const float* before;  // of the tile's buckets
  float* after;
  double inverse;       // what sums are multiplied by before they count
  double weight;        // of this step
};

__device__ inline void fold(const RunningMeans& means, int bucket, double s, SketchSums& sums) {
  means.after[bucket] = update_bucket(static_cast<float>(s * means.inverse), means.before[bucket],
                                      means.weight, sums);
}

// Buckets of one element each, in a tensor of one short tile, before it is multiplied.
template <class E>
__device__ inline SketchSums fold_elements(const TileData& tile, const RunningMeans& means) {
  SketchSums sums;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < tile.count; i += 32) {
    typename E::Wide x[E::kPerVector];
    E::unpack(load_part<E>(tile.data + i * kElementBytes<E>, 1), x);
    fold(means, i, sign_is_minus(i) ? -x[0] : x[0], sums);
  }
  return sums;
}

__device__ inline SketchSums fold_buckets(const TileData& tile, const float* buckets,
                                          const RunningMeans& means) {
  SketchSums sums;
  const int length = 1 << tile.bucket_log2;
#pragma unroll 1
  for (int b = threadIdx.x % 32; b * length < tile.count; b += 32)
    fold(means, b, buckets[b], sums);
  return sums;
}

}  // namespace gradamp::cuda
