// How gradients are cut into tiles. Arithmetic only: no torch, no device, no addresses.
#pragma once

#include <cstdint>
#include <vector>

#include "rules/common.h"

namespace gradamp {

// A gradient as it is known before any step. Measured tensors come first and are grouped
// by ascending layer; excluded ones (layer -1) follow.
struct TensorInfo {
  int64_t numel;
  int64_t first_tile;
  int64_t first_bucket;  // in a row of the sketch
  int32_t layer;
  int32_t bucket_log2;
  uint32_t first_word;  // of signs: not 0 where other processes hold what comes before
  int64_t tile_elements;
};

// A tile is `tile_elements` consecutive elements of one tensor; its last tile may be
// short, and a tensor without elements has none. Tiles are numbered in tensor order.
struct Tiling {
  // Cuts the tensors, each by its number of elements, and numbers the tiles; what else is known
  // of them is given. Throws std::invalid_argument for tensors in another order,
  // std::length_error for more tiles than 32 bits count.
  Tiling(std::vector<TensorInfo> given, int64_t num_layers, int64_t (*tile_elements)(int64_t numel));

  int64_t num_tensors() const { return static_cast<int64_t>(tensors.size()); }
  int64_t tile_count(int64_t tensor) const {
    const TensorInfo& of = tensors[tensor];
    return (of.numel + of.tile_elements - 1) / of.tile_elements;
  }

  int64_t num_layers;
  int64_t measured;        // tensors[0 .. measured) belong to a layer
  int64_t measured_tiles;  // tiles of those
  int64_t num_tiles;
  int64_t num_elements;
  std::vector<TensorInfo> tensors;
  std::vector<int32_t> tile_tensor;  // [num_tiles]: which tensor a tile is part of
  std::vector<int64_t> layer_begin;  // [num_layers + 1]: layer l owns tensors [l, l + 1)
};

}  // namespace gradamp
