#include "tables.h"

#include <algorithm>

namespace gradamp::cuda {
namespace {

int32_t tiles_before(const Tiling& tiling, int64_t tensor) {
  return static_cast<int32_t>(tensor < tiling.num_tensors() ? tiling.tensors[tensor].first_tile
                                                            : tiling.num_tiles);
}

void add_tiles(const TensorInfo& tensor, int32_t index, int32_t layers, std::vector<Tile>& tiles) {
  const bool excluded = tensor.layer < 0;
  const int64_t length = tensor.tile_elements;
  for (int64_t first = 0; first < tensor.numel; first += length) {
    Tile tile = {};
    tile.first = first;
    tile.first_bucket = tensor.first_bucket + (first >> tensor.bucket_log2);
    tile.number = static_cast<int32_t>(tiles.size());
    tile.count = static_cast<uint16_t>(std::min(length, tensor.numel - first));
    tile.tensor = index;
    tile.layer = excluded ? layers : tensor.layer;
    tile.first_word = tensor.first_word + static_cast<uint32_t>(first >> 5);
    tile.bucket_log2 = static_cast<uint16_t>(excluded ? 9 : tensor.bucket_log2);
    tiles.push_back(tile);
  }
}

// Puts tiles [begin, end), those of one layer, into groups.
LayerGroups group(int32_t begin, int32_t end, int32_t first_group, std::vector<Tile>& tiles) {
  const int32_t size = std::max(kMinGroupTiles, (end - begin + kMaxGroups - 1) / kMaxGroups);
  for (int32_t tile = begin; tile < end; ++tile) {
    const int32_t number = (tile - begin) / size;
    tiles[tile].group = first_group + number;
    tiles[tile].group_begin = begin + number * size;
    tiles[tile].group_tiles = std::min(size, end - tiles[tile].group_begin);
  }
  return {first_group, (end - begin + size - 1) / size};
}

}  // namespace

HostTables make_tables(const Tiling& tiling) {
  HostTables tables = {};
  tables.tiles.reserve(tiling.num_tiles);
  const auto layers = static_cast<int32_t>(tiling.num_layers);
  for (int64_t t = 0; t < tiling.num_tensors(); ++t)
    add_tiles(tiling.tensors[t], static_cast<int32_t>(t), layers, tables.tiles);
  for (int64_t t = 0; t < tiling.measured; ++t) {
    const TensorInfo& tensor = tiling.tensors[t];
    tables.tensors.push_back({tensor.numel > 0 ? tiles_before(tiling, t) : -1, tensor.layer});
  }
  for (int64_t l = 0; l <= layers; ++l) {
    const int64_t begin = l == layers ? tiling.measured : tiling.layer_begin[l];
    const int64_t end = l == layers ? tiling.num_tensors() : tiling.layer_begin[l + 1];
    tables.layers.push_back(group(tiles_before(tiling, begin), tiles_before(tiling, end),
                                  tables.groups, tables.tiles));
    tables.groups += tables.layers.back().count;
  }
  return tables;
}

std::vector<Chunk> make_chunks(const Tiling& tiling, int64_t tensors, int capacity) {
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < tensors || chunks.empty(); begin += capacity) {
    const int64_t end = std::min<int64_t>(begin + capacity, tensors);
    chunks.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                      tiles_before(tiling, begin), tiles_before(tiling, end)});
  }
  return chunks;
}

}  // namespace gradamp::cuda
