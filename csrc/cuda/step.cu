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

template <int kCapacity>
struct AddressTable {
  uint64_t tagged[kCapacity];
};

// Blocks of a processor at once: at most 80 registers a thread. Turing's shuffles need more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMinBlocks = 2;
#else
constexpr int kMinBlocks = 3;
#endif

template <class Visitor>
__device__ inline auto with_element(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(Float32{});
    case DType::kBFloat16: return visit(BFloat16{});
    case DType::kFloat16: return visit(Float16{});
    default: return visit(Float64{});
  }
}

// A tile, and all that a warp needs to know to work on it.
struct Job {
  TileData tile;  // data null: no gradient
  DType dtype;
  int number;     // of the tile
  int tensor;
  int64_t first;  // the tile's first element in the tensor
  int layer;  // num_layers: excluded
  int buckets;
  RunningMeans means;  // null: excluded
};

template <int kCapacity>
__device__ inline Job find_tile(const StepArgs& a, const AddressTable<kCapacity>& table, int tile) {
  Job job = {};
  job.number = tile;
  job.tensor = a.tables.tile_tensor[tile];
  const TensorInfo& info = a.tables.tensors[job.tensor];
  const uint64_t tagged = table.tagged[job.tensor - a.tensor_begin];
  job.dtype = static_cast<DType>(tagged >> kDTypeShift);
  job.layer = info.layer < 0 ? a.num_layers : info.layer;
  job.first = (tile - info.first_tile) * kTileElements;
  const int64_t left = info.numel - job.first;
  const int bytes = element_bytes(job.dtype);
  const uint64_t address = tagged & ((uint64_t{1} << kDTypeShift) - 1);
  job.tile.data = address ? reinterpret_cast<char*>(address) + job.first * bytes : nullptr;
  job.tile.count = static_cast<int>(left < kTileElements ? left : kTileElements);
  job.tile.first_word = info.first_word + static_cast<uint32_t>(job.first >> 5);
  return job;
}

// Where the running means of the tile's buckets are; none for excluded tensors.
__device__ inline void find_buckets(const StepArgs& a, Job& job) {
  job.means.inverse = inverse_scale(a.grad_scale);
  if (job.layer == a.num_layers) return;
  const TensorInfo& info = a.tables.tensors[job.tensor];
  job.tile.run_log2 = info.bucket_log2;
  job.buckets = (job.tile.count + (1 << info.bucket_log2) - 1) >> info.bucket_log2;
  const int32_t parity = a.state.parity[job.tensor];
  float* const row = a.state.sketch + info.first_bucket + (job.first >> info.bucket_log2);
  job.means.before = row + parity * a.state.buckets;
  job.means.after = row + (1 - parity) * a.state.buckets;
  if (lane_index() * 32 < job.buckets) prefetch(job.means.before + lane_index() * 32);
  job.means.weight = next_weight(a.state.layers[job.layer], a.config.decay);
}

// What the first phase multiplies a tensor by: what is known before this step's sums.
__device__ inline double standing_multiplier(const StepArgs& a, const Job& job, double factor) {
  if (!a.write_in_first_phase) return 1.0;
  const double own =
      job.layer == a.num_layers ? 1.0
                                : amplification(a.config, a.state.layers[job.layer], factor);
  return as_applied(own * (a.unscale ? job.means.inverse : 1.0), job.dtype);
}

// What a warp sets aside while its registers hold gradients.
struct WarpMemory {
  float buckets[kMaxBuckets];
  SketchSums sketch;
  Job job;
};

__device__ inline WarpMemory& warp_memory() {
  __shared__ WarpMemory memory[kWarps];
  return memory[warp_index()];
}

// A tile's sums from those of the lanes.
__device__ inline void finish_tile(const StepArgs& a, const Moments& lane) {
  WarpGroup warp;
  Sums sums = {merge_all(lane, warp), SketchSums{}};
  __syncwarp();
  const WarpMemory& memory = warp_memory();
  const Job& job = memory.job;
  sums.moments.mean *= job.means.inverse;
  sums.moments.m2 *= job.means.inverse * job.means.inverse;
  if (job.means.before)
    sums.sketch = job.tile.run_log2 == 0
                      ? memory.sketch
                      : add_all(fold_buckets(job.tile.run_log2, job.buckets, memory.buckets,
                                             job.means),
                                warp);
  publish(a, job.number, job.layer, sums);
}

