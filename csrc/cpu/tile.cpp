// Compiled once for each instruction set, each time into a namespace of its own.
#include "update.h"

namespace gradamp::cpu::GRADAMP_ISA {

void update(const UpdateTile& tile);  // update.cpp

namespace {

constexpr int kVectors = 4;  // independent accumulators: hides the latency of an addition
constexpr int kBlock = kVectors * kLanes;
constexpr int kWordBits = 32;
constexpr int kVectorsPerWord = kWordBits / kLanes;
constexpr int kStep = kBlock < kWordBits ? kWordBits : kBlock;  // whole words, whole blocks
constexpr int kStepVectors = kStep / kLanes;
constexpr int kPrefetchBytes = 8192;  // measured, into L2: a sixth faster than none, or half as far

// Buckets of a tile: only tensors of fewer elements than this have buckets of one element,
// and a tile's buckets of 16 are fewer. The stepper checks that of every tensor it is given.
constexpr int64_t kMaxBuckets = 4096;

// What is added up for the moments. Every lane has a shift of its own, close to its elements,
// so that a large mean costs no accuracy.
struct LaneSums {
  f32v shift[kVectors];
  f32v d[kVectors] = {};
  f32v d2[kVectors] = {};

  void add(int v, f32v delta) {
    d[v] += delta;
    d2[v] += delta * delta;
  }
  void add_first(int v, f32v delta, int lanes) {
    for (int i = 0; i < lanes; ++i) d[v][i] += delta[i], d2[v][i] += delta[i] * delta[i];
  }
};

inline f32v smaller(f32v a, f32v b) { return a < b ? a : b; }

// Each lane's first element, or the median of its first three, which is no outlier: all
// others would lie far from that, and their squares would hide the variance.
template <class T>
void choose_shifts(const T* data, int64_t n, LaneSums& sums) {
  for (int v = 0; v < kVectors; ++v) {
    const T* p = data + v * kLanes;
    sums.shift[v] = load(p);
    if (n < 3 * kBlock) continue;
    const f32v a = sums.shift[v], b = load(p + kBlock), c = load(p + 2 * kBlock);
    sums.shift[v] = larger(smaller(a, b), smaller(larger(a, b), c));
  }
}

// Lane i of accumulator v has this many elements out of n.
inline double lane_count(int64_t n, int v, int i) {
  const int64_t full = n / kLanes;
  const bool one_more = v < full % kVectors || (v == full % kVectors && i < n % kLanes);
  return static_cast<double>(full / kVectors + one_more);
}

// `shift_unit` and `delta_unit`: what 1 stands for in the shifts and in the sums.
Moments combine(const LaneSums& sums, int64_t n, double shift_unit = 1.0,
                double delta_unit = 1.0) {
  f64v count[2 * kVectors], mean[2 * kVectors];
  f64v total = {}, m2 = {};
  for (int v = 0; v < kVectors; ++v) {
    f64v shift[2], d[2], d2[2];
    widen(sums.shift[v], shift);
    widen(sums.d[v], d);
    widen(sums.d2[v], d2);
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * v + half;
      if (n % kBlock == 0) {
        count[k] = static_cast<double>(n / kBlock) + f64v{};
      } else {
        for (int i = 0; i < kWideLanes; ++i) count[k][i] = lane_count(n, v, kWideLanes * half + i);
      }
      const f64v mean_d = d[half] / count[k];
      mean[k] = shift[half] * shift_unit + mean_d * delta_unit;
      m2 += (d2[half] - d[half] * mean_d) * (delta_unit * delta_unit);
      total += count[k] * mean[k];
    }
  }
  const double centre = sum_lanes(total) / static_cast<double>(n);
  for (int k = 0; k < 2 * kVectors; ++k) {
    const f64v delta = mean[k] - centre;
    m2 += count[k] * delta * delta;
  }
  const double spread = sum_lanes(m2);
  return {static_cast<double>(n), centre, spread < 0.0 ? 0.0 : spread};
}

// Moments of n >= kBlock elements whose squares leave the range of fp32, taken again with
// differences scaled into it: small ones are scaled up, elements that are large down.
template <class T>
Moments scaled_moments(const T* data, int64_t n, LaneSums sums, bool small) {
  const float before = small ? 1.0f : 0x1p-96f, after = small ? 0x1p96f : 1.0f;
  for (int v = 0; v < kVectors; ++v) {
    sums.shift[v] *= before;
    sums.d[v] = sums.d2[v] = f32v{};
  }
  const auto delta = [&](f32v x, int v) { return (x * before - sums.shift[v]) * after; };
  int64_t i = 0;
  int v = 0;
  for (; i + kLanes <= n; i += kLanes, v = (v + 1) % kVectors)
    sums.add(v, delta(load(data + i), v));
  if (i < n) sums.add_first(v, delta(load_last(data + i, n - i), v), static_cast<int>(n - i));
  return combine(sums, n, 1.0 / before, 1.0 / (static_cast<double>(before) * after));
}

// Bit i of `word`, i being the lane's place among the word's elements, as a sign bit.
inline u32v sign_bits(uint32_t word, u32v place) {
#if defined(__SSE2__) && !defined(__AVX2__)
  // No shift by a different count in each lane: compare instead.
  const u32v bit = place;
  return bits_as<u32v>((bit & word) == bit) & 0x80000000u;
#else
  return (word << place) & 0x80000000u;
#endif
}

// What sign_bits takes, for each vector of a word.
struct Places {
  u32v of[kVectorsPerWord];
  Places() {
    for (int i = 0; i < kWordBits; ++i) {
#if defined(__SSE2__) && !defined(__AVX2__)
      of[i / kLanes][i % kLanes] = uint32_t{1} << i;
#else
      of[i / kLanes][i % kLanes] = static_cast<uint32_t>(kWordBits - 1 - i);
#endif
    }
  }
};

inline f32v with_sign(f32v x, u32v minus) { return bits_as<f32v>(bits_as<u32v>(x) ^ minus); }

// In the place of Updating where nothing is updated.
struct Leaving {
  void operator()(int64_t, f32v) const {}
  void last(int64_t, f32v, int64_t) const {}
};

// Moments of n >= kBlock elements, and the signed sums of their buckets. `first` is the
// first element's index in the whole tensor, a multiple of 32. `visit` is called with each
// vector and its place: what is done with it meanwhile hides behind memory.
template <int kBucketLog2, class T, class Visit>
Moments measure_vectors(const T* data, int64_t first, int64_t n, float* buckets,
                        const Visit& visit) {
  const Places places;
  LaneSums sums;
  choose_shifts(data, n, sums);
  uint32_t word = static_cast<uint32_t>(first / kWordBits);

  // One step's vectors, and a sign bit wherever an element counts negatively.
  struct Signed {
    f32v x[kStepVectors];
    u32v minus[kStepVectors];
    f32v operator[](int j) const { return with_sign(x[j], minus[j]); }
    // The same as a product: where additions are what takes time, an addition for nothing.
    f32v one(int j) const { return with_sign(1.0f + f32v{}, minus[j]); }
  };
  const auto take = [&](const T* p) __attribute__((always_inline)) {
    Signed out;
    // Past the tile's end as well: the next one mostly follows.
    for (size_t line = 0; line < kStep * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + line, 0, 2);
#pragma GCC unroll 16
    for (int j = 0; j < kStepVectors; ++j) {
      const f32v x = load(p + j * kLanes);
      visit(p + j * kLanes - data, x);
      sums.add(j % kVectors, x - sums.shift[j % kVectors]);
      out.x[j] = x;
      out.minus[j] = sign_bits(sign_word(word + j / kVectorsPerWord), places.of[j % kVectorsPerWord]);
    }
    word += kStep / kWordBits;
    return out;
  };

  int64_t i = 0;
  if constexpr (kBucketLog2 == 0) {
    for (; i + kStep <= n; i += kStep) {
      const Signed s = take(data + i);
      for (int j = 0; j < kStepVectors; ++j) store(buckets + i + j * kLanes, s[j]);
    }
  } else if constexpr (kBucketLog2 == 4) {
    // As many buckets at a time as a vector has lanes.
    for (; i + 16 * kLanes <= n; i += 16 * kLanes) {
      f32v bucket[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < 16 * kLanes / kStep; ++k) {
        const Signed s = take(data + i + k * kStep);
        constexpr int kEach = 16 / kLanes, kBuckets = kStep / 16;
        for (int b = 0; b < kBuckets; ++b) {
          f32v total = s[b * kEach];
          for (int e = 1; e < kEach; ++e) total += s[b * kEach + e];
          bucket[k * kBuckets + b] = total;
        }
      }
      store(buckets + i / 16, sum_each(bucket));
    }
  } else {
    for (; i + 512 <= n; i += 512) {
      f32v bucket[kVectors] = {};
      for (int k = 0; k < 512; k += kStep) {
        const Signed s = take(data + i + k);
        for (int j = 0; j < kStepVectors; ++j) bucket[j % kVectors] += s.x[j] * s.one(j);
      }
      buckets[i / 512] = sum_lanes((bucket[0] + bucket[1]) + (bucket[2] + bucket[3]));
    }
  }

  // What is left, a vector at a time.
  constexpr int64_t kLength = int64_t{1} << kBucketLog2;
  float total = 0.0f;
  for (int j = 0; i < n; i += kLanes, ++j) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const f32v x = load_last(data + i, lanes);
    visit.last(i, x, lanes);
    const u32v minus = sign_bits(sign_word(word + j / kVectorsPerWord),
                                 places.of[j % kVectorsPerWord]);
    const f32v signed_x = with_sign(x, minus);
    sums.add_first(j % kVectors, x - sums.shift[j % kVectors], lanes);
    if constexpr (kBucketLog2 == 0) {
      std::memcpy(buckets + i, &signed_x, lanes * sizeof(float));
    } else {
      total += sum_lanes(signed_x);
      const int64_t end = i + lanes;
      if (end % kLength == 0 || end == n) {
        buckets[(end - 1) / kLength] = total;
        total = 0.0f;
      }
    }
  }

