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
  const gradamp::Tiling tiling(tensors, std::atoll(argv[1]), tile_elements);
  const HostTables tables = make_tables(tiling);
  std::printf("{\"groups\": %d, \"layers\": [", tables.groups);
  for (size_t l = 0; l < tables.layers.size(); ++l)
    std::printf("%s[%d, %d]", l ? ", " : "", tables.layers[l].begin, tables.layers[l].count);
  std::printf("], \"measured\": [");
  for (size_t t = 0; t < tables.tensors.size(); ++t)
    std::printf("%s[%d, %d]", t ? ", " : "", tables.tensors[t].first_tile, tables.tensors[t].layer);
  std::printf("], \"tiles\": [");
  for (size_t i = 0; i < tables.tiles.size() && i < 4096; ++i) {
    const Tile& t = tables.tiles[i];
    std::printf("%s[%d, %lld, %d, %d, %d, %d, %d]", i ? ", " : "", t.tensor,
                static_cast<long long>(t.first), t.count, t.layer, t.group, t.group_begin,
                t.group_tiles);
  }
  std::printf("], \"small\": ");
  print_chunks(tiling, tiling.measured, kSmallTable);
  std::printf(", \"large\": ");
  print_chunks(tiling, tiling.num_tensors(), kLargeTable);
  std::printf("}\n");
}
