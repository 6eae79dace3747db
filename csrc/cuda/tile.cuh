// One warp on one tile of one gradient: statistics, sketch and multiplication in one read.
//
// A row is one 16-byte vector in every lane. Tiles go in steps of several rows, whose loads
// run ahead of their use by one step; what is left at the end of a tensor goes row by row.
// Which lane and vector an element belongs to follows from its index alone, so sums do not
// depend on alignment.
#pragma once

#include "../rules/moments.h"
#include "../rules/sketch.h"
#include "element.cuh"
#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

constexpr int kRowBytes = 512;

template <class E>
constexpr int kRowElements = 32 * E::kPerVector;
// Of fp64 fewer: its sums take more registers.
template <class E>
constexpr int kStepRows = kElementBytes<E> == 8 ? 2 : 4;
template <class E>
constexpr int kStepElements = kStepRows<E> * kRowElements<E>;

constexpr int kKeptVectors = kTileElements * 4 / 16;  // a kept tile: 16 KB
constexpr int kMaxBuckets = kTileElements / 16;  // of a tile whose buckets are longer than one

// The compiler does not see where an address out of shared memory points to.
template <class T>
__device__ inline T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

struct TileData {
  char* data;           // the tile's first element
  int count;            // 1 ... kTileElements
  uint32_t first_word;  // of signs: the first element's index in the whole tensor / 32
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

template <class E>
__device__ inline bool squares_out_of_range(typename E::Wide d2) {
  return sizeof(d2) == 4 && !squares_in_range(static_cast<float>(d2));
}

// Sums of x - shift and its square, of vectors whose squares leave the range of fp32: taken
// after scaling. `d2` is what came of it without.
template <class E, bool kFull>
__device__ inline VectorSums<E> add_up_scaled(uint4 raw, typename E::Wide shift,
                                              typename E::Wide d2, int valid,
                                              typename E::Wide scale) {
  // 0, but the compiler does not know: it would hold what was unpacked before for use here.
  const uint32_t zero = d2 == 1;
  VectorSums<E> sums = {};
  typename E::Wide x[E::kPerVector];
  E::unpack(make_uint4(raw.x ^ zero, raw.y ^ zero, raw.z ^ zero, raw.w ^ zero), x);
#pragma unroll
  for (int e = 0; e < E::kPerVector; ++e) {
    const typename E::Wide delta = kFull || e < valid ? x[e] * scale - shift * scale : 0;
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

// What came of vectors whose squares leave the range of fp32, which `d2` tells. A lane adds
// them up again, scaled.
template <class E, bool kFull>
__device__ inline void add_scaled(LaneSums<E>& lane, uint4 raw, typename E::Wide d2,
                                  int valid) {
  const bool small = d2 < 1;
  const VectorSums<E> sums =
      add_up_scaled<E, kFull>(raw, lane.shift, d2, valid, small ? 0x1p96f : 0x1p-96f);
  const double back = small ? 0x1p-96 : 0x1p96;
  lane.total_d += sums.d * back;
  lane.total_d2 += sums.d2 * (back * back);
}

// ---- sketch -------------------------------------------------------------------------

// Signed sums of runs of 16 elements, those of neighbouring lanes; of runs of 512, whole
// rows, each lane's part. `begin` is the first element's place in the tile.
template <class E, int kRows>
__device__ inline void store_buckets(const typename E::Wide (&part)[kRows], int begin,
                                     int run_log2, float* buckets) {
  using Wide = typename E::Wide;
  const int lane = lane_index();
  if (run_log2 == 4) {
    constexpr int kLanes = 16 / E::kPerVector;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const Wide s = butterfly_sum<kLanes / 2>(part[j]);
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
      const int element = begin + j * kRowElements<E>;
      float& bucket = buckets[element / 512 * 32 + lane];
      const bool first = kAll <= kRows || element % 512 == 0;
      bucket = static_cast<float>(first ? s : bucket + s);
    }
  }
}

// ---- loads and stores ---------------------------------------------------------------

// Where the lane's part of a row begins: at `words + offset`, `words` being a multiple of 16.
struct Cursor {
  char* words;
  unsigned offset;

  __device__ explicit Cursor(char* p)
      : words(p - reinterpret_cast<uintptr_t>(p) % 16), offset(reinterpret_cast<uintptr_t>(p) % 16) {}
  __device__ char* at(int row) const { return words + offset + row * kRowBytes; }
};

__device__ inline uint4 load_word(const Cursor& p, int row, int next = 0) {
  return *reinterpret_cast<const uint4*>(p.words + row * kRowBytes + next * 16);
}

// The lane's vector of a row, of which `word` was loaded ahead.
template <bool kAligned>
__device__ inline uint4 complete(uint4 word, const Cursor& p, int row) {
  return kAligned ? word : realigned(word, load_word(p, row, 1), p.offset);
}

// A misaligned row goes out in aligned words that neighbouring lanes' vectors share; only
// its two ends go element by element.
template <class E, bool kAligned>
__device__ inline void store_row(const Cursor& p, int row, uint4 v) {
  uint4* const word = reinterpret_cast<uint4*>(p.words + row * kRowBytes);
  if (kAligned) {
    *word = v;
    return;
  }
  const int lane = lane_index();
  const int split = static_cast<int>(16 - p.offset) / kElementBytes<E>;
  const int previous = (lane + 31) % 32;
  const uint4 before =
      make_uint4(__shfl_sync(kAllLanes, v.x, previous), __shfl_sync(kAllLanes, v.y, previous),
                 __shfl_sync(kAllLanes, v.z, previous), __shfl_sync(kAllLanes, v.w, previous));
  if (lane > 0) *word = realigned(before, v, 16 - p.offset);
  if (lane == 0 || lane == 31)
    store_part<E>(p.at(row), v, lane == 0 ? 0 : split, lane == 0 ? split : E::kPerVector);
}

// ---- a tile -------------------------------------------------------------------------

// A vector of the tile that the warp keeps in shared memory between the phases; fp64 tiles,
// twice as large, are not kept.
__device__ inline uint4& kept_vector(int row) {
  extern __shared__ uint4 kept_tiles[];
  return kept_tiles[warp_index() * kKeptVectors + row * 32 + lane_index()];
}

// What is done with a tile's elements as they are read.
template <class E>
struct Pass {
  typename E::Wide factor;  // 1: nothing is written
  bool keep;                // a copy is set aside, as it was read
  float* buckets;           // gets the sums of the sketch's buckets, if they are in runs
};

template <class E>
__device__ inline typename E::Wide first_element(uint4 raw) {
  typename E::Wide x[E::kPerVector];
  E::unpack(raw, x);
  return x[0];
}

// The tile's full steps; returns how many elements they were. `tile` lies in shared memory,
// here and below: registers are scarce.
template <class E, bool kAligned>
__device__ inline int measure_steps(const TileData& tile, const Pass<E>& pass, Cursor p,
                                    LaneSums<E>& sums) {
  constexpr int kStep = kStepElements<E>;
  // Lanes that share a sign word hold those of all rows between them.
  constexpr int kSharing = 32 / E::kPerVector;
  const int lane = lane_index();
  const int row = lane % kSharing;
  const uint32_t own_word = tile.first_word + row * E::kPerVector + lane / kSharing;
  const int count = tile.count, run_log2 = tile.run_log2;
  uint4 ahead[kStepRows<E>];  // loaded one step before its use
#pragma unroll
  for (int j = 0; j < kStepRows<E>; ++j) ahead[j] = load_word(p, j);
  sums.shift = first_element<E>(complete<kAligned>(ahead[0], p, 0));
  int begin = 0;
#pragma unroll 1
  do {
    const uint32_t own_signs = sign_word(own_word + begin / 32);
    typename E::Wide part[kStepRows<E>];
#pragma unroll
    for (int j = 0; j < kStepRows<E>; ++j) {
      const uint4 raw = complete<kAligned>(ahead[j], p, j);
      const uint32_t signs =
          __shfl_sync(kAllLanes, own_signs, j, kSharing) >> (row * E::kPerVector);
      VectorSums<E> v = add_up<E, true>(raw, sums.shift, signs, E::kPerVector);
      part[j] = v.part;
      if (pass.keep) kept_vector(begin / kRowElements<E> + j) = raw;
      if (pass.factor != 1) {
        store_row<E, kAligned>(p, j, scaled<E>(raw, pass.factor));
        if (squares_out_of_range<E>(v.d2)) {
          add_scaled<E, true>(sums, raw, v.d2, E::kPerVector);
          v.d = 0, v.d2 = 0;
        }
      }
      sums.d += v.d, sums.d2 += v.d2;
      if (begin + 2 * kStep <= count) ahead[j] = load_word(p, kStepRows<E> + j);
    }
    if (run_log2) store_buckets<E, kStepRows<E>>(part, begin, run_log2, pass.buckets);
    if (pass.factor == 1 && squares_out_of_range<E>(sums.d2)) {
#pragma unroll 1
      for (int j = 0; j < kStepRows<E>; ++j)  // still in memory as they were
        add_scaled<E, true>(sums, complete<kAligned>(load_word(p, j), p, j), sums.d2,
                            E::kPerVector);
      sums.d = 0, sums.d2 = 0;
    }
    sums.flush();
    p.words += kStepRows<E> * kRowBytes;
    begin += kStep;
  } while (begin + kStep <= count);
  return begin;
}

// The rest, from element `begin` on.
template <class E>
__device__ inline void measure_rows(const TileData& tile, const Pass<E>& pass, int begin,
                                    LaneSums<E>& sums) {
#pragma unroll 1
  for (; begin < tile.count; begin += kRowElements<E>) {
    const int element = begin + lane_index() * E::kPerVector;
    const int valid = valid_elements<E>(tile.count - begin);
    char* const p = in_global(tile.data) + element * kElementBytes<E>;
    const uint4 raw = load_part<E>(p, valid);
    if (begin == 0) sums.shift = first_element<E>(raw);
    const uint32_t signs = sign_word(tile.first_word + element / 32) >> (element % 32);
    const VectorSums<E> v = add_up<E, false>(raw, sums.shift, signs, valid);
    const typename E::Wide part[1] = {v.part};
    if (tile.run_log2) store_buckets<E, 1>(part, begin, tile.run_log2, pass.buckets);
    if (pass.keep) kept_vector(begin / kRowElements<E>) = raw;
    if (pass.factor != 1) store_part<E>(p, scaled<E>(raw, pass.factor), 0, valid);
    if (valid > 0 && squares_out_of_range<E>(v.d2)) {
      add_scaled<E, false>(sums, raw, v.d2, valid);
    } else {
      sums.d += v.d, sums.d2 += v.d2;
      sums.flush();
    }
  }
}

// Moments of the lane's elements of a tile, and the tile's buckets.
template <class E>
__device__ inline Moments measure_elements(const TileData& tile, const Pass<E>& pass) {
  LaneSums<E> sums = {};
  int begin = 0;
  if (tile.count >= kStepElements<E>) {
    const Cursor p(in_global(tile.data) + lane_index() * 16);
    begin = p.offset == 0 ? measure_steps<E, true>(tile, pass, p, sums)
                          : measure_steps<E, false>(tile, pass, p, sums);
  }
  measure_rows<E>(tile, pass, begin, sums);
  const int count = tile.count / kRowElements<E> * E::kPerVector +
                    valid_elements<E>(tile.count % kRowElements<E>);
  if (count == 0) return Moments{};
  return shifted_moments(count, sums.shift, sums.total_d, sums.total_d2);
}

template <class E, bool kAligned>
__device__ inline int multiply_steps(const TileData& tile, typename E::Wide factor, bool kept,
                                     Cursor p) {
  int begin = 0;
#pragma unroll 1
  for (; begin + kStepElements<E> <= tile.count; begin += kStepElements<E>) {
    uint4 words[kStepRows<E>];
#pragma unroll
    for (int j = 0; j < kStepRows<E>; ++j)
      words[j] = kept ? kept_vector(begin / kRowElements<E> + j) : load_word(p, j);
#pragma unroll
    for (int j = 0; j < kStepRows<E>; ++j) {
      const uint4 raw = kept ? words[j] : complete<kAligned>(words[j], p, j);
      store_row<E, kAligned>(p, j, scaled<E>(raw, factor));
    }
    p.words += kStepRows<E> * kRowBytes;
  }
  return begin;
}

// Second phase; `kept`: from what was set aside.
template <class E>
__device__ inline void multiply_elements(const TileData& tile, double multiplier, bool kept) {
  const auto factor = static_cast<typename E::Wide>(multiplier);
  const Cursor p(in_global(tile.data) + lane_index() * 16);
  int begin = p.offset == 0 ? multiply_steps<E, true>(tile, factor, kept, p)
                            : multiply_steps<E, false>(tile, factor, kept, p);
#pragma unroll 1
  for (; begin < tile.count; begin += kRowElements<E>) {
    const int element = begin + lane_index() * E::kPerVector;
    const int valid = valid_elements<E>(tile.count - begin);
    char* const at = in_global(tile.data) + element * kElementBytes<E>;
    const uint4 raw = kept ? kept_vector(begin / kRowElements<E>) : load_part<E>(at, valid);
    store_part<E>(at, scaled<E>(raw, factor), 0, valid);
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
  const float before = in_global(means.before)[bucket];
  in_global(means.after)[bucket] =
      update_bucket(static_cast<float>(s * means.inverse), before, means.weight, sums);
}

// Buckets of one element each, in a tensor of one short tile, before it is multiplied.
template <class E>
__device__ inline SketchSums fold_elements(const TileData& tile, const RunningMeans& means) {
  SketchSums sums;
#pragma unroll 1
  for (int i = lane_index(); i < tile.count; i += 32) {
    typename E::Wide x[E::kPerVector];
    E::unpack(load_part<E>(tile.data + i * kElementBytes<E>, 1), x);
    fold(means, i, sign_is_minus(tile.first_word, i) ? -x[0] : x[0], sums);
  }
  return sums;
}

// Buckets of 16, which `values` holds, or of 512, of which it holds the lanes' parts.
__device__ inline SketchSums fold_buckets(int run_log2, int buckets, const float* values,
                                          const RunningMeans& means) {
  SketchSums sums;
  const int lane = lane_index();
  if (run_log2 == 4) {
#pragma unroll 1
    for (int b = lane; b < buckets; b += 32) fold(means, b, values[b], sums);
  } else {  // at most eight: four lanes add up one
    float s = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) s += values[lane * 8 + i];
    s = butterfly_sum<2>(s);
    if (lane % 4 == 0 && lane / 4 < buckets) fold(means, lane / 4, s, sums);
  }
  return sums;
}

}  // namespace gradamp::cuda
