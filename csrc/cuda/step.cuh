// The step in one launch: warps measure tiles (and multiply or update those whose multiplier stood
// before); the last warp of a layer adds up the layer; the last block of all commits the state and
// decides. Where what is written depends on this step's sums, the blocks wait for that and write
// in a second phase of the same launch.
//
// What becomes of elements once their multiplier is known is a policy: `Multiply` in step.cu,
// `Update` in update.cuh.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "../rules/decide.h"
#include "launch.h"
#include "publish.cuh"
#include "tile.cuh"

namespace gradamp::cuda {

template <class Visitor>
__device__ __forceinline__ auto with_element(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(Float32{});
    case DType::kBFloat16: return visit(BFloat16{});
    case DType::kFloat16: return visit(Float16{});
    default: return visit(Float64{});
  }
}

// What every warp of a block needs to know.
struct Common {
  double factor;   // of selected layers, if gradients are multiplied as they are measured
  double inverse;  // of the gradients' scale
};

// A layer's as it stands before this step's sums; nothing acts on excluded tensors.
__device__ inline double standing_amplification(const StepArgs& a, const TileFacts& facts,
                                                const Common& common) {
  return facts.tile.layer == a.num_layers ? 1.0
                                          : amplification(a.config, facts.layer(), common.factor);
}

__device__ inline RunningMeans find_means(const StepArgs& a, const TileFacts& facts,
                                          const Common& common) {
  RunningMeans means = {};
  means.inverse = common.inverse;
  const Tile& tile = facts.tile;
  if (tile.layer == a.num_layers) return means;
  float* const row = a.state.sketch + tile.first_bucket;
  means.before = row + facts.parity * a.state.buckets;
  means.after = row + (1 - facts.parity) * a.state.buckets;
  means.weight = next_weight(facts.layer(), a.config.decay);
  return means;
}

// Of a tile from those of the lanes.
__device__ inline Sums tile_total(const LaneSums& lane, const Work& work) {
  WarpGroup warp;
  const double d = warp.sum(lane.d), d2 = warp.sum(lane.d2);
  Sums sums = {shifted_moments(work.tile->count, work.shift, d, d2), add_all(lane.sketch, warp)};
  sums.moments.mean *= work.means.inverse;
  sums.moments.m2 *= work.means.inverse * work.means.inverse;
  return sums;
}

// Measures the tile that was started last, unless the policy says that this is done, and does with
// its elements what can be done now.
template <class Does, int kCapacity>
__device__ __forceinline__ void work_on_tile(const StepArgs& a,
                                             const AddressTable<kCapacity>& table,
                                             Stream<kCapacity>& stream, const Common& common,
                                             const Does& does) {
  const TileFacts& facts = stream.facts();
  const Tile& tile = facts.tile;
  const int index = tile.tensor - a.tensor_begin;
  const DType dtype = table.dtype(index);
  char* const tensor = table.address(index);
  Work& work = warp_memory().work;
  if (lane_index() == 0)
    work = {&tile, tensor + tile.first * element_bytes(dtype), work.number,
            does.prepare(a, facts, common, dtype, tensor), 0.0, find_means(a, facts, common)};
  __syncwarp();
  LaneSums lane;
  int begin = 0;
#pragma unroll 1
  do {
    begin = !tensor ? tile.count : with_element(dtype, [&](auto element) {
      return does.template work_on_steps<decltype(element)>(stream, work, begin, lane);
    });
    stream.done();
  } while (begin < tile.count);
  if (does.measures()) {
    Sums sums = {};
    if (tensor) {
      fold_rest(work, lane);
      sums = tile_total(lane, work);
    }
    publish(a, tile, work.number, sums);
  }
  __syncwarp();
}

// Where a warp begins. Neighbouring tiles are on different processors.
__device__ inline int first_tile(const StepArgs& a) {
  return a.tile_begin + static_cast<int>(blockIdx.x) + warp_index() * static_cast<int>(gridDim.x);
}

template <class Does, int kCapacity>
__device__ __forceinline__ void work_on_tiles(const StepArgs& a,
                                              const AddressTable<kCapacity>& table,
                                              const Does& does) {
  __shared__ Common common;
  if (threadIdx.x == 0)
    common = {active_factor(a.config, *a.state.global, a.turn), inverse_scale(a.grad_scale)};
  __syncthreads();
  const int first = first_tile(a);
  if (first >= a.tile_end) return;
  Stream<kCapacity> stream(a, table, first);
#pragma unroll 1
  while (stream.start()) work_on_tile(a, table, stream, common, does);
}

// One block, after every tile is measured.
__device__ inline void conclude(const StepArgs& a) {
  __shared__ double scratch[kWarps];
  BlockGroup<kThreads> block = {scratch};
  const Workspace& w = a.work;
  GlobalState& global = *a.state.global;
  for (int l = block.rank(); l <= a.num_layers; l += block.size()) {
    const LayerGroups groups = a.tables.layers[l];
    w.layers[l] = layer_total(w.groups + groups.begin, groups.count);
  }
  if (a.measure_only) return;
  block.barrier();
  const double factor = active_factor(a.config, global, a.turn);
  const bool counted = commit(a.config, global, a.state.layers, w.layers, a.num_layers, w.scratch,
                              factor, a.turn, block);
  block.barrier();
  double coefficient = 1.0;
  if (counted && needs_norm(a.config))
    coefficient = apply_norm(a.config, global, a.state.layers, w.layers, a.num_layers,
                             w.layers[a.num_layers].moments, w.scratch.amplified, block);
  if (counted) {
    for (int t = block.rank(); t < a.measured; t += block.size()) {
      const MeasuredTensor tensor = a.tables.tensors[t];
      const int32_t row = a.state.parity[t];
      if (tensor.first_tile < 0) continue;
      // No load waits for another one's result.
      const bool had_gradient = __ldcg(&w.tiles[tensor.first_tile].moments.count) != 0.0;
      const bool measured = is_measured(a.state.layers[tensor.layer], w.layers[tensor.layer]);
      if (had_gradient & measured) a.state.parity[t] = 1 - row;
    }
  }
  if (block.rank() == 0) {
    *w.verdict = {coefficient, counted};
    if (!counted && a.found_inf) *a.found_inf = 1.0f;
  }
}

__device__ inline void skip(const StepArgs& a) {
  skip_call(a.config, *a.state.global, a.turn);
  a.work.verdict->counted = 0;
}

// Whether this block is the last that comes here, all threads of each.
__device__ inline bool is_last_block(const StepArgs& a) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = is_last(a.work.block_ticket, gridDim.x);
  __syncthreads();
  return last;
}

// Whether found_inf says to skip this step; if so, the step is counted. Every block asks before its
// ticket, and only the last to take one writes found_inf.
__device__ inline bool is_skipped(const StepArgs& a) {
  if (!a.found_inf || *a.found_inf == 0.0f) return false;
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.first_launch && !a.measure_only) skip(a);
  return true;
}

}  // namespace gradamp::cuda
