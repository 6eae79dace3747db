// Prints what the CUDA backend plans, as JSON.
//   usage: tables num_layers [layer numel]...
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/tables.h"

namespace {

void print_chunks(const gradamp::Tiling& tiling, int64_t tensors, int capacity) {
  const char* comma = "";
  std::printf("[");
  for (const auto& c : gradamp::cuda::make_chunks(tiling, tensors, capacity)) {
    std::printf("%s[%d, %d, %d, %d]", comma, c.tensor_begin, c.tensor_end, c.tile_begin, c.tile_end);
    comma = ", ";
  }
  std::printf("]");
}

}  // namespace

int main(int argc, char** argv) {
  using namespace gradamp::cuda;
  std::vector<gradamp::TensorInfo> tensors;
  for (int i = 2; i + 1 < argc; i += 2)
    tensors.push_back({.numel = std::atoll(argv[i + 1]), .layer = std::atoi(argv[i])});
  const gradamp::Tiling tiling(tensors, std::atoll(argv[1]), kTileElements);
  const HostTables tables = make_tables(tiling);
  std::printf("{\"groups\": %d, \"layers\": [", tables.groups);
  for (size_t l = 0; l < tables.layers.size(); ++l) {
    const LayerTiles& t = tables.layers[l];
    std::printf("%s[%d, %d, %d, %d]", l ? ", " : "", t.first_tile, t.tiles, t.first_group, t.groups);
  }
  // The map from tiles to tensors, run by run.
  std::printf("], \"tensor_runs\": [");
  const auto& map = tiling.tile_tensor;
  for (size_t begin = 0, end; begin < map.size(); begin = end) {
    for (end = begin; end < map.size() && map[end] == map[begin]; ++end) {
    }
    std::printf("%s[%d, %zu]", begin ? ", " : "", map[begin], end - begin);
  }
  std::printf("], \"small\": ");
  print_chunks(tiling, tiling.measured, kSmallTable);
  std::printf(", \"large\": ");
  print_chunks(tiling, tiling.num_tensors(), kLargeTable);
  std::printf("}\n");
}
