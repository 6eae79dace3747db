// The work on one tile of one gradient, compiled once for each instruction set.
#pragma once

#include "../rules/state.h"
#include "../rules/update.h"

namespace gradamp::cpu {

struct UpdateTile {
  const void* gradient;        // the tile's first element, at any address; likewise the others'
  void* parameter;
  void* states[kUpdateStates];
  DType dtype;                 // of all of them
  int64_t count;
  const Hyper* hyper;
  const UpdateTerms<double>* terms;
};

struct MeasureTile {
  const void* data;    // the tile's first element, at any address
  DType dtype;
  int64_t first;       // its index in the whole tensor, for the signs; a multiple of 32
  int64_t count;       // 1 ... kTileElements of engine.h
  int bucket_log2;
  double inverse;      // what elements are multiplied by before they count
  double weight;       // of this step in the running means
  const float* means;  // of the tile's buckets, before this step; null: moments only
  float* next_means;   // and after it
  const UpdateTile* update = nullptr;  // of the same tile: updated as it is measured
};

struct TileKernels {
  Sums (*measure)(const MeasureTile& tile);
  // data[0 .. count) *= multiplier, computed in fp32 (fp64 for fp64), rounded once,
  // and in fp16 no larger than 65,504 where it was finite.
  void (*multiply)(void* data, DType dtype, int64_t count, double multiplier);
  // Each element computed in fp32 (fp64 for fp64) and rounded once.
  void (*update)(const UpdateTile& tile);
};

}  // namespace gradamp::cpu
