#include "tables.h"

#include <algorithm>

namespace gradamp::cuda {
namespace {

int64_t tiles_before(const Tiling& tiling, int64_t tensor) {
  return tensor < tiling.num_tensors() ? tiling.tensors[tensor].first_tile : tiling.num_tiles;
}

}  // namespace

HostTables make_tables(const Tiling& tiling) {
  HostTables tables = {};
  for (int64_t l = 0; l <= tiling.num_layers; ++l) {
    const bool excluded = l == tiling.num_layers;
    const int64_t begin = tiles_before(tiling, excluded ? tiling.measured : tiling.layer_begin[l]);
    const int64_t end = excluded ? tiling.num_tiles : tiles_before(tiling, tiling.layer_begin[l + 1]);
    const auto tiles = static_cast<int32_t>(end - begin);
    const int32_t groups = tiles / kGroupTiles + (tiles % kGroupTiles != 0);
    tables.layers.push_back({static_cast<int32_t>(begin), tiles, tables.groups, groups});
    tables.groups += groups;
  }
  return tables;
}

std::vector<Chunk> make_chunks(const Tiling& tiling, int64_t tensors, int capacity) {
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < tensors || chunks.empty(); begin += capacity) {
    const int64_t end = std::min<int64_t>(begin + capacity, tensors);
    chunks.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                      static_cast<int32_t>(tiles_before(tiling, begin)),
                      static_cast<int32_t>(tiles_before(tiling, end))});
  }
  return chunks;
}

}  // namespace gradamp::cuda
