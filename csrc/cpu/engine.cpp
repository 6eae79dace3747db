#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "../rules/decide.h"
#include "tile.h"

namespace gradamp::cpu {

#if defined(GRADAMP_X86_DISPATCH)
namespace avx2 {
extern const TileKernels kernels;
}
namespace avx512 {
extern const TileKernels kernels;
}
#endif
namespace baseline {
extern const TileKernels kernels;
}

namespace {

struct Choice {
  const char* name;
  const TileKernels* kernels;
};

// The best that the processor has and ATEN_CPU_CAPABILITY, torch's own limit, allows.
Choice choose() {
#if defined(GRADAMP_X86_DISPATCH)
  const char* const limit = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allowed = [&](const char* name) { return !limit || std::strcmp(limit, name) == 0; };
  const bool any_avx2 = allowed("avx512") || allowed("avx2");
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {"avx512", &avx512::kernels};
  if (any_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {"avx2", &avx2::kernels};
#endif
  return {"baseline", &baseline::kernels};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

constexpr int64_t kTilesAtOnce = 4;  // what a thread takes from the queue

class CpuEngine final : public Engine {
 public:
  CpuEngine(Tiling tiling, const Config& config, const StateView& state, Threads threads)
      : tiling_(std::move(tiling)),
        config_(config),
        windows_(config.windows, config.windows + config.num_windows),
        state_(state),
        threads_(std::move(threads)),
        tiles_(tiling_.num_tiles),
        sums_(tiling_.num_layers),
        scores_(tiling_.num_layers),
        amplified_(tiling_.num_layers),
        multipliers_(tiling_.num_tensors()),
        terms_(tiling_.num_tensors()) {
    config_.windows = windows_.data();
  }

  void step(const StepInputs& in) override {
    GlobalState& global = *state_.global;
    std::fill_n(in.written, tiling_.num_tensors(), uint8_t{0});
    if (in.found_inf && *in.found_inf != 0.0f) {
      if (!in.sums) skip_call(config_, global, in.turn);
      return;
    }
    const double inverse = inverse_scale(in.grad_scale);
    const double factor = active_factor(config_, global, in.turn);
    const double unscale = in.unscale || in.update ? inverse : 1.0;
    const bool one_pass = !config_.exact && !needs_norm(config_);
    const bool norm = needs_norm(config_) && !in.sums;

    if (one_pass) {
      for (int64_t l = 0; l < tiling_.num_layers; ++l)
        amplified_[l] = amplification(config_, state_.layers[l], factor);
      settle_multipliers(in, unscale);
    }
    const bool with_excluded = norm || (one_pass && (unscale != 1.0 || in.update));
    each_tile(with_excluded ? tiling_.num_tiles : tiling_.measured_tiles, [&](int64_t tile) {
      const bool measured = norm || tile < tiling_.measured_tiles;
      if (measured) measure(in, tile, inverse, one_pass);
      if (one_pass && !(measured && in.update)) apply(in, tile);
    });

    SerialGroup group;
    reduce(in);
    if (in.sums) {
      std::copy(sums_.begin(), sums_.end(), in.sums);
      if (one_pass) mark_applied(in);
      return;
    }
    const Scratch scratch = {scores_.data(), amplified_.data()};
    if (!commit(config_, global, state_.layers, sums_.data(), tiling_.num_layers, scratch, factor,
                in.turn, group)) {
      if (in.found_inf) *in.found_inf = 1.0f;
      if (!one_pass) return;
    } else {
      flip_parity(in);
    }
    if (!one_pass) {
      const double coefficient =
          norm ? apply_norm(config_, global, state_.layers, sums_.data(), tiling_.num_layers,
                            excluded_moments(in), amplified_.data(), group)
               : 1.0;
      settle_multipliers(in, unscale * coefficient);
      each_tile(tiling_.num_tiles, [&](int64_t tile) { apply(in, tile); });
    }
    mark_applied(in);
  }

 private:
  template <class Body>
  void each_tile(int64_t count, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t begin; (begin = next.fetch_add(kTilesAtOnce)) < count;)
        for (int64_t tile = begin; tile < std::min(begin + kTilesAtOnce, count); ++tile) body(tile);
    };
    // Elements, not tiles, decide whether other threads are worth waking.
    const int64_t useful = tiling_.num_elements / (kTilesAtOnce * kTileElements);
    const int workers = static_cast<int>(std::min<int64_t>(threads_.available(), useful));
    if (workers > 1) {
      threads_.run(workers, work);
    } else {
      work();
    }
  }

  struct Slice {
    char* data;  // null: no gradient
    int64_t first;
    int64_t count;
  };

  Slice slice(const StepInputs& in, int64_t tile) const {
    const int64_t t = tiling_.tile_tensor[tile];
    const TensorInfo& tensor = tiling_.tensors[t];
    const int64_t first = (tile - tensor.first_tile) * kTileElements;
    char* data = static_cast<char*>(in.gradients[t]);
    return {data ? data + first * element_bytes(in.dtypes[t]) : nullptr, first,
            std::min(kTileElements, tensor.numel - first)};
  }

  // `updates`: if that is what is done with the elements, it is done in the same pass.
  void measure(const StepInputs& in, int64_t tile, double inverse, bool updates) {
    const Slice part = slice(in, tile);
    if (!part.data) return;
    const int64_t t = tiling_.tile_tensor[tile];
    const TensorInfo& tensor = tiling_.tensors[t];
    const int64_t first = int64_t{tensor.first_word} * 32 + part.first;
    MeasureTile work = {part.data, in.dtypes[t], first,   part.count, tensor.bucket_log2,
                        inverse,   0.0,          nullptr, nullptr};
    UpdateTile update;
    if (updates && in.update) {
      update = update_of(in, part, t);
      work.update = &update;
    }
    if (t < tiling_.measured) {
      const int64_t bucket = tensor.first_bucket + (part.first >> tensor.bucket_log2);
      work.weight = next_weight(state_.layers[tensor.layer], config_.decay);
      work.means = row(state_.parity[t]) + bucket;
      work.next_means = row(1 - state_.parity[t]) + bucket;
    }
    tiles_[tile] = chosen().kernels->measure(work);
  }

  // What is done with a tile's elements once their multiplier is known.
  void apply(const StepInputs& in, int64_t tile) {
    const Slice part = slice(in, tile);
    const int64_t t = tiling_.tile_tensor[tile];
    if (!part.data) return;
    if (in.update) {
      chosen().kernels->update(update_of(in, part, t));
    } else if (multipliers_[t] != 1.0) {
      chosen().kernels->multiply(part.data, in.dtypes[t], part.count, multipliers_[t]);
    }
  }

  UpdateTile update_of(const StepInputs& in, const Slice& part, int64_t t) const {
    const UpdateTensor& tensor = in.update->tensors[t];
    const Hyper& hyper = in.update->groups[tensor.group];
    const int64_t offset = part.first * element_bytes(in.dtypes[t]);
    const auto at = [&](void* data) { return static_cast<char*>(data) + offset; };
    UpdateTile tile = {part.data,  at(tensor.parameter), {},        in.dtypes[t],
                       part.count, &hyper,               &terms_[t]};
    for (int s = 0; s < update_states(hyper); ++s) tile.states[s] = at(tensor.states[s]);
    return tile;
  }

  // Tiles to layers, always in tile order.
  void reduce(const StepInputs& in) {
    for (int64_t l = 0; l < tiling_.num_layers; ++l) {
      sums_[l] = Sums{};
      for (int64_t t = tiling_.layer_begin[l]; t < tiling_.layer_begin[l + 1]; ++t) {
        if (!in.gradients[t]) continue;
        const int64_t begin = tiling_.tensors[t].first_tile;
        for (int64_t tile = begin; tile < begin + tiling_.tile_count(t); ++tile) {
          sums_[l].moments = merge(sums_[l].moments, tiles_[tile].moments);
          add(sums_[l].sketch, tiles_[tile].sketch);
        }
      }
    }
  }

  Moments excluded_moments(const StepInputs& in) const {
    Moments all;
    for (int64_t tile = tiling_.measured_tiles; tile < tiling_.num_tiles; ++tile)
      if (in.gradients[tiling_.tile_tensor[tile]]) all = merge(all, tiles_[tile].moments);
    return all;
  }

  // `common` multiplies all gradients.
  void settle_multipliers(const StepInputs& in, double common) {
    for (int64_t t = 0; t < tiling_.num_tensors(); ++t) {
      if (!in.gradients[t]) continue;
      const int32_t layer = tiling_.tensors[t].layer;
      const double own = layer < 0 ? 1.0 : amplified_[layer];
      if (in.update) {
        const UpdateTensor& tensor = in.update->tensors[t];
        terms_[t] = update_terms<double>(in.update->groups[tensor.group], own, common, *tensor.steps);
      } else {
        multipliers_[t] = as_applied(own * common, in.dtypes[t]);
      }
    }
  }

  void mark_applied(const StepInputs& in) const {
    for (int64_t t = 0; t < tiling_.num_tensors(); ++t) {
      if (!in.gradients[t]) continue;
      in.written[t] = in.update || multipliers_[t] != 1.0;
      if (in.update) *in.update->tensors[t].steps += 1.0f;
    }
  }

  void flip_parity(const StepInputs& in) {
    for (int64_t t = 0; t < tiling_.measured; ++t) {
      const int32_t layer = tiling_.tensors[t].layer;
      if (in.gradients[t] && is_measured(state_.layers[layer], sums_[layer]))
        state_.parity[t] = 1 - state_.parity[t];
    }
  }

  float* row(int32_t parity) const { return state_.sketch + parity * state_.buckets; }

  Tiling tiling_;
  Config config_;
  std::vector<Window> windows_;
  StateView state_;
  Threads threads_;
  std::vector<Sums> tiles_;
  std::vector<Sums> sums_;
  std::vector<double> scores_;
  std::vector<double> amplified_;    // per layer, this step
  std::vector<double> multipliers_;  // per tensor, rounded as it is applied
  std::vector<UpdateTerms<double>> terms_;  // per tensor, where there is an update
};

}  // namespace

const char* instruction_set() { return chosen().name; }

std::unique_ptr<Engine> make_engine(Tiling tiling, const Config& config, const StateView& state,
                                    Threads threads) {
  return std::make_unique<CpuEngine>(std::move(tiling), config, state, std::move(threads));
}

}  // namespace gradamp::cpu
