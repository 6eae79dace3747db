// From the sums of tiles to those of layers: whoever comes last adds up. Always in tile
// order, so the result depends on neither the grid nor who that was.
#pragma once

#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

// Adds one and wraps to zero after `count` calls; true for the last of them, which then
// sees what the others wrote before theirs. Tickets need no reset between steps.
__device__ inline bool is_last(uint32_t* ticket, uint32_t count) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(ticket), "r"(count - 1)
               : "memory");
  return old == count - 1;
}

// The same for a whole warp whose lane 0 holds what there is to publish.
__device__ inline bool warp_is_last(uint32_t* ticket, int count) {
  __syncwarp();
  int last = 0;
  if (lane_index() == 0) last = is_last(ticket, static_cast<uint32_t>(count));
  last = __shfl_sync(kAllLanes, last, 0);
  __syncwarp();
  return last;
}

// Sums that another processor wrote: from L2.
__device__ inline Sums load_from_l2(const Sums* p) {
  const double* d = reinterpret_cast<const double*>(p);
  return {{__ldcg(d), __ldcg(d + 1), __ldcg(d + 2)},
          {__ldcg(d + 3), __ldcg(d + 4), __ldcg(d + 5), __ldcg(d + 6)}};
}

// Sums of p[0 .. count), the same in every lane: each lane's in order, then across lanes.
__device__ inline Sums warp_total(const Sums* p, int count) {
  Sums mine;
#pragma unroll 1
  for (int i = lane_index(); i < count; i += 32) {
    const Sums next = load_from_l2(p + i);
    mine.moments = merge(mine.moments, next.moments);
    add(mine.sketch, next.sketch);
  }
  WarpGroup warp;
  return {merge_all(mine.moments, warp), add_all(mine.sketch, warp)};
}

__device__ inline void random_delay(uint32_t seed, int tile) {
  if (seed == 0) return;
  const uint32_t wait = sign_word(seed + tile) % 16384;
  const long long start = clock64();
  while (clock64() - start < wait) {
  }
}

// Publishes a tile's sums; the last warp of a layer adds the layer up.
__device__ inline void publish(const StepArgs& a, int tile, int layer, const Sums& sums) {
  const Workspace& w = a.work;
  const LayerTiles at = a.tables.layers[layer];
  const bool leader = lane_index() == 0;
  if (leader) w.tiles[tile] = sums;
  random_delay(a.stress, tile);

  const int group = (tile - at.first_tile) / kGroupTiles;
  const int first = at.first_tile + group * kGroupTiles;
  const int left = at.first_tile + at.tiles - first;
  const int count = left < kGroupTiles ? left : kGroupTiles;
  if (!warp_is_last(w.group_tickets + at.first_group + group, count)) return;
  const Sums of_group = warp_total(w.tiles + first, count);
  if (at.groups == 1) {
    if (leader) w.layers[layer] = {of_group.moments, of_group.sketch};
    return;
  }
  if (leader) w.groups[at.first_group + group] = of_group;

  if (!warp_is_last(w.layer_tickets + layer, at.groups)) return;
  const Sums of_layer = warp_total(w.groups + at.first_group, at.groups);
  if (leader) w.layers[layer] = {of_layer.moments, of_layer.sketch};
}

}  // namespace gradamp::cuda
