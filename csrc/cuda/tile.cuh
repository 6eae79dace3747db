// One warp on one tile of one gradient: statistics, sketch and multiplication in one read.
//
// A row is one 16-byte vector in every lane. Tiles go in steps of several rows, whose loads
// run ahead of their use by one step; what is left at the end of a tensor goes row by row.
// Which lane and vector an element belongs to follows from its index alone, so sums do not
// depend on alignment.
#pragma once

#include "../moments.h"
#include "../sketch.h"
#include "element.cuh"
#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

constexpr int kStepRows = 4;
constexpr int kRowBytes = 512;
constexpr int kStepBytes = kStepRows * kRowBytes;

template <class E>
constexpr int kRowElements = 32 * E::kPerVector;
template <class E>
constexpr int kStepElements = kStepRows * kRowElements<E>;

constexpr int kKeptVectors = kTileElements * 4 / 16;  // a kept tile: 16 KB
constexpr int kMaxBuckets = kTileElements / 16;  // of a tile whose buckets are longer than one

struct TileData {
  char* data;           // the tile's first element
  int count;            // 1 ... kTileElements
  uint32_t first_word;  // of signs: the first element's index / 32
  int run_log2;         // length of the sketch's buckets; 0: they are not summed here
};

// This lane's elements of a row of which `left` elements lie inside the tensor.
template <class E>
__device__ inline int valid_elements(int left) {
  const int valid = left - lane_index() * E::kPerVector;
  return valid < 0 ? 0 : valid > E::kPerVector ? E::kPerVector : valid;
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
    const Wide delta = kFull || e < valid ? x[e] - shift : Wide(0);
    sums.d += delta;
    sums.d2 += delta * delta;
    const uint32_t minus = (signs << (31 - e)) & 0x80000000u;
    if constexpr (sizeof(Wide) == 4) {
      sums.part += __uint_as_float(__float_as_uint(x[e]) ^ minus);
    } else {
      sums.part += __hiloint2double(__double2hiint(x[e]) ^ static_cast<int>(minus),
                                    __double2loint(x[e]));
    }
  }
  return sums;
}

__device__ inline bool squares_out_of_range(float d2) { return !(d2 >= 1e-28f && d2 <= 1e34f); }

// Sums of x - shift and its square, of vectors whose squares leave the range of fp32: taken
// after scaling. `d2` is what came of it without.
template <class E, bool kFull>
__device__ inline VectorSums<E> add_up_scaled(uint4 raw, float shift, float d2, int valid,
                                              float scale) {
  // 0, but the compiler does not know: it would hold what was unpacked before for use here.
  const uint32_t zero = d2 == 1.0f;
  VectorSums<E> sums = {};
  float x[E::kPerVector];
  E::unpack(make_uint4(raw.x ^ zero, raw.y ^ zero, raw.z ^ zero, raw.w ^ zero), x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) {
    const float delta = kFull || e < valid ? (x[e] - shift) * scale : 0.0f;
    sums.d += delta;
    sums.d2 += delta * delta;
  }
  return sums;
}

// ---- a lane's part of a tile: fp64 from here up -------------------------------------

template <class E>
struct LaneSums {
  typename E::Wide shift;       // close to the lane's elements
  typename E::Wide d, d2;       // since the last flush
  double total_d, total_d2;

  __device__ void flush() {
    total_d += d, total_d2 += d2;
    d = 0, d2 = 0;
  }
};

// The lane's first element, or the median of its first three, which is no outlier: all others
// would lie far from that, and their squares would hide the variance.
template <class E>
__device__ inline typename E::Wide shift_for(uint4 raw, int valid) {
  typename E::Wide x[E::kPerVector];
  E::unpack(raw, x);
  if constexpr (E::kPerVector >= 3)
    if (valid >= 3) return fmaxf(fminf(x[0], x[1]), fminf(fmaxf(x[0], x[1]), x[2]));
  return x[0];
}

template <class E, bool kFull>
__device__ inline void add(LaneSums<E>& lane, const VectorSums<E>& v, uint4 raw, int valid) {
  if constexpr (sizeof(typename E::Wide) == 4) {
    if (squares_out_of_range(v.d2)) {
      const bool small = v.d2 < 1.0f;
      const VectorSums<E> again = add_up_scaled<E, kFull>(raw, lane.shift, v.d2, valid,
                                                          small ? 0x1p96f : 0x1p-96f);
      const double back = small ? 0x1p-96 : 0x1p96;
      lane.total_d += again.d * back;
      lane.total_d2 += again.d2 * (back * back);
      return;
    }
  }
  lane.d += v.d;
  lane.d2 += v.d2;
}