  float squares = 0.0f;
  for (int v = 0; v < kVectors; ++v) squares += sum_lanes(sums.d2[v]);
  if (squares_in_range(squares)) return combine(sums, n);
  return scaled_moments(data, n, sums, squares < 1.0f);
}

// Few elements, or fp64: two passes in fp64.
template <class T, class Widen>
Moments measure_scalars(const T* data, int64_t first, int64_t n, int bucket_log2, float* buckets,
                        Widen value) {
  constexpr int kChains = 8;
  double sums[kChains] = {}, squares[kChains] = {};
  for (int64_t i = 0; i < n; ++i) sums[i % kChains] += value(data + i);
  double mean = 0.0, m2 = 0.0;
  for (double x : sums) mean += x;
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double delta = value(data + i) - mean;
    squares[i % kChains] += delta * delta;
  }
  for (double x : squares) m2 += x;
  const int64_t length = int64_t{1} << bucket_log2;
  for (int64_t begin = 0; buckets && begin < n; begin += length) {
    const int64_t end = begin + length < n ? begin + length : n;
    double total = 0.0;
    uint32_t word = sign_word(static_cast<uint32_t>((first + begin) / kWordBits));
    for (int64_t i = begin; i < end; ++i) {
      if ((first + i) % kWordBits == 0) word = sign_word(static_cast<uint32_t>((first + i) / kWordBits));
      const double x = value(data + i);
      total += (word >> ((first + i) % kWordBits)) & 1u ? -x : x;
    }
    buckets[begin >> bucket_log2] = static_cast<float>(total);
  }
  return {static_cast<double>(n), mean, m2};
}

