// A warp's gradients on their way into shared memory: the tiles it will work on as one
// stream of steps, some of which are always under way. The next tile's begin while this
// one is still worked on, so that memory never waits for a tile's end.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "groups.cuh"
#include "launch.h"

namespace gradamp::cuda {

constexpr int kRowBytes = 512;  // one vector of 16 bytes in every lane
constexpr int kStepRows = 8;
constexpr int kStepBytes = kStepRows * kRowBytes;

// Steps under way of each warp: with 24 warps on a processor 96 KB or more, where 50 would do.
// Before sm_80 copies take the registers' way and nothing is under way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kStages = 1;
#else
constexpr int kStages = 2;
#endif

// A step as it lies in global memory, from the multiple of 16 bytes, or else of 4, at or
// before its first element. A copy whose ends lie differently in lines of 64 bytes here and
// there takes half as much again from L2.
struct alignas(128) Stage {
  char bytes[kStepBytes];
};

// What is read of a layer's state before a step, in what order.
constexpr int kLayerFacts = 5;
__device__ inline const double* layer_fact(const LayerState& s, int i) {
  return i == 0   ? &s.weight_sum
         : i == 1 ? &s.selected
         : i == 2 ? &s.factor
         : i == 3 ? &s.variance
                  : &s.least_variance;
}

// What else comes with a tile.
struct alignas(16) TileFacts {
  Tile tile;
  double of_layer[kLayerFacts];
  int32_t parity;     // of the tensor's buckets
  int32_t opened_at;  // the tile's first step

  __device__ LayerState layer() const {
    LayerState s = {};
    s.weight_sum = of_layer[0], s.selected = of_layer[1], s.factor = of_layer[2];
    s.variance = of_layer[3], s.least_variance = of_layer[4];
    return s;
  }
};

constexpr int kPartBuckets = 8;

// How the running means of a tile's buckets move in this step.
struct RunningMeans {
  const float* before;  // null: excluded
  float* after;
  double inverse;       // what sums are multiplied by before they count
  double weight;        // of this step
};

// What a warp knows of the tile it works on.
struct Work {
  const Tile* tile;
  char* data;         // the tile's first element
  int number;         // of the tile
  double multiplier;  // 1: nothing is written
  double shift;       // close to the tile's elements
  RunningMeans means;
};

// Registers are scarce: what is not needed for each element waits here.
struct WarpMemory {
  Work work;
  uint32_t after[kStages];        // of a stage, the word behind it, if it begins with half a word
  float parts[kPartBuckets][32];  // the lanes' parts of buckets of 512
  TileFacts facts[3];             // of this tile, the next, and on their way that after it
};

struct BlockMemory {
  Stage stages[kWarps][kStages];
  WarpMemory warps[kWarps];
};
// Three blocks share the 228 KB of a processor of Hopper's; the system takes 1 KB of each, and
// the kernel declares 128 bytes.
static_assert(sizeof(BlockMemory) <= 228 * 1024 / 3 - 1024 - 128);

__device__ inline BlockMemory& block_memory() {
  extern __shared__ BlockMemory memory[];
  return memory[0];
}
__device__ inline WarpMemory& warp_memory() { return block_memory().warps[warp_index()]; }

// The compiler does not see where an address out of shared memory points to.
template <class T>
__device__ inline T* in_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

template <int kCapacity>
struct AddressTable {
  uint64_t tagged[kCapacity];

  __device__ DType dtype(int tensor) const {
    return static_cast<DType>(tagged[tensor] >> kDTypeShift);
  }
  // Null: no gradient.
  __device__ char* address(int tensor) const {
    return reinterpret_cast<char*>(tagged[tensor] & ((uint64_t{1} << kDTypeShift) - 1));
  }
};

// A step in shared memory.
struct Step {
  const char* bytes;
  const uint32_t* after;  // the word behind it, where elements are halves of words
};

template <int kCapacity>
class Stream {
 public:
  // Tiles first, first + warps(), and then whichever no other warp has claimed: a few processors
  // are a third slower than the others. Sums are taken by tile, so it shows in none who takes it.
  __device__ Stream(const StepArgs& a, const AddressTable<kCapacity>& table, int first)
      : a_(a), table_(table), next_(first), after_next_(first + warps()) {
    if (lane_index() == 0) warp_memory().work.number = -1;
    fetch_facts(0);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    known_ = true;
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) done();
  }

  // Goes on to the next tile, once the last step of that before is done, and waits for its
  // first step; false: there is none.
  __device__ __forceinline__ bool start() {
    const int opened = facts().tile.number;
    if (warp_memory().work.number == opened) return false;
#pragma unroll 1
    while (taken_ < facts().opened_at) done();
    take();
    known_ = true;
    if (lane_index() == 0) warp_memory().work.number = opened;
    return true;
  }
  // Of the tile that was opened last; after start() the one that it went to.
  __device__ const TileFacts& facts() const { return warp_memory().facts[slot_]; }

  // The step that comes next, once it is there.
  __device__ __forceinline__ Step take() {
    __pipeline_wait_prior(kStages - 1);
    __syncwarp();
    return {stage(taken_).bytes, &word_after()};
  }
  // It is used; another takes its place.
  __device__ __forceinline__ void done() {
    __syncwarp();
    refill();
    ++taken_;
  }
  // The same, shorter, if what comes is a whole step of the opened tile.
  __device__ __forceinline__ bool comes_whole() const { return left_ >= kStepBytes; }
  __device__ __forceinline__ void done_whole() {
    __syncwarp();
    issue_whole();
    __pipeline_commit();
    ++taken_;
  }

