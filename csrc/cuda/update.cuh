// The policy of the kernels that update parameters: gradients stay as they are, and what an
// optimizer makes of them is done in the same read. update.h has the rules.
//
// Parameters and states are loaded and stored once, in vectors of 16 bytes where all of them lie
// at multiples of that, wherever the gradient lies.
#pragma once

#include "../rules/update.h"
#include "step.cuh"

namespace gradamp::cuda {

// What is the same for all elements of a tile.
struct TileUpdate {
  const char* gradient;  // of the tile's first element; the second phase reads it there
  char* parameter;
  char* states[kUpdateStates];
  int32_t count;         // of elements; 0: nothing is updated
  DType dtype;
  int32_t extended;      // SGD: with momentum; Adam: with amsgrad
  int32_t aligned;       // parameter and states
  union {
    UpdateTerms<float> narrow;
    UpdateTerms<double> wide;  // of fp64
  };
};

template <class T>
__device__ inline const UpdateTerms<T>& terms_of(const TileUpdate& tile) {
  if constexpr (sizeof(T) == 8) {
    return tile.wide;
  } else {
    return tile.narrow;
  }
}

__device__ inline UpdateTerms<float> narrowed(const UpdateTerms<double>& t) {
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(t.gradient), f(t.coupled), f(t.faded), f(t.keep1), f(t.add1), f(t.keep2),
          f(t.add2),     f(t.ahead),   f(t.plain), f(t.rate),  f(t.eps)};
}

// ---- elements -----------------------------------------------------------------------

// With the states in the order that UpdateTensor has.
template <UpdateRule kRule, bool kExtended>
struct Elements {
  static constexpr int kStates = kRule == UpdateRule::kSgd ? kExtended : kExtended ? 3 : 2;
  template <class T>
  __device__ static void update(const UpdateTerms<T>& t, T& p, T g, T& s0, T& s1, T& s2) {
    if constexpr (kRule == UpdateRule::kSgd) {
      update_sgd<kExtended>(t, p, g, s0);
    } else {
      update_adam<kExtended>(t, p, g, s0, s1, s2);
    }
  }
};

