// What the host hands to the kernel: plain structs, a stream, and no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../rules/decide.h"
#include "../engine.h"
#include "tables.h"

namespace gradamp::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// What the deciding block leaves for the second phase.
struct Verdict {
  double coefficient;  // of everything
  int32_t counted;     // 0: the step was skipped, nothing is written
};

struct Tables {  // on the device, written once
  const Tile* tiles;
  const MeasuredTensor* tensors;  // [measured]
  const LayerGroups* layers;      // [num_layers + 1]
};

struct Workspace {  // on the device; every step writes what it reads
  Sums* tiles;
  Sums* groups;
  Sums* layers;  // [num_layers + 1]
  Scratch scratch;
  Verdict* verdict;
  uint32_t* group_tickets;  // zero between steps
  uint32_t* block_ticket;   // zero between steps
  uint32_t* claims;         // of tiles; zero between launches
};

struct StepArgs {
  Config config;
  StateView state;
  Tables tables;
  Workspace work;
  const float* grad_scale;
  float* found_inf;
  int32_t num_layers;
  int32_t measured;            // tensors that belong to a layer
  int32_t tensor_begin;        // tensors and tiles of this launch
  int32_t tile_begin;
  int32_t tile_end;
  bool unscale;
  Turn turn;
  bool write_in_first_phase;   // multiplies as it measures
  bool first_launch;           // of the step
  bool last_launch;            // of the first phase: its last block decides
  bool measure_only;           // work.layers is left to the caller: nothing is committed
};

enum Phases : int { kMeasure = 1, kWrite = 2, kBoth = 3 };

// Groups whose hyper-parameters travel in the kernel's parameters: with those of one or two, which
// most optimizers have, a learning rate may change in every step and nothing is uploaded.
constexpr int kFewGroups = 2;

struct UpdateArgs {
  const UpdateTensor* tensors;  // on the device, one for each tensor of the step
  const Hyper* groups;          // on the device; null: they are in `few`
  Hyper few[kFewGroups];
  int32_t tensors_of_launch;
  bool alone;                   // nothing is measured and all multipliers are 1
};

// What a step does with its gradients, beside measuring them.
enum class Kind { kMultiply, kSgd, kAdam };
constexpr int kKinds = 3;

// The kernels that update, by the capacity of their table and whether they measure as well.
const void* sgd_kernel(int capacity, bool measures);
const void* adam_kernel(int capacity, bool measures);

// An address and the dtype behind it in one word: device pointers leave the top bits clear.
constexpr int kDTypeShift = 60;

struct DeviceLimits {
  int processors;
  int blocks_per_processor;
  int shared_bytes;  // of a block, beside what the kernels declare
  bool cooperative;
  bool large_table;
};

// Loads the kernels of a kind and reads what they can use of the current device.
cudaError_t inspect(Kind kind, DeviceLimits& limits);

// `table` holds the tagged addresses of tensors [args.tensor_begin, ... + count) and may be
// read up to the capacity of the table that `count` needs. `update` is read where the kind updates.
cudaError_t launch(Kind kind, const StepArgs& args, const UpdateArgs& update, const uint64_t* table,
                   int count, Phases phases, int blocks, const DeviceLimits& limits,
                   cudaStream_t stream);

}  // namespace gradamp::cuda