template <class T, class Visit>
Moments measure_long(const T* data, const MeasureTile& tile, float* buckets, const Visit& visit) {
  if (tile.bucket_log2 == 4)
    return measure_vectors<4>(data, tile.first, tile.count, buckets, visit);
  return measure_vectors<9>(data, tile.first, tile.count, buckets, visit);
}

// `updated`: out, whether that was done as well. Where it would be for little it is not.
template <class T>
Moments measure_elements(const T* data, const MeasureTile& tile, float* buckets, bool& updated) {
  const int64_t n = tile.count;
  if (n < kBlock) {
    const auto widen_one = [](const T* p) {
      if constexpr (sizeof(T) == sizeof(float)) {
        return static_cast<double>(bits_as<float>(*p));
      } else {
        return static_cast<double>(load_last(p, 1)[0]);
      }
    };
    return measure_scalars(data, tile.first, n, tile.bucket_log2, buckets, widen_one);
  }
  if (tile.bucket_log2 == 0) return measure_vectors<0>(data, tile.first, n, buckets, Leaving());
  const int states = tile.update ? update_states(*tile.update->hyper) : 0;
  updated = states == 1 || states == 2;
  if (states == 1) return measure_long(data, tile, buckets, Updating<1, T>(*tile.update));
  if (states == 2) return measure_long(data, tile, buckets, Updating<2, T>(*tile.update));
  return measure_long(data, tile, buckets, Leaving());
}

