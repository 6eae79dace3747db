#include "tables.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace gradamp::cuda {
namespace {

int64_t tiles_before(const Layout& layout, int64_t tensor) {
  return tensor < layout.num_tensors() ? layout.tensors[tensor].first_tile : layout.num_tiles;
}

}  // namespace

HostTables make_tables(const Layout& layout) {
  if (layout.num_tiles > std::numeric_limits<int32_t>::max())
    throw std::length_error("the cuda backend counts tiles of 4096 elements in 32 bits; these "
                            "gradients have more: use several Amplifiers");
  HostTables tables = {};
  tables.tile_tensor.resize(layout.num_tiles);
  for (int64_t t = 0; t < layout.num_tensors(); ++t)
    std::fill_n(tables.tile_tensor.begin() + layout.tensors[t].first_tile, layout.tile_count(t),
                static_cast<int32_t>(t));
  for (int64_t l = 0; l <= layout.num_layers; ++l) {
    const bool excluded = l == layout.num_layers;
    const int64_t begin = tiles_before(layout, excluded ? layout.measured : layout.layer_begin[l]);
    const int64_t end = excluded ? layout.num_tiles : tiles_before(layout, layout.layer_begin[l + 1]);
    const auto tiles = static_cast<int32_t>(end - begin);
    const int32_t groups = tiles / kGroupTiles + (tiles % kGroupTiles != 0);
    tables.layers.push_back({static_cast<int32_t>(begin), tiles, tables.groups, groups});
    tables.groups += groups;
  }
  return tables;
}

std::vector<Chunk> make_chunks(const Layout& layout, int64_t tensors, int capacity) {
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < tensors || chunks.empty(); begin += capacity) {
    const int64_t end = std::min<int64_t>(begin + capacity, tensors);
    chunks.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end),
                      static_cast<int32_t>(tiles_before(layout, begin)),
                      static_cast<int32_t>(tiles_before(layout, end))});
  }
  return chunks;
}

}  // namespace gradamp::cuda
