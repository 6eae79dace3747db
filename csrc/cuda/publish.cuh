// From the sums of tiles to those of groups: whoever comes last adds up. Always in tile
// order, so the result depends on neither the grid nor who that was.
#pragma once

#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

// Adds one and wraps to zero after `count` calls; true for the last of them, which then
// sees what the others wrote before theirs. Tickets need no reset between steps. Only the
// last acquires: that drops what the processor holds in L1.
__device__ inline bool is_last(uint32_t* ticket, int count) {
  uint32_t old;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(ticket), "r"(count - 1)
               : "memory");
  if (old != static_cast<uint32_t>(count - 1)) return false;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return true;
}

// Sums that another processor wrote: from L2.
__device__ inline Moments load_from_l2(const Moments* p) {
  return {__ldcg(&p->count), __ldcg(&p->mean), __ldcg(&p->m2)};
}
__device__ inline SketchSums load_from_l2(const SketchSums* p) {
  return {__ldcg(&p->power), __ldcg(&p->dot), __ldcg(&p->before), __ldcg(&p->after)};
}

constexpr int kAtOnce = 4;

// Of p[0], p[stride], ... p[3 stride], those that lie before `count`: loaded at once and with
// one division, since whoever adds up others' sums falls behind with its own tiles.
__device__ inline Moments total_of_some(const Sums* p, int stride, int count) {
  Moments of[kAtOnce];
  Moments total;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (i * stride < count) of[i] = load_from_l2(&p[i * stride].moments);
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) total.count += of[i].count, sum += of[i].count * of[i].mean;
  if (total.count == 0.0) return total;
  total.mean = sum / total.count;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const double delta = of[i].mean - total.mean;
    total.m2 += of[i].m2 + of[i].count * delta * delta;
  }
  return total;
}

// Of p[0], p[stride], ... before p[count], in order; first the moments, then the sketch's, for
// which there would be no registers.
__device__ inline Sums total_of(const Sums* p, int stride, int count) {
  Sums total;
#pragma unroll 1
  for (int i = 0; i < count; i += kAtOnce * stride)
    total.moments = merge(total.moments, total_of_some(p + i, stride, count - i));
#pragma unroll 2
  for (int i = 0; i < count; i += stride) add(total.sketch, load_from_l2(&p[i].sketch));
  return total;
}

// Sums of p[0 .. count), the same in every lane: each lane's in order, then across lanes.
__device__ inline Sums warp_total(const Sums* p, int count) {
  const int lane = lane_index();
  const Sums mine = total_of(p + lane, 32, count - lane);
  WarpGroup warp;
  return {merge_all(mine.moments, warp), add_all(mine.sketch, warp)};
}

// Those of a layer from those of its groups: in few instructions, which are run once a step and
// come from far away.
__device__ inline Sums layer_total(const Sums* groups, int count) {
  Sums total = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    total.moments = merge(total.moments, load_from_l2(&groups[i].moments));
    add(total.sketch, load_from_l2(&groups[i].sketch));
  }
  return total;
}

// Publishes a tile's sums, which lane 0 holds; the last warp of a group adds the group up.
__device__ inline void publish(const StepArgs& a, const Tile& tile, int number,
                               const Sums& sums) {
  const Workspace& w = a.work;
  int last = 0;
  if (lane_index() == 0) {
    w.tiles[number] = sums;
    last = is_last(w.group_tickets + tile.group, tile.group_tiles);
  }
  if (!__shfl_sync(kAllLanes, last, 0)) return;
  __syncwarp();
  const Sums total = warp_total(w.tiles + tile.group_begin, tile.group_tiles);
  if (lane_index() == 0) w.groups[tile.group] = total;
}

}  // namespace gradamp::cuda
