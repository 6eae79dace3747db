#include "tables.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace gradamp::cuda {
namespace {

std::vector<int32_t> number_tiles(const Layout& layout) {
  std::vector<int32_t> first = {0};
  int64_t tiles = 0;
  for (const TensorInfo& tensor : layout.tensors) {
    const int64_t length = tile_elements(tensor.numel);
    tiles += (tensor.numel + length - 1) / length;
    if (tiles > std::numeric_limits<int32_t>::max())
      throw std::length_error("the cuda backend counts tiles of up to 16384 elements in 32 bits; "
                              "these gradients have more: use several Amplifiers");
    first.push_back(static_cast<int32_t>(tiles));
  }
  return first;
}

void cut(const TensorInfo& tensor, int32_t index, int32_t layers, std::vector<Tile>& tiles) {
  const bool excluded = tensor.layer < 0;
  const int64_t length = tile_elements(tensor.numel);
  for (int64_t first = 0; first < tensor.numel; first += length) {
    Tile tile = {};
    tile.first = first;
    tile.first_bucket = tensor.first_bucket + (first >> tensor.bucket_log2);
    tile.count = static_cast<int32_t>(std::min(length, tensor.numel - first));
    tile.tensor = index;
    tile.layer = excluded ? layers : tensor.layer;
    tile.first_word = tensor.first_word + static_cast<uint32_t>(first >> 5);
    tile.bucket_log2 = excluded ? 9 : tensor.bucket_log2;
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

HostTables make_tables(const Layout& layout) {
  HostTables tables = {{}, number_tiles(layout), {}, 0};
  tables.tiles.reserve(tables.first_tile.back());
  const auto layers = static_cast<int32_t>(layout.num_layers);
  for (int64_t t = 0; t < layout.num_tensors(); ++t)
    cut(layout.tensors[t], static_cast<int32_t>(t), layers, tables.tiles);
  for (int64_t l = 0; l <= layers; ++l) {
    const int64_t begin = l == layers ? layout.measured : layout.layer_begin[l];
    const int64_t end = l == layers ? layout.num_tensors() : layout.layer_begin[l + 1];
    tables.layers.push_back(group(tables.first_tile[begin], tables.first_tile[end], tables.groups,
                                  tables.tiles));
    tables.groups += tables.layers.back().count;
  }
  return tables;
}

std::vector<Chunk> make_chunks(const std::vector<int32_t>& first_tile, int64_t tensors,
                               int capacity) {
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < tensors || chunks.empty(); begin += capacity) {
    const int64_t end = std::min<int64_t>(begin + capacity, tensors);
    chunks.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                      first_tile[begin], first_tile[end]});
  }
  return chunks;
}

}  // namespace gradamp::cuda
