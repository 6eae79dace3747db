// The step in one launch: warps measure tiles (and multiply those of layers selected
// before); the last warp of a layer adds up the layer; the last block of all commits the
// state and decides. Where what is written depends on this step's sums, the blocks wait
// for that and multiply in a second phase of the same launch.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "../rules/decide.h"
#include "launch.h"
#include "publish.cuh"
#include "tile.cuh"

namespace gradamp::cuda {
namespace {

// Blocks of a processor at once, for which it has registers: as many as its shared memory holds,
// three of Hopper's at 80 registers a thread. Elsewhere that holds one or two, or more registers
// are needed, and what is under way of two is enough: 128 KB.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kMinBlocks = 2;
#else
constexpr int kMinBlocks = 3;
#endif

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

// What the first phase multiplies a tile by: what is known before this step's sums.
__device__ inline double standing_multiplier(const StepArgs& a, const TileFacts& facts,
                                             const Common& common, DType dtype) {
  if (!a.write_in_first_phase) return 1.0;
  const double own = facts.tile.layer == a.num_layers
                         ? 1.0
                         : amplification(a.config, facts.layer(), common.factor);
  return as_applied(own * (a.unscale ? common.inverse : 1.0), dtype);
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

// Measures the tile that was started last and multiplies it where that is known already.
template <int kCapacity>
__device__ __forceinline__ void measure_tile(const StepArgs& a,
                                             const AddressTable<kCapacity>& table,
                                             Stream<kCapacity>& stream, const Common& common) {
  const TileFacts& facts = stream.facts();
  const Tile& tile = facts.tile;
  const int index = tile.tensor - a.tensor_begin;
  const DType dtype = table.dtype(index);
  char* const tensor = table.address(index);
  Work& work = warp_memory().work;
  if (lane_index() == 0)
    work = {&tile, tensor + tile.first * element_bytes(dtype), work.number,
            standing_multiplier(a, facts, common, dtype), 0.0, find_means(a, facts, common)};
  __syncwarp();
  LaneSums lane;
  int begin = 0;
#pragma unroll 1
  do {
    begin = !tensor ? tile.count : with_element(dtype, [&](auto element) {
      return measure_steps<decltype(element)>(stream, work, begin, lane);
    });
    stream.done();
  } while (begin < tile.count);
  Sums sums = {};
  if (tensor) {
    fold_rest(work, lane);
    sums = tile_total(lane, work);
  }
  publish(a, tile, work.number, sums);
  __syncwarp();
}

// Where a warp begins. Neighbouring tiles are on different processors.
__device__ inline int first_tile(const StepArgs& a) {
  return a.tile_begin + static_cast<int>(blockIdx.x) + warp_index() * static_cast<int>(gridDim.x);
}

template <int kCapacity>
__device__ __forceinline__ void measure_tiles(const StepArgs& a,
                                              const AddressTable<kCapacity>& table) {
  __shared__ Common common;
  if (threadIdx.x == 0)
    common = {active_factor(a.config, *a.state.global, a.turn), inverse_scale(a.grad_scale)};
  __syncthreads();
  const int first = first_tile(a);
  if (first >= a.tile_end) return;
  Stream<kCapacity> stream(a, table, first);
#pragma unroll 1
  while (stream.start()) measure_tile(a, table, stream, common);
}

// What the second phase multiplies a tile by.
template <int kCapacity>
__device__ inline double final_multiplier(const StepArgs& a, const AddressTable<kCapacity>& table,
                                          const Tile& tile, double common) {
  const int index = tile.tensor - a.tensor_begin;
  if (!table.address(index)) return 1.0;
  const double own = tile.layer == a.num_layers ? 1.0 : a.work.scratch.amplified[tile.layer];
  return as_applied(own * common, table.dtype(index));
}

// Blocks take every so many tiles; a warp's lanes look at 32 of them at once. Backwards: what
// was read last may still be in L2.
template <int kCapacity>
__device__ __forceinline__ void multiply_tiles(const StepArgs& a,
                                               const AddressTable<kCapacity>& table) {
  const Verdict verdict = *a.work.verdict;
  if (!verdict.counted) return;
  const double common = verdict.coefficient * (a.unscale ? inverse_scale(a.grad_scale) : 1.0);
  const int stride = gridDim.x;
#pragma unroll 1
  for (int last = a.tile_end - 1 - static_cast<int>(blockIdx.x); last >= a.tile_begin;
       last -= 32 * stride) {
    const int own = last - lane_index() * stride;
    const double multiplier =
        own < a.tile_begin ? 1.0 : final_multiplier(a, table, a.tables.tiles[own], common);
    unsigned left = __ballot_sync(kAllLanes, multiplier != 1.0);
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1;
      const Tile& tile = a.tables.tiles[last - lane * stride];
      const double factor = __shfl_sync(kAllLanes, multiplier, lane);
      const int index = tile.tensor - a.tensor_begin;
      with_element(table.dtype(index), [&](auto element) {
        using E = decltype(element);
        multiply_elements<E>(table.address(index) + tile.first * kElementBytes<E>, tile.count, factor);
      });
    }
  }
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
      const int first = a.tables.first_tile[t];
      if (first == a.tables.first_tile[t + 1] || __ldcg(&w.tiles[first].moments.count) == 0.0)
        continue;
      const int layer = a.tables.tiles[first].layer;
      if (is_measured(a.state.layers[layer], w.layers[layer]))
        a.state.parity[t] = 1 - a.state.parity[t];
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

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    step_kernel(const __grid_constant__ StepArgs a,
                const __grid_constant__ AddressTable<kCapacity> table, int phases) {
  __shared__ bool decides;
  const bool first_thread = blockIdx.x == 0 && threadIdx.x == 0;

  if (phases & kMeasure) {
    // Every block reads this before its ticket, and only the last to take one writes it.
    if (a.found_inf && *a.found_inf != 0.0f) {
      if (first_thread && a.first_launch && !a.measure_only) skip(a);
      return;
    }
    measure_tiles(a, table);
    if (a.last_launch) {
      __syncthreads();
      if (threadIdx.x == 0) decides = is_last(a.work.block_ticket, gridDim.x);
      __syncthreads();
      if (decides) conclude(a);
    }
  }
  if (phases == kBoth) cooperative_groups::this_grid().sync();
  if (phases & kMultiply) multiply_tiles(a, table);
}

const void* kernel_for(int capacity) {
  return capacity == kSmallTable ? reinterpret_cast<const void*>(&step_kernel<kSmallTable>)
                                 : reinterpret_cast<const void*>(&step_kernel<kLargeTable>);
}

constexpr int kSharedBytes = sizeof(BlockMemory);  // the host's, which is the largest

// Loads the kernel; blocks of it that fit on a processor at once.
cudaError_t prepare(int capacity, int shared, int& blocks) {
  const void* const kernel = kernel_for(capacity);
  cudaFuncAttributes attributes;  // asked for: that loads a kernel which would be loaded lazily
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared);
}

}  // namespace

cudaError_t inspect(DeviceLimits& limits) {
  int current = 0, driver = 0, cooperative = 0, most = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto attribute = [&](int& value, cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, current);
  };
  attribute(limits.processors, cudaDevAttrMultiProcessorCount);
  attribute(cooperative, cudaDevAttrCooperativeLaunch);
  attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  limits.shared_bytes = most < kSharedBytes ? most : kSharedBytes;  // Turing needs half
  if (error == cudaSuccess)
    error = prepare(kSmallTable, limits.shared_bytes, limits.blocks_per_processor);
  if (error != cudaSuccess) return error;
  limits.cooperative = cooperative != 0;

  int blocks = 0;
  limits.large_table =
      driver >= 12010 && prepare(kLargeTable, limits.shared_bytes, blocks) == cudaSuccess;
  if (!limits.large_table) {
    cudaGetLastError();  // a refusal of the large table is no error
  } else if (blocks < limits.blocks_per_processor) {
    limits.blocks_per_processor = blocks;
  }
  return cudaSuccess;
}

cudaError_t launch(const StepArgs& args, const uint64_t* table, int count, Phases phases,
                   int blocks, const DeviceLimits& limits, cudaStream_t stream) {
  int phase_bits = phases;
  void* parameters[] = {const_cast<StepArgs*>(&args), const_cast<uint64_t*>(table), &phase_bits};
  const void* const kernel = kernel_for(count <= kSmallTable ? kSmallTable : kLargeTable);
  const size_t shared = phases == kMultiply ? 0 : limits.shared_bytes;
  if (phases == kBoth)
    return cudaLaunchCooperativeKernel(kernel, blocks, kThreads, parameters, shared, stream);
  return cudaLaunchKernel(kernel, blocks, kThreads, parameters, shared, stream);
}

}  // namespace gradamp::cuda