 private:
  __device__ __forceinline__ Stage& stage(int step) const {
    return block_memory().stages[warp_index()][static_cast<unsigned>(step) % kStages];
  }
  __device__ __forceinline__ uint32_t& word_after() const {
    return warp_memory().after[static_cast<unsigned>(taken_) % kStages];
  }
  __device__ __forceinline__ int next_slot() const { return slot_ == 2 ? 0 : slot_ + 1; }

  __device__ static int warps() { return static_cast<int>(gridDim.x) * kWarps; }

  // The tile after the next. Nothing waits for its number until the next one is opened. Every
  // warp claims once in vain, so the counter wraps to zero with a launch's last claim.
  __device__ __forceinline__ void claim() {
    const int unassigned = a_.tile_end - a_.tile_begin - 2 * warps();
    if (unassigned <= 0) {
      after_next_ = a_.tile_end;
    } else if (lane_index() == 0) {
      const unsigned last = unassigned + warps() - 1;
      after_next_ = a_.tile_end - unassigned + static_cast<int>(atomicInc(a_.work.claims, last));
    }
  }

  __device__ __forceinline__ void fetch_facts(int slot) {
    const int lane = lane_index();
    if (next_ < a_.tile_end && lane < 3)
      __pipeline_memcpy_async(reinterpret_cast<char*>(&warp_memory().facts[slot].tile) + lane * 16,
                              reinterpret_cast<const char*>(a_.tables.tiles + next_) + lane * 16,
                              16);
  }

  __device__ __forceinline__ void open() {
    slot_ = next_slot();
    known_ = false;
    TileFacts& facts = warp_memory().facts[slot_];
    if (lane_index() == 0) facts.opened_at = taken_ + kStages;
    __syncwarp();
    const Tile& tile = facts.tile;
    const int index = tile.tensor - a_.tensor_begin;
    const int bytes = element_bytes(table_.dtype(index));
    const char* const data = table_.address(index);
    at_ = data + tile.first * bytes;
    left_ = data ? tile.count * bytes : 0;
    const int lane = lane_index();
    if (tile.layer < a_.num_layers) {
      const LayerState& layer = a_.state.layers[tile.layer];
      if (lane < kLayerFacts)
        __pipeline_memcpy_async(&facts.of_layer[lane], layer_fact(layer, lane), 8);
      if (lane == kLayerFacts)
        __pipeline_memcpy_async(&facts.parity, a_.state.parity + tile.tensor, 4);
    }
    next_ = __shfl_sync(kAllLanes, after_next_, 0);
    if (next_ < a_.tile_end) claim();
    fetch_facts(next_slot());
  }

  __device__ __forceinline__ void refill() {
    if (left_ == 0 && known_ && next_ < a_.tile_end) open();
    if (comes_whole())
      issue_whole();
    else if (left_ > 0)
      issue_rest();
    __pipeline_commit();
  }

  // Words of 4 bytes where those of 16 would lie across others in shared memory.
  __device__ __forceinline__ void issue_whole() {
    char* const to = stage(taken_).bytes;
    const int lane = lane_index();
    if (reinterpret_cast<uintptr_t>(at_) % 16 == 0) {
      const char* const from = in_global(at_) + lane * 16;
#pragma unroll
      for (int i = 0; i < kStepBytes; i += 512)
        __pipeline_memcpy_async(to + lane * 16 + i, from + i, 16);
    } else {
      const unsigned half = static_cast<unsigned>(reinterpret_cast<uintptr_t>(at_)) % 4;
      const char* const from = in_global(at_) - half + lane * 4;
#pragma unroll 8
      for (int i = 0; i < kStepBytes; i += 128)
        __pipeline_memcpy_async(to + lane * 4 + i, from + i, 4);
      if (half != 0 && lane == 0)
        __pipeline_memcpy_async(&word_after(), from + kStepBytes, 4);
    }
    at_ += kStepBytes;
    left_ -= kStepBytes;
  }

  __device__ __forceinline__ void issue_rest() {
    char* const to = stage(taken_).bytes;
    const unsigned address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(at_));
    if (address % 16 == 0) {
#pragma unroll 1
      for (int i = lane_index() * 16; i < left_; i += 512)
        __pipeline_memcpy_async(to + i, in_global(at_) + i, 16);
    } else {
      const int half = address % 4;
#pragma unroll 1
      for (int i = lane_index() * 4; i < left_ + half; i += 128)
        __pipeline_memcpy_async(i < kStepBytes ? to + i : reinterpret_cast<char*>(&word_after()),
                                in_global(at_) - half + i, 4);
    }
    left_ = 0;
  }

  const StepArgs& a_;
  const AddressTable<kCapacity>& table_;
  const char* at_ = nullptr;  // of the opened tile, what was not issued yet
  int left_ = 0;              // bytes
  int next_;                  // tile
  int after_next_;            // tile, in lane 0
  int slot_ = 2;              // of the opened tile
  int taken_ = -kStages;      // steps
  bool known_ = false;        // the next tile's facts are there
};

}  // namespace gradamp::cuda
