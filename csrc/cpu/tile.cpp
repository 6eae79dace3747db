// Compiled once for each instruction set, each time into a namespace of its own.
#include "tile.h"
#include "vec.h"

namespace gradamp::cpu::GRADAMP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4;  // independent accumulators: hides the latency of an addition
#else
constexpr int kVectors = 2;
#endif
constexpr int kBlock = kVectors * kLanes;
constexpr int kWordBits = 32;

constexpr int64_t kMaxBuckets = 4096;  // of a tile: buckets of one element, or 1/16 of its elements

// What is added up for the moments. Every lane has a shift of its own, close to its elements,
// so that a large mean costs no accuracy.
struct LaneSums {
  f32x16 shift[kVectors];
  f32x16 d[kVectors] = {};
  f32x16 d2[kVectors] = {};

  void add(int v, f32x16 delta) {
    d[v] += delta;
    d2[v] += delta * delta;
  }
  void add_first(int v, f32x16 delta, int lanes) {
    for (int i = 0; i < lanes; ++i) d[v][i] += delta[i], d2[v][i] += delta[i] * delta[i];
  }
};

// Elements of lane i of accumulator v, out of n.
inline double lane_count(int64_t n, int v, int i) {
  const int64_t full = n / kLanes;
  const bool one_more = v < full % kVectors || (v == full % kVectors && i < n % kLanes);
  return static_cast<double>(full / kVectors + one_more);
}

inline f32x16 smaller(f32x16 a, f32x16 b) { return a < b ? a : b; }
inline f32x16 larger(f32x16 a, f32x16 b) { return a < b ? b : a; }

// Each lane's first element, or the median of its first three, which is no outlier: all
// others would lie far from that, and their squares would hide the variance.
template <class T>
void choose_shifts(const T* data, int64_t n, LaneSums& sums) {
  for (int v = 0; v < kVectors; ++v) {
    const T* p = data + v * kLanes;
    sums.shift[v] = load16(p);
    if (n < 3 * kBlock) continue;
    const f32x16 a = sums.shift[v], b = load16(p + kBlock), c = load16(p + 2 * kBlock);
    sums.shift[v] = larger(smaller(a, b), smaller(larger(a, b), c));
  }
}

// `shift_unit` and `delta_unit`: what 1 stands for in the shifts and in the sums.
Moments combine(const LaneSums& sums, int64_t n, double shift_unit = 1.0,
                double delta_unit = 1.0) {
  f64x8 count[2 * kVectors], mean[2 * kVectors];
  f64x8 total = {}, m2 = {};
  for (int v = 0; v < kVectors; ++v) {
    f64x8 shift[2], d[2], d2[2];
    widen(sums.shift[v], shift);
    widen(sums.d[v], d);
    widen(sums.d2[v], d2);
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * v + half;
      for (int i = 0; i < 8; ++i) count[k][i] = lane_count(n, v, 8 * half + i);
      const f64x8 mean_d = d[half] / count[k];
      mean[k] = shift[half] * shift_unit + mean_d * delta_unit;
      m2 += (d2[half] - d[half] * mean_d) * delta_unit * delta_unit;
      total += count[k] * mean[k];
    }
  }
  const double centre = sum_lanes(total) / static_cast<double>(n);
  for (int k = 0; k < 2 * kVectors; ++k) {
    const f64x8 delta = mean[k] - centre;
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
    sums.d[v] = sums.d2[v] = f32x16{};
  }
  const auto delta = [&](const T* p, int v) { return (load16(p) * before - sums.shift[v]) * after; };
  int64_t i = 0;
  for (int v = 0; i + kLanes <= n; i += kLanes, v = (v + 1) % kVectors)
    sums.add(v, delta(data + i, v));
  if (i < n) {
    T last[kLanes] = {};
    std::memcpy(last, data + i, (n - i) * sizeof(T));
    const int v = static_cast<int>(i / kLanes % kVectors);
    sums.add_first(v, delta(last, v), static_cast<int>(n - i));
  }
  return combine(sums, n, 1.0 / before, 1.0 / (static_cast<double>(before) * after));
}

inline f32x16 flip_signs(f32x16 x, uint32_t word, u32x16 shift) {
  return bits_as<f32x16>(bits_as<u32x16>(x) ^ ((word << shift) & 0x80000000u));
}

