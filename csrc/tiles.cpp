#include "tiles.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace gradamp {

Tiling::Tiling(std::vector<TensorInfo> given, int64_t num_layers,
               int64_t (*tile_elements)(int64_t numel))
    : num_layers(num_layers),
      measured(0),
      measured_tiles(0),
      num_tiles(0),
      num_elements(0),
      tensors(std::move(given)),
      layer_begin(num_layers + 1, 0) {
  int32_t previous = 0;
  for (int64_t t = 0; t < num_tensors(); ++t) {
    TensorInfo& tensor = tensors[t];
    const bool in_order = t == 0 || tensor.layer == -1 || (previous != -1 && previous <= tensor.layer);
    if (tensor.layer < -1 || tensor.layer >= num_layers || !in_order)
      throw std::invalid_argument("tensors must be grouped by ascending layer, excluded ones last");
    previous = tensor.layer;
    tensor.first_tile = num_tiles;
    tensor.tile_elements = tile_elements(tensor.numel);
    num_tiles += tile_count(t);
    num_elements += tensor.numel;
    if (tensor.layer >= 0) {
      ++measured;
      measured_tiles = num_tiles;
      layer_begin[tensor.layer + 1] = measured;
    }
  }
  if (num_tiles > std::numeric_limits<int32_t>::max())
    throw std::length_error("tiles of gradients are counted in 32 bits; these gradients have more: "
                            "use several Amplifiers");
  tile_tensor.resize(num_tiles);
  for (int64_t t = 0; t < num_tensors(); ++t)
    std::fill_n(tile_tensor.begin() + tensors[t].first_tile, tile_count(t),
                static_cast<int32_t>(t));
  for (int64_t l = 0; l < num_layers; ++l)
    if (layer_begin[l + 1] == 0) layer_begin[l + 1] = layer_begin[l];
}

}  // namespace gradamp