// Measures a tile and multiplies it where that is known already.
template <int kCapacity>
__device__ inline void measure_tile(const StepArgs& a, const AddressTable<kCapacity>& table,
                                    int tile, double factor, int kept_tiles) {
  WarpGroup warp;
  Job job = find_tile(a, table, tile);
  if (job.tile.data) {
    const int ahead = lane_index() * 128;  // what is loaded first
    if (ahead < job.tile.count * element_bytes(job.dtype)) prefetch(job.tile.data + ahead);
    find_buckets(a, job);
  }
  __syncwarp();
  if (warp.rank() == 0) warp_memory().job = job;
  __syncwarp();
  if (!job.tile.data) return publish(a, tile, job.layer, Sums{});
  const double multiplier = standing_multiplier(a, job, factor);
  const Moments lane = with_element(job.dtype, [&](auto element) {
    using E = decltype(element);
    if (job.means.before && job.tile.run_log2 == 0) {
      const SketchSums sums = add_all(fold_elements<E>(job.tile, job.means), warp);
      if (warp.rank() == 0) warp_memory().sketch = sums;
    }
    const bool keep = sizeof(typename E::Wide) == 4 && warp_index() < kept_tiles;
    WarpMemory& memory = warp_memory();
    return measure_elements<E>(
        memory.job.tile, {static_cast<typename E::Wide>(multiplier), keep, memory.buckets});
  });
  finish_tile(a, lane);
}

template <int kCapacity>
__device__ inline void measure_tiles(const StepArgs& a, const AddressTable<kCapacity>& table,
                                     int kept_tiles) {
  __shared__ double factor;
  if (threadIdx.x == 0) factor = active_factor(a.config, *a.state.global, a.turn);
  __syncthreads();
  int tile = a.tile_begin + blockIdx.x * kWarps + warp_index();
#pragma unroll 1
  while (tile < a.tile_end) {
    const bool last = tile + static_cast<int>(gridDim.x) * kWarps >= a.tile_end;
    measure_tile(a, table, tile, factor, last ? kept_tiles : 0);
    tile = warp_memory().job.number + static_cast<int>(gridDim.x) * kWarps;
  }
}

template <int kCapacity>
__device__ inline void multiply_tiles(const StepArgs& a, const AddressTable<kCapacity>& table,
                                      int kept_tiles) {
  const Verdict verdict = *a.work.verdict;
  if (!verdict.counted) return;
  const double common = verdict.coefficient * (a.unscale ? inverse_scale(a.grad_scale) : 1.0);
  const int warps = gridDim.x * kWarps;
  const int first = a.tile_begin + blockIdx.x * kWarps + warp_index();
  if (first >= a.tile_end) return;
  // Backwards: what was read last may still be in shared memory or L2.
  const int last = first + (a.tile_end - 1 - first) / warps * warps;
#pragma unroll 1
  for (int tile = last; tile >= first; tile -= warps) {
    const Job job = find_tile(a, table, tile);
    if (!job.tile.data) continue;
    const double own = job.layer == a.num_layers ? 1.0 : a.work.scratch.amplified[job.layer];
    const double multiplier = as_applied(own * common, job.dtype);
    if (multiplier == 1.0) continue;
    const int kept = tile == last ? kept_tiles : 0;
    with_element(job.dtype, [&](auto element) {
      using E = decltype(element);
      multiply_elements<E>(job.tile, multiplier,
                           sizeof(typename E::Wide) == 4 && warp_index() < kept);
    });
  }
}