// Moments of n >= kBlock elements, and the signed sums of their buckets. `first` is the
// first element's index in its tensor, a multiple of 32.
template <int kBucketLog2, class T>
Moments measure_vectors(const T* data, int64_t first, int64_t n, float* buckets) {
  // Shifts that bring an element's sign, bit i of a word, to the top: even and odd vectors.
  const u32x16 low = {31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16};
  const u32x16 to_sign[2] = {low, low - 16u};

  LaneSums sums;
  choose_shifts(data, n, sums);
  f32x16 bucket[kVectors] = {};
  uint32_t word_index = static_cast<uint32_t>(first / kWordBits);

  const auto finish = [&](int64_t i, const f32x16* signed_sums) {
    f32x16 total = signed_sums[0];
    for (int v = 1; v < kVectors; ++v) total += signed_sums[v];
    buckets[i >> kBucketLog2] = sum_lanes(total);
  };

  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 x = load16(data + i + v * kLanes);
      const f32x16 signed_x = flip_signs(x, sign_word(word_index + v / 2), to_sign[v % 2]);
      sums.add(v, x - sums.shift[v]);
      if constexpr (kBucketLog2 == 0) store16(buckets + i + v * kLanes, signed_x);
      if constexpr (kBucketLog2 == 4) buckets[(i >> 4) + v] = sum_lanes(signed_x);
      if constexpr (kBucketLog2 == 9) bucket[v] += signed_x;
    }
    word_index += kBlock / kWordBits;
    if constexpr (kBucketLog2 == 9) {
      if ((i + kBlock) % 512 == 0) {
        finish(i, bucket);
        for (int v = 0; v < kVectors; ++v) bucket[v] = f32x16{};
      }
    }
  }
  for (int v = 0; i < n; i += kLanes, ++v) {
    const int lanes = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    T last[kLanes] = {};
    std::memcpy(last, data + i, lanes * sizeof(T));
    const f32x16 x = load16(last);
    const f32x16 signed_x = flip_signs(x, sign_word(word_index + v / 2), to_sign[v % 2]);
    sums.add_first(v, x - sums.shift[v], lanes);
    if constexpr (kBucketLog2 == 0) std::memcpy(buckets + i, &signed_x, lanes * sizeof(float));
    if constexpr (kBucketLog2 == 4) buckets[i >> 4] = sum_lanes(signed_x);
    if constexpr (kBucketLog2 == 9) bucket[v] += signed_x;
  }
  if constexpr (kBucketLog2 == 9)
    if (n % 512 != 0) finish(n - 1, bucket);

  float squares = 0.0f;
  for (int v = 0; v < kVectors; ++v) squares += sum_lanes(sums.d2[v]);
  if (squares >= 1e-28f && squares <= 1e34f) return combine(sums, n);
  return scaled_moments(data, n, sums, squares < 1e-28f);
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

template <class T>
Moments measure_elements(const T* data, int64_t first, int64_t n, int bucket_log2, float* buckets) {
  if (n < kBlock) {
    const auto widen_one = [](const T* p) {
      if constexpr (sizeof(T) == sizeof(float)) {
        return static_cast<double>(bits_as<float>(*p));
      } else {
        T padded[kLanes] = {*p};
        return static_cast<double>(load16(padded)[0]);
      }
    };
    return measure_scalars(data, first, n, bucket_log2, buckets, widen_one);
  }
  if (bucket_log2 == 0) return measure_vectors<0>(data, first, n, buckets);
  if (bucket_log2 == 4) return measure_vectors<4>(data, first, n, buckets);
  return measure_vectors<9>(data, first, n, buckets);
}

Moments measure_any(const MeasureTile& tile, float* buckets) {
  const auto on = [&](auto* data) {
    return measure_elements(data, tile.first, tile.count, tile.bucket_log2, buckets);
  };
  switch (tile.dtype) {
    case DType::kFloat32:
      return on(static_cast<const float*>(tile.data));
    case DType::kBFloat16:
      return on(static_cast<const bf16*>(tile.data));
    case DType::kFloat16:
      return on(static_cast<const fp16*>(tile.data));
    case DType::kFloat64:
      break;
  }
  return measure_scalars(static_cast<const double*>(tile.data), tile.first, tile.count,
                         tile.bucket_log2, buckets, [](const double* p) { return *p; });
}

TileSums measure(const MeasureTile& tile) {
  float buckets[kMaxBuckets];
  TileSums sums;
  sums.moments = measure_any(tile, buckets);
  sums.moments.mean *= tile.inverse;
  sums.moments.m2 *= tile.inverse * tile.inverse;
  if (tile.means) {
    const int64_t count = (tile.count + (int64_t{1} << tile.bucket_log2) - 1) >> tile.bucket_log2;
    for (int64_t b = 0; b < count; ++b) {
      const float s = static_cast<float>(buckets[b] * tile.inverse);
      tile.next_means[b] = update_bucket(s, tile.means[b], tile.weight, sums.sketch);
    }
  }
  return sums;
}

template <class T>
void multiply_vectors(T* data, int64_t n, float multiplier) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(data + i, load16(data + i) * multiplier);
  if (i < n) {
    T last[kLanes] = {};
    std::memcpy(last, data + i, (n - i) * sizeof(T));
    store16(last, load16(last) * multiplier);
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
const TileKernels kernels = {measure, multiply};

}  // namespace gradamp::cpu::GRADAMP_ISA