// ---- sketch -------------------------------------------------------------------------

// Signed sums of runs of 16 elements, those of neighbouring lanes, or of 512, whole rows.
// `begin` is the first element's place in the tile.
template <class E, int kRows>
__device__ inline void store_buckets(const typename E::Wide (&part)[kRows], int begin,
                                     int run_log2, float* buckets) {
  using Wide = typename E::Wide;
  const int lane = lane_index();
  if (run_log2 == 4) {
    constexpr int kLanes = 16 / E::kPerVector;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Wide s = butterfly_sum(part[j], kLanes);
      if (lane % kLanes == 0)
        buckets[begin / 16 + (j * 32 + lane) / kLanes] = static_cast<float>(s);
    }
  } else {
    constexpr int kAll = 512 / kRowElements<E>;  // rows of a bucket
    constexpr int kSome = kAll < kRows ? kAll : kRows;
#pragma unroll
    for (int j = 0; j < kRows; j += kSome) {
      Wide s = 0;
#pragma unroll
      for (int k = 0; k < kSome; ++k) s += part[j + k];
      s = butterfly_sum(s);
      const int element = begin + j * kRowElements<E>;
      float& bucket = buckets[element / 512];
      if (lane == 0) bucket = static_cast<float>(element % 512 == 0 ? s : bucket + s);
    }
  }
}

// ---- loads and stores ---------------------------------------------------------------

// A lane's vectors of a step are loaded one step ahead. At a misaligned address they are read
// as aligned words of 16 bytes that begin up to 15 bytes early.
__device__ inline unsigned misalignment(const char* p) {
  return reinterpret_cast<uintptr_t>(p) % 16;
}

__device__ inline uint4 load_word(const char* p) {
  return *reinterpret_cast<const uint4*>(p - misalignment(p));
}

// The vector at p, of which `word` was loaded ahead.
__device__ inline uint4 complete(uint4 word, const char* p) {
  const unsigned offset = misalignment(p);
  return offset == 0 ? word : realigned(word, load_word(p + 16), offset);
}

// Stores a row, whose vector of this lane belongs at p. A misaligned row goes out in aligned
// words that neighbouring lanes' vectors share; only its two ends go element by element.
template <class E>
__device__ inline void store_row(char* p, uint4 v) {
  const unsigned offset = misalignment(p);
  if (offset == 0) {
    *reinterpret_cast<uint4*>(p) = v;
    return;
  }
  const int lane = lane_index();
  const int split = static_cast<int>(16 - offset) / kElementBytes<E>;
  const uint4 before =
      make_uint4(__shfl_up_sync(kAllLanes, v.x, 1), __shfl_up_sync(kAllLanes, v.y, 1),
                 __shfl_up_sync(kAllLanes, v.z, 1), __shfl_up_sync(kAllLanes, v.w, 1));
  if (lane > 0) *reinterpret_cast<uint4*>(p - offset) = realigned(before, v, 16 - offset);
  if (lane == 0 || lane == 31)
    store_part<E>(p, v, lane == 0 ? 0 : split, lane == 0 ? split : E::kPerVector);
}

// ---- a tile -------------------------------------------------------------------------

// A vector of the tile that the warp keeps in shared memory between the phases; fp64 tiles,
// twice as large, are not kept.
template <class E>
__device__ inline uint4& kept_vector(int row) {
  extern __shared__ uint4 kept_tiles[];
  return kept_tiles[warp_index() * kKeptVectors + row * 32 + lane_index()];
}