__device__ inline uint32_t& word_of(uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// What one access moves, a vector or one element. It is unpacked in parts: for all of it at once
// there are no registers.
template <class E>
struct Vector {
  using Raw = uint4;
  static constexpr int kElements = E::kPerVector, kParts = kElements == 2 ? 2 : 4;
  static constexpr int kPerPart = kElements / kParts, kWords = 4 / kParts;
  __device__ static void unpack(const uint4& v, int part, typename E::Wide (&x)[kPerPart]) {
    typename E::Wide all[kElements];
    E::unpack(v, all);
#pragma unroll
    for (int e = 0; e < kPerPart; ++e) x[e] = all[part * kPerPart + e];
  }
  __device__ static void pack(uint4& v, int part, const typename E::Wide (&x)[kPerPart]) {
    typename E::Wide all[kElements] = {};
#pragma unroll
    for (int e = 0; e < kPerPart; ++e) all[part * kPerPart + e] = x[e];
    uint4 packed = E::pack(all);
#pragma unroll
    for (int i = part * kWords; i < (part + 1) * kWords; ++i) word_of(v, i) = word_of(packed, i);
  }
};
template <class E>
struct Single {
  using Raw = typename E::Raw;
  static constexpr int kElements = 1, kParts = 1, kPerPart = 1;
  __device__ static void unpack(Raw v, int, typename E::Wide (&x)[1]) { x[0] = E::widen(v); }
  __device__ static void pack(Raw& v, int, const typename E::Wide (&x)[1]) { v = E::narrow(x[0]); }
};

// A step's gradient in shared memory, for a warp.
template <class E>
struct Staged {
  const Step& step;
  int offset;

  __device__ static int rank() { return lane_index(); }
  static constexpr int kSize = 32;
  static constexpr bool kIsNear = true;
  __device__ static bool aligned() { return true; }
  // The i-th of those that this rank takes; `at` is which one of all that is.
  __device__ uint4 load(Vector<E>, int at) const {
    return offset ? load_vector<true>(step, at / 32) : load_vector<false>(step, at / 32);
  }
  __device__ typename E::Raw load(Single<E>, int at) const {
    return *reinterpret_cast<const typename E::Raw*>(element_at<E>(step, offset, at));
  }
};

// A tile's gradient where it lies, for a block.
template <class E>
struct Lying {
  const char* data;

  __device__ static int rank() { return threadIdx.x; }
  static constexpr int kSize = kThreads;
  static constexpr bool kIsNear = false;
  __device__ bool aligned() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
  __device__ uint4 load(Vector<E>, int at) const { return reinterpret_cast<const uint4*>(data)[at]; }
  __device__ typename E::Raw load(Single<E>, int at) const {
    return reinterpret_cast<const typename E::Raw*>(data)[at];
  }
};

// Pieces [first_piece, count) from byte `begin` of the tile on. All that some of them need is
// loaded before anything is stored: the compiler must take it that a store changes what is loaded
// after it.
template <class E, class Piece, class Elements, int kAtOnce, class Gradient>
__device__ __forceinline__ void update_pieces(const TileUpdate& tile, const Gradient& gradient,
                                              int begin, int first_piece, int count) {
  using Wide = typename E::Wide;
  using Raw = typename Piece::Raw;
  constexpr int kStates = Elements::kStates;
  const auto pieces = [begin](char* of_tile) {
    return reinterpret_cast<Raw*>(in_global(of_tile) + begin);
  };
#pragma unroll 1
  for (int first = first_piece; first < count; first += kAtOnce * gradient.kSize) {
    // Set, lest what a lane does not load is kept from the round before.
    Raw p[kAtOnce] = {}, s[kUpdateStates][kAtOnce] = {}, g[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = first + j * gradient.kSize + gradient.rank();
      if (at >= count) continue;
      p[j] = pieces(tile.parameter)[at];
#pragma unroll
      for (int k = 0; k < kStates; ++k) s[k][j] = pieces(tile.states[k])[at];
      if (!Gradient::kIsNear) g[j] = gradient.load(Piece{}, at);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = first + j * gradient.kSize + gradient.rank();
      __syncwarp();  // lest the terms wait in registers while elements are loaded
      if (at >= count) continue;
      const UpdateTerms<Wide> t = terms_of<Wide>(tile);
      if (Gradient::kIsNear) g[j] = gradient.load(Piece{}, at);
#pragma unroll
      for (int part = 0; part < Piece::kParts; ++part) {
        Wide of_p[Piece::kPerPart], of_g[Piece::kPerPart], of_s[kUpdateStates][Piece::kPerPart];
        Piece::unpack(p[j], part, of_p);
        Piece::unpack(g[j], part, of_g);
#pragma unroll
        for (int k = 0; k < kStates; ++k) Piece::unpack(s[k][j], part, of_s[k]);
#pragma unroll
        for (int e = 0; e < Piece::kPerPart; ++e)
          Elements::update(t, of_p[e], of_g[e], of_s[0][e], of_s[1][e], of_s[2][e]);
        Piece::pack(p[j], part, of_p);
#pragma unroll
        for (int k = 0; k < kStates; ++k) Piece::pack(s[k][j], part, of_s[k]);
      }
      pieces(tile.parameter)[at] = p[j];
#pragma unroll
      for (int k = 0; k < kStates; ++k) pieces(tile.states[k])[at] = s[k][j];
    }
  }
}

// `count` elements from the tile's `begin` on, of which `gradient` has the first.
template <class E, class Elements, class Gradient>
__device__ __forceinline__ void update_elements(const TileUpdate& tile, const Gradient& gradient,
                                                int begin, int count) {
  const int bytes = begin * kElementBytes<E>;
  const int whole = tile.aligned && gradient.aligned() ? count / E::kPerVector : 0;
  constexpr int kAtOnce = Elements::kStates > 1 ? 1 : 2;  // for more there are no registers
  update_pieces<E, Vector<E>, Elements, kAtOnce>(tile, gradient, bytes, 0, whole);
  update_pieces<E, Single<E>, Elements, kAtOnce>(tile, gradient, bytes, whole * E::kPerVector,
                                                 count);
}

template <class E, UpdateRule kRule, class Gradient>
__device__ __forceinline__ void update_range(const TileUpdate& tile, const Gradient& gradient,
                                             int begin, int count) {
  if (tile.extended) {
    update_elements<E, Elements<kRule, true>>(tile, gradient, begin, count);
  } else {
    update_elements<E, Elements<kRule, false>>(tile, gradient, begin, count);
  }
}

// ---- tiles --------------------------------------------------------------------------

// `gradient`: the tensor's, null for none. `scale`: what gradients are multiplied by beside the
// layer's multiplier.
template <UpdateRule kRule>
__device__ inline void look_up(TileUpdate& to, const UpdateArgs& u, const Tile& tile,
                               const char* gradient, DType dtype, double multiplier,
                               double scale) {
  to.count = 0;
  if (!gradient) return;
  const UpdateTensor& tensor = u.tensors[tile.tensor];
  Hyper h = u.groups ? u.groups[tensor.group] : u.few[tensor.group];
  h.rule = kRule;  // as the host has seen to: no code for the other
  const int64_t begin = tile.first * element_bytes(dtype);
  to.gradient = gradient + begin;
  to.parameter = static_cast<char*>(tensor.parameter) + begin;
  to.dtype = dtype;
  const int states = update_states(h);
  to.extended = states > (kRule == UpdateRule::kSgd ? 0 : 2);
  auto all = reinterpret_cast<uintptr_t>(to.parameter);
#pragma unroll
  for (int k = 0; k < kUpdateStates; ++k) {
    if (k >= states) continue;
    to.states[k] = static_cast<char*>(tensor.states[k]) + begin;
    all |= reinterpret_cast<uintptr_t>(to.states[k]);
  }
  to.aligned = all % 16 == 0;
  const auto terms = update_terms<double>(h, multiplier, scale, *tensor.steps);
  if (dtype == DType::kFloat64) {
    to.wide = terms;
  } else {
    to.narrow = narrowed(terms);
  }
  to.count = tile.count;
}

// The policy of a kernel that measures. One pass over the tiles does both, where multipliers stood
// before; else the first measures and the second, after the decision, updates.
template <UpdateRule kRule>
struct Update {
  const UpdateArgs& args;
  bool second_pass;

  __device__ static TileUpdate& of_warp() {
    __shared__ TileUpdate of_block[kWarps];
    return of_block[warp_index()];
  }
  __device__ bool measures() const { return !second_pass; }

  // By one lane, of the tile that its warp begins with.
  __device__ double prepare(const StepArgs& a, const TileFacts& facts, const Common& common,
                            DType dtype, const char* gradient) const {
    const Tile& tile = facts.tile;
    double multiplier = 1.0, scale = common.inverse;
    if (!second_pass) {
      if (!a.write_in_first_phase) gradient = nullptr;
      multiplier = standing_amplification(a, facts, common);
    } else {
      if (tile.layer != a.num_layers) multiplier = a.work.scratch.amplified[tile.layer];
      scale *= a.work.verdict->coefficient;
    }
    look_up<kRule>(of_warp(), args, tile, gradient, dtype, multiplier, scale);
    return 1.0;
  }

  template <class E, class Steps>
  __device__ __forceinline__ int work_on_steps(Steps& stream, const Work& work, int begin,
                                               LaneSums& sums) const {
    const int left = work.tile->count - begin;
    const int now = left < kElementsPerStep<E> ? left : kElementsPerStep<E>;
    if (!second_pass) measure_steps<E, false>(stream, work, begin, sums);
    const TileUpdate& tile = of_warp();
    if (tile.count != 0) {
      const Step step = stream.take();
      const int offset = E::kPerVector == 8 ? stage_offset(work.data) : 0;
      update_range<E, kRule>(tile, Staged<E>{step, offset}, begin, now);
    }
    return begin + now;
  }
};

// One more update of each tensor of a launch, by one block.
template <int kCapacity>
__device__ inline void count_updates(const StepArgs& a, const AddressTable<kCapacity>& table,
                                     const UpdateArgs& u) {
  for (int i = threadIdx.x; i < u.tensors_of_launch; i += kThreads)
    if (table.address(i)) *u.tensors[a.tensor_begin + i].steps += 1.0f;
}

// Blocks of a processor at once: with several times as much under way of each as where gradients
// alone are read, two are enough. Turing's shared memory holds one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kUpdatingBlocks = 1;
#else
constexpr int kUpdatingBlocks = 2;
#endif

template <UpdateRule kRule, int kCapacity>
__global__ void __launch_bounds__(kThreads, kUpdatingBlocks)
    update_kernel(const __grid_constant__ StepArgs a,
                  const __grid_constant__ AddressTable<kCapacity> table, int phases,
                  const __grid_constant__ UpdateArgs u) {
  if (is_skipped(a)) return;
  bool second_pass = false;
#pragma unroll 1
  while (true) {
    work_on_tiles(a, table, Update<kRule>{u, second_pass});
    const bool updates = second_pass || a.write_in_first_phase;
    // Whoever is last counts the updates: then all have read how many there were.
    if ((updates || a.last_launch) && is_last_block(a)) {
      if (!second_pass && a.last_launch) conclude(a);
      if (updates) count_updates(a, table, u);
    }
    if (second_pass || phases != kBoth) return;
    cooperative_groups::this_grid().sync();
    if (!a.work.verdict->counted) return;
    second_pass = true;
  }
}

// ---- updates alone ------------------------------------------------------------------

// The second phase as a launch of its own, and all of a step where nothing is measured. Blocks take
// every so many tiles, and a block looks up 32 of them at once. Backwards: what was read last may
// still be in L2.
template <UpdateRule kRule, int kCapacity>
__global__ void __launch_bounds__(kThreads, 2)
    apply_kernel(const __grid_constant__ StepArgs a,
                 const __grid_constant__ AddressTable<kCapacity> table, int,
                 const __grid_constant__ UpdateArgs u) {
  constexpr int kTilesAtOnce = 32;
  __shared__ TileUpdate tiles[kTilesAtOnce];
  if (u.alone ? a.found_inf && *a.found_inf != 0.0f : !a.work.verdict->counted) return;
  const double scale =
      inverse_scale(a.grad_scale) * (u.alone ? 1.0 : a.work.verdict->coefficient);
  const int stride = gridDim.x;
#pragma unroll 1
  for (int last = a.tile_end - 1 - static_cast<int>(blockIdx.x); last >= a.tile_begin;
       last -= kTilesAtOnce * stride) {
    __syncthreads();
    if (threadIdx.x < kTilesAtOnce) {
      const int own = last - static_cast<int>(threadIdx.x) * stride;
      TileUpdate& to = tiles[threadIdx.x];
      to.count = 0;
      if (own >= a.tile_begin) {
        const Tile& tile = a.tables.tiles[own];
        const int index = tile.tensor - a.tensor_begin;
        const bool amplified = !u.alone && tile.layer != a.num_layers;
        look_up<kRule>(to, u, tile, table.address(index), table.dtype(index),
                       amplified ? a.work.scratch.amplified[tile.layer] : 1.0, scale);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const TileUpdate& tile = tiles[i];
      if (tile.count == 0) continue;
      with_element(tile.dtype, [&](auto element) {
        using E = decltype(element);
        update_range<E, kRule>(tile, Lying<E>{in_global(tile.gradient)}, 0, tile.count);
      });
    }
  }
  if (is_last_block(a)) count_updates(a, table, u);
}

template <UpdateRule kRule>
const void* update_kernel_for(int capacity, bool measures) {
  if (capacity == kSmallTable)
    return measures ? reinterpret_cast<const void*>(&update_kernel<kRule, kSmallTable>)
                    : reinterpret_cast<const void*>(&apply_kernel<kRule, kSmallTable>);
  return measures ? reinterpret_cast<const void*>(&update_kernel<kRule, kLargeTable>)
                  : reinterpret_cast<const void*>(&apply_kernel<kRule, kLargeTable>);
}

}  // namespace gradamp::cuda