Moments measure_any(const MeasureTile& tile, float* buckets, bool& updated) {
  switch (tile.dtype) {
    case DType::kFloat32:
      return measure_elements(static_cast<const float*>(tile.data), tile, buckets, updated);
    case DType::kBFloat16:
      return measure_elements(static_cast<const bf16*>(tile.data), tile, buckets, updated);
    case DType::kFloat16:
      return measure_elements(static_cast<const fp16*>(tile.data), tile, buckets, updated);
    case DType::kFloat64:
      break;
  }
  return measure_scalars(static_cast<const double*>(tile.data), tile.first, tile.count,
                         tile.bucket_log2, buckets, [](const double* p) { return *p; });
}

SketchSums fold_buckets(const MeasureTile& tile, float* buckets, int64_t count) {
  SketchSumsOf<f64v> lanes;
  int64_t b = 0;
  for (; b + kWideLanes <= count; b += kWideLanes) {
    const f32half scaled = narrow(widen(buckets + b) * tile.inverse);
    const f64v s = __builtin_convertvector(scaled, f64v), h = widen(tile.means + b);
    const f32half next = narrow(moved_mean(s, h, tile.weight));
    std::memcpy(tile.next_means + b, &next, sizeof next);
    lanes.add(s, h, __builtin_convertvector(next, f64v));
  }
  SketchSums sums = {sum_lanes(lanes.power), sum_lanes(lanes.dot), sum_lanes(lanes.before),
                     sum_lanes(lanes.after)};
  for (; b < count; ++b) {
    const float s = static_cast<float>(buckets[b] * tile.inverse);
    tile.next_means[b] = update_bucket(s, tile.means[b], tile.weight, sums);
  }
  return sums;
}

Sums measure(const MeasureTile& tile) {
  float buckets[kMaxBuckets];
  Sums sums;
  bool updated = false;
  sums.moments = measure_any(tile, buckets, updated);
  if (tile.update && !updated) update(*tile.update);
  sums.moments.mean *= tile.inverse;
  sums.moments.m2 *= tile.inverse * tile.inverse;
  if (tile.means) {
    const int64_t count = (tile.count + (int64_t{1} << tile.bucket_log2) - 1) >> tile.bucket_log2;
    sums.sketch = fold_buckets(tile, buckets, count);
  }
  return sums;
}

// A finite fp16 number does not become infinite: it stops at the largest.
template <class T>
f32v product(f32v x, float multiplier) {
  const f32v y = x * multiplier;
  if constexpr (!std::is_same_v<T, fp16>) return y;
  const f32v limit = larger(larger(x, -x), 65504.0f + f32v{});
  return y > limit ? limit : y < -limit ? -limit : y;
}

template <class T>
void multiply_vectors(T* data, int64_t n, float multiplier) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(data + i, product<T>(load(data + i), multiplier));
  if (i < n) {
    T last[kLanes];
    store(last, product<T>(load_last(data + i, n - i), multiplier));
    std::memcpy(data + i, last, (n - i) * sizeof(T));
  }
}

void multiply(void* data, DType dtype, int64_t count, double multiplier) {
  const float narrow = static_cast<float>(multiplier);
  switch (dtype) {
    case DType::kFloat32:
      return multiply_vectors(static_cast<float*>(data), count, narrow);
    case DType::kBFloat16:
      return multiply_vectors(static_cast<bf16*>(data), count, narrow);
    case DType::kFloat16:
      return multiply_vectors(static_cast<fp16*>(data), count, narrow);
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(data)[i] *= multiplier;
  }
}

}  // namespace

extern const TileKernels kernels;
const TileKernels kernels = {measure, multiply, update};

}  // namespace gradamp::cpu::GRADAMP_ISA