// Moments of the lane's elements of a tile, and the tile's buckets where they are longer
// than one. Multiplies what was read unless the multiplier is 1; `keep`: sets a copy of the
// tile aside as it was read.
template <class E>
__device__ inline Moments measure_elements(const TileData& tile, double multiplier, bool keep,
                                           float* buckets) {
  using Wide = typename E::Wide;
  const auto factor = static_cast<Wide>(multiplier);
  const int lane = lane_index();
  constexpr int kStep = kStepElements<E>;
  char* p = tile.data + lane * 16;
  LaneSums<E> sums = {};
  uint4 ahead[kStepRows] = {};
  if (kStep <= tile.count) {
#pragma unroll
    for (int j = 0; j < kStepRows; ++j) ahead[j] = load_word(p + j * kRowBytes);
    Wide x[E::kPerVector];
    E::unpack(complete(ahead[0], p), x);
    sums.shift = x[0];
  }
  int begin = 0;
#pragma unroll 1
  for (; begin + kStep <= tile.count; begin += kStep, p += kStepBytes) {
    // Lanes that share a sign word hold those of all rows between them.
    constexpr int kSharing = 32 / E::kPerVector;
    const int row = lane % kSharing;
    const uint32_t own_signs =
        sign_word(tile.first_word + begin / 32 + row * E::kPerVector + lane / kSharing);
    Wide part[kStepRows];
#pragma unroll
    for (int j = 0; j < kStepRows; ++j) {
      const uint4 raw = complete(ahead[j], p + j * kRowBytes);
      if (begin + 2 * kStep <= tile.count)
        ahead[j] = load_word(p + kStepBytes + j * kRowBytes);
      const uint32_t signs =
          __shfl_sync(kAllLanes, own_signs, j, kSharing) >> (row * E::kPerVector);
      const VectorSums<E> v = add_up<E, true>(raw, sums.shift, signs, E::kPerVector);
      part[j] = v.part;
      if (keep) kept_vector<E>(begin / kRowElements<E> + j) = raw;
      if (factor != 1) store_row<E>(p + j * kRowBytes, scaled<E>(raw, factor));
      add<E, true>(sums, v, raw, E::kPerVector);
    }
    if (tile.run_log2) store_buckets<E, kStepRows>(part, begin, tile.run_log2, buckets);
    sums.flush();
  }
#pragma unroll 1
  for (; begin < tile.count; begin += kRowElements<E>, p += kRowBytes) {
    const int valid = valid_elements<E>(tile.count - begin);
    const uint4 raw = load_part<E>(p, valid);
    if (begin == 0) sums.shift = shift_for<E>(raw, valid);
    const int element = lane * E::kPerVector;
    const uint32_t signs =
        sign_word(tile.first_word + (begin + element) / 32) >> (element % 32);
    const VectorSums<E> v = add_up<E, false>(raw, sums.shift, signs, valid);
    const Wide part[1] = {v.part};
    if (tile.run_log2) store_buckets<E, 1>(part, begin, tile.run_log2, buckets);
    if (keep) kept_vector<E>(begin / kRowElements<E>) = raw;
    if (factor != 1) store_part<E>(p, scaled<E>(raw, factor), 0, valid);
    if (valid > 0) add<E, false>(sums, v, raw, valid);
    sums.flush();
  }
  const int count = tile.count / kRowElements<E> * E::kPerVector +
                    valid_elements<E>(tile.count % kRowElements<E>);
  if (count == 0) return Moments{};
  return shifted_moments(count, sums.shift, sums.total_d, sums.total_d2);
}

// Second phase; `kept`: from what was set aside.
template <class E>
__device__ inline void multiply_elements(const TileData& tile, double multiplier, bool kept) {
  const auto factor = static_cast<typename E::Wide>(multiplier);
  constexpr int kStep = kStepElements<E>;
  char* p = tile.data + lane_index() * 16;
  int begin = 0;
#pragma unroll 1
  for (; begin + kStep <= tile.count; begin += kStep, p += kStepBytes) {
    uint4 words[kStepRows];
#pragma unroll
    for (int j = 0; j < kStepRows; ++j)
      words[j] = kept ? kept_vector<E>(begin / kRowElements<E> + j) : load_word(p + j * kRowBytes);
#pragma unroll
    for (int j = 0; j < kStepRows; ++j) {
      const uint4 raw = kept ? words[j] : complete(words[j], p + j * kRowBytes);
      store_row<E>(p + j * kRowBytes, scaled<E>(raw, factor));
    }
  }
#pragma unroll 1
  for (; begin < tile.count; begin += kRowElements<E>, p += kRowBytes) {
    const int valid = valid_elements<E>(tile.count - begin);
    const uint4 raw = kept ? kept_vector<E>(begin / kRowElements<E>) : load_part<E>(p, valid);
    store_part<E>(p, scaled<E>(raw, factor), 0, valid);
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
  for (int i = lane_index(); i < tile.count; i += 32) {
    typename E::Wide x[E::kPerVector];
    E::unpack(load_part<E>(tile.data + i * kElementBytes<E>, 1), x);
    fold(means, i, sign_is_minus(i) ? -x[0] : x[0], sums);
  }
  return sums;
}

__device__ inline SketchSums fold_buckets(int buckets, const float* values,
                                          const RunningMeans& means) {
  SketchSums sums;
#pragma unroll 1
  for (int b = lane_index(); b < buckets; b += 32) fold(means, b, values[b], sums);
  return sums;
}

}  // namespace gradamp::cuda
