#include "layout.h"

#include <stdexcept>

#include "sketch.h"

namespace gradamp {

Layout::Layout(const std::vector<int32_t>& layer, const std::vector<int64_t>& numel,
               const std::vector<int64_t>& first_bucket, int64_t num_layers,
               int64_t tile_elements)
    : tile_elements(tile_elements),
      num_layers(num_layers),
      measured(0),
      measured_tiles(0),
      num_tiles(0),
      num_elements(0),
      layer_begin(num_layers + 1, 0) {
  if (layer.size() != numel.size() || layer.size() != first_bucket.size())
    throw std::invalid_argument("layer, numel and first_bucket must have one entry per tensor");
  tensors.reserve(layer.size());
  for (size_t i = 0; i < layer.size(); ++i) {
    const bool in_order = i == 0 || layer[i] == -1 || (layer[i - 1] != -1 && layer[i - 1] <= layer[i]);
    if (layer[i] < -1 || layer[i] >= num_layers || !in_order)
      throw std::invalid_argument("tensors must be grouped by ascending layer, excluded ones last");
    tensors.push_back({numel[i], num_tiles, first_bucket[i], layer[i], bucket_log2(numel[i])});
    num_tiles += tile_count(static_cast<int64_t>(i));
    num_elements += numel[i];
    if (layer[i] >= 0) {
      ++measured;
      measured_tiles = num_tiles;
      layer_begin[layer[i] + 1] = measured;
    }
  }
  for (int64_t l = 0; l < num_layers; ++l)
    if (layer_begin[l + 1] == 0) layer_begin[l + 1] = layer_begin[l];
}

}  // namespace gradamp
