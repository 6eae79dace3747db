// The kernel that measures gradients and multiplies them, and how all kernels are launched.
#include "step.cuh"

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

// The policy: gradients are multiplied where they lie.
struct Multiply {
  __device__ static constexpr bool measures() { return true; }

  // What the first phase multiplies a tile by: what is known before this step's sums.
  __device__ double prepare(const StepArgs& a, const TileFacts& facts, const Common& common,
                            DType dtype, const char*) const {
    if (!a.write_in_first_phase) return 1.0;
    const double own = standing_amplification(a, facts, common);
    return as_applied(own * (a.unscale ? common.inverse : 1.0), dtype);
  }
  template <class E, class Steps>
  __device__ __forceinline__ int work_on_steps(Steps& stream, const Work& work, int begin,
                                               LaneSums& sums) const {
    return measure_steps<E, true>(stream, work, begin, sums);
  }
};

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    step_kernel(const __grid_constant__ StepArgs a,
                const __grid_constant__ AddressTable<kCapacity> table, int phases) {
  if (phases & kMeasure) {
    if (is_skipped(a)) return;
    work_on_tiles(a, table, Multiply{});
    if (a.last_launch && is_last_block(a)) conclude(a);
  }
  if (phases == kBoth) cooperative_groups::this_grid().sync();
  if (phases & kWrite) multiply_tiles(a, table);
}

const void* kernel_for(Kind kind, int capacity, bool measures) {
  if (kind == Kind::kSgd) return sgd_kernel(capacity, measures);
  if (kind == Kind::kAdam) return adam_kernel(capacity, measures);
  return capacity == kSmallTable ? reinterpret_cast<const void*>(&step_kernel<kSmallTable>)
                                 : reinterpret_cast<const void*>(&step_kernel<kLargeTable>);
}

// Loads the kernels of a table; how many blocks of the one that measures fit on a processor at
// once, and with how many bytes of shared memory each, of which no block may have more than `most`.
cudaError_t prepare(Kind kind, int capacity, int most, int& shared, int& blocks) {
  cudaFuncAttributes attributes;  // asked for: that loads a kernel which would be loaded lazily
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_for(kind, capacity, false));
  const void* const kernel = kernel_for(kind, capacity, true);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  constexpr int kWanted = sizeof(BlockMemory);  // the host's, which is the largest: Turing needs half
  const int left = most - static_cast<int>(attributes.sharedSizeBytes);
  shared = left < kWanted ? left : kWanted;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared);
}

}  // namespace

cudaError_t inspect(Kind kind, DeviceLimits& limits) {
  int current = 0, driver = 0, cooperative = 0, most = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto attribute = [&](int& value, cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, current);
  };
  attribute(limits.processors, cudaDevAttrMultiProcessorCount);
  attribute(cooperative, cudaDevAttrCooperativeLaunch);
  attribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess)
    error = prepare(kind, kSmallTable, most, limits.shared_bytes, limits.blocks_per_processor);
  if (error != cudaSuccess) return error;
  limits.cooperative = cooperative != 0;

  int blocks = 0;
  limits.large_table =
      driver >= 12010 &&
      prepare(kind, kLargeTable, most, limits.shared_bytes, blocks) == cudaSuccess;
  if (!limits.large_table) {
    cudaGetLastError();  // a refusal of the large table is no error
  } else if (blocks < limits.blocks_per_processor) {
    limits.blocks_per_processor = blocks;
  }
  return cudaSuccess;
}

cudaError_t launch(Kind kind, const StepArgs& args, const UpdateArgs& update, const uint64_t* table,
                   int count, Phases phases, int blocks, const DeviceLimits& limits,
                   cudaStream_t stream) {
  int phase_bits = phases;
  void* parameters[] = {const_cast<StepArgs*>(&args), const_cast<uint64_t*>(table), &phase_bits,
                        const_cast<UpdateArgs*>(&update)};
  const int capacity = count <= kSmallTable ? kSmallTable : kLargeTable;
  const void* const kernel = kernel_for(kind, capacity, phases != kWrite);
  const size_t shared = phases == kWrite ? 0 : limits.shared_bytes;
  if (phases == kBoth)
    return cudaLaunchCooperativeKernel(kernel, blocks, kThreads, parameters, shared, stream);
  return cudaLaunchKernel(kernel, blocks, kThreads, parameters, shared, stream);
}

}  // namespace gradamp::cuda