// One block, after every tile is measured.
__device__ inline void conclude(const StepArgs& a) {
  __shared__ double scratch[kWarps];
  BlockGroup<kThreads> block = {scratch};
  const Workspace& w = a.work;
  GlobalState& global = *a.state.global;
  for (int l = block.rank(); l <= a.num_layers; l += block.size())
    if (a.tables.layers[l].tiles == 0) w.layers[l] = Sums{};
  if (a.measure_only) return;
  block.barrier();
  const double factor = active_factor(a.config, global, a.turn);
  const bool counted = commit(a.config, global, a.state.layers, w.layers, a.num_layers, w.scratch,
                              factor, a.turn, block);
  block.barrier();
  double coefficient = 1.0;
  if (counted && needs_norm(a.config))
    coefficient = apply_norm(a.config, global, w.layers, a.num_layers,
                             w.layers[a.num_layers].moments, w.scratch.amplified, block);
  if (counted) {
    for (int64_t t = block.rank(); t < a.measured; t += block.size()) {
      const TensorInfo& info = a.tables.tensors[t];
      if (info.numel > 0 && __ldcg(&w.tiles[info.first_tile].moments.count) != 0.0 &&
          is_measured(a.state.layers[info.layer], w.layers[info.layer]))
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
                const __grid_constant__ AddressTable<kCapacity> table, int phases,
                int kept_tiles) {
  __shared__ bool decides;
  const bool first_thread = blockIdx.x == 0 && threadIdx.x == 0;

  if (phases & kMeasure) {
    // Every block reads this before its ticket, and only the last to take one writes it.
    if (a.found_inf && *a.found_inf != 0.0f) {
      if (first_thread && a.first_launch && !a.measure_only) skip(a);
      return;
    }
    measure_tiles(a, table, kept_tiles);
    if (a.last_launch) {
      __syncthreads();
      if (threadIdx.x == 0) decides = is_last(a.work.block_ticket, gridDim.x);
      __syncthreads();
      if (decides) conclude(a);
    }
  }
  if (phases == kBoth) cooperative_groups::this_grid().sync();
  if (phases & kMultiply) multiply_tiles(a, table, kept_tiles);
}

constexpr int kKeptBytes = kKeptVectors * sizeof(uint4);

const void* kernel_for(int capacity) {
  return capacity == kSmallTable ? reinterpret_cast<const void*>(&step_kernel<kSmallTable>)
                                 : reinterpret_cast<const void*>(&step_kernel<kLargeTable>);
}

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
  int current = 0, driver = 0, cooperative = 0, shared_optin = 0, shared_processor = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto attribute = [&](int& value, cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, current);
  };
  attribute(limits.processors, cudaDevAttrMultiProcessorCount);
  attribute(cooperative, cudaDevAttrCooperativeLaunch);
  attribute(shared_optin, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  attribute(shared_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;

  constexpr int kReserved = 10240;  // of each block: static and the system's own
  const int per_block = shared_processor / kMinBlocks;
  const int usable = (per_block < shared_optin ? per_block : shared_optin) - kReserved;
  const int kept = usable < 0 ? 0 : usable / kKeptBytes;
  limits.kept_tiles = kept < kWarps ? kept : kWarps;
  limits.cooperative = cooperative != 0;
  const int shared = limits.kept_tiles * kKeptBytes;
  error = prepare(kSmallTable, shared, limits.blocks_per_processor);
  if (error != cudaSuccess) return error;

  int blocks = 0;
  limits.large_table = driver >= 12010 && prepare(kLargeTable, shared, blocks) == cudaSuccess;
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
  int kept_tiles = phases == kBoth ? limits.kept_tiles : 0;
  void* parameters[] = {const_cast<StepArgs*>(&args), const_cast<uint64_t*>(table), &phase_bits,
                        &kept_tiles};
  const void* const kernel = kernel_for(count <= kSmallTable ? kSmallTable : kLargeTable);
  const size_t shared = static_cast<size_t>(kept_tiles) * kKeptBytes;
  if (phases == kBoth)
    return cudaLaunchCooperativeKernel(kernel, blocks, kThreads, parameters, shared, stream);
  return cudaLaunchKernel(kernel, blocks, kThreads, parameters, shared, stream);
}

}  // namespace gradamp::cuda
