// What the kernel looks up on the device, and how a step is cut into launches. Arithmetic
// only: no torch, no CUDA runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "../tiles.h"

namespace gradamp::cuda {

// A warp works on one tile at a time; 16 KB of fp32.
constexpr int64_t kTileElements = 4096;
// So many tiles of one layer are merged before the layer's are: one for each lane of the warp
// that comes last, which then loads all their sums at once. (A Triton program merges 256 rows
// at once, so its groups are of 256.)
constexpr int kGroupTiles = 32;

// Addresses travel by value in the kernel's parameters, whose limit is 4 KB, or 32,764
// bytes from driver 530 (CUDA 12.1) on. More tensors take more launches.
constexpr int kSmallTable = 448;
constexpr int kLargeTable = 4000;

// Where a layer's tiles and groups of tiles lie; the last entry is that of the excluded tensors.
struct LayerTiles {
  int32_t first_tile;
  int32_t tiles;
  int32_t first_group;
  int32_t groups;
};

struct HostTables {
  std::vector<LayerTiles> layers;  // [num_layers + 1]
  int32_t groups;
};

HostTables make_tables(const Tiling& tiling);

// Tensors and tiles of one launch.
struct Chunk {
  int32_t tensor_begin, tensor_end;
  int32_t tile_begin, tile_end;
};

// Tensors [0, tensors) in as few launches as tables of `capacity` addresses allow. Never
// none: a step without tiles is a step, and the launch that counts it must be made.
std::vector<Chunk> make_chunks(const Tiling& tiling, int64_t tensors, int capacity);

}  // namespace gradamp::cuda
