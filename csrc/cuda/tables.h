// What the kernel looks up on the device, and how a step is cut into launches. Arithmetic
// only: no torch, no CUDA runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "../tiles.h"

namespace gradamp::cuda {

// A warp works on one tile at a time. How long those of a tensor are follows from its size
// alone, since sums are taken by tile. In short tensors every element is a bucket of the
// sketch, which costs most: many warps share them. Long ones spread a tile's own cost.
constexpr int64_t tile_elements(int64_t numel) {
  return numel < 4096 ? 512 : numel < (1 << 20) ? 4096 : numel < (8 << 20) ? 8192 : 16384;
}

// A layer's tiles are merged in groups first, of four tiles a lane, or in so many groups.
constexpr int kMinGroupTiles = 128;
constexpr int kMaxGroups = 32;

// Addresses travel by value in the kernel's parameters, whose limit is 4 KB, or 32,764
// bytes from driver 530 (CUDA 12.1) on. More tensors take more launches.
constexpr int kSmallTable = 448;
constexpr int kLargeTable = 4000;

// All that is known of a tile before a step, in three vectors of 16 bytes.
struct alignas(16) Tile {
  int64_t first;         // its first element in the tensor
  int64_t first_bucket;  // in a row of the sketch
  int32_t number;
  int32_t tensor;
  int32_t layer;         // num_layers: excluded
  uint32_t first_word;   // of signs: the first element's index in the whole tensor / 32
  uint16_t count;        // of elements
  uint16_t bucket_log2;
  int32_t group;
  int32_t group_begin;   // the first tile of the group
  int32_t group_tiles;
};
static_assert(sizeof(Tile) == 48);

// Where a layer's groups of tiles lie.
struct LayerGroups {
  int32_t begin;
  int32_t count;  // at most kMaxGroups
};

// Where a measured tensor's tiles begin, -1 if it has none, and whose it is.
struct MeasuredTensor {
  int32_t first_tile;
  int32_t layer;
};

struct HostTables {
  std::vector<Tile> tiles;
  std::vector<MeasuredTensor> tensors;
  std::vector<LayerGroups> layers;  // [num_layers + 1]; the last entry is that of the excluded
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
