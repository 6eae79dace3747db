// An optimizer's update of one tile whose statistics are known, or not asked for. Compiled once for
// each instruction set, each time into a namespace of its own.
#include "update.h"

namespace gradamp::cpu::GRADAMP_ISA {
namespace {

template <int kStates, class T>
void update_vectors(const UpdateTile& tile) {
  const T* const gradient = static_cast<const T*>(tile.gradient);
  const Updating<kStates, T> updating(tile);
  int64_t i = 0;
  for (; i + kLanes <= tile.count; i += kLanes) updating(i, load(gradient + i));
  if (i < tile.count) updating.last(i, load_last(gradient + i, tile.count - i), tile.count - i);
}

template <int kStates>
void update_doubles(const UpdateTile& tile) {
  for (int64_t i = 0; i < tile.count; ++i) {
    const auto at = [&](void* data) -> double& { return static_cast<double*>(data)[i]; };
    double x[kUpdateStates];
    for (int s = 0; s < kStates; ++s) x[s] = at(tile.states[s]);
    update_by<kStates>(*tile.terms, at(tile.parameter),
                       static_cast<const double*>(tile.gradient)[i], x);
    for (int s = 0; s < kStates; ++s) at(tile.states[s]) = x[s];
  }
}

template <int kStates>
void update_any(const UpdateTile& tile) {
  switch (tile.dtype) {
    case DType::kFloat32:
      return update_vectors<kStates, float>(tile);
    case DType::kBFloat16:
      return update_vectors<kStates, bf16>(tile);
    case DType::kFloat16:
      return update_vectors<kStates, fp16>(tile);
    case DType::kFloat64:
      return update_doubles<kStates>(tile);
  }
}

}  // namespace

void update(const UpdateTile& tile) {
  switch (update_states(*tile.hyper)) {
    case 0:
      return update_any<0>(tile);
    case 1:
      return update_any<1>(tile);
    case 2:
      return update_any<2>(tile);
    default:
      return update_any<3>(tile);
  }
}

}  // namespace gradamp::cpu::GRADAMP_ISA
