// What a step is told (Config), what it leaves behind (GlobalState, LayerState).
// Plain doubles throughout, so that the state is one flat fp64 tensor:
//   [ GlobalState | LayerState of layer 0 | LayerState of layer 1 | ... ]
// gradamp_fast/state.py names the same columns in the same order.
#pragma once

#include "common.h"
#include "moments.h"
#include "sketch.h"

namespace gradamp {

enum class Measure : int32_t { kFluctuation = 0, kDirection = 1, kVariance = 2, kRandom = 3 };
enum class Threshold : int32_t { kMean = 0, kStd = 1, kQuantile = 2, kNumber = 3 };
enum class Select : int32_t { kBelow = 0, kAbove = 1 };
enum class ScheduleUnit : int32_t { kAlways = 0, kEpoch = 1, kStep = 2 };

struct Window {
  double start;   // inclusive
  double stop;    // exclusive
  double factor;  // NaN: the global factor
};

struct Config {
  Measure measure = Measure::kFluctuation;
  Threshold threshold = Threshold::kMean;
  Select select = Select::kBelow;
  ScheduleUnit schedule = ScheduleUnit::kAlways;
  const Window* windows = nullptr;
  int32_t num_windows = 0;
  int32_t exact = 0;              // timing="exact"
  int32_t match_norm = 0;
  double max_norm = 0.0;          // 0: no clipping
  double threshold_value = 0.0;   // the number, num_std or quantile, as `threshold` asks
  double decay = 0.99;            // 1 stands for decay=None: a plain average
  double min_steps = 100.0;
  int64_t refresh = 100;          // 0: decided outside the step, when the epoch changes
  uint32_t seed = 0;              // of the draws of Measure::kRandom
};

struct GlobalState {
  double step = 0.0;           // calls so far, skipped ones included
  double skipped_steps = 0.0;
  double epoch = -1.0;         // -1: never set
  double threshold = 0.0;      // tau of the last decision, NaN before the first
  double factor = 2.0;
  double total_norm = 0.0;     // before clipping
  double unmeasured[2] = {0.0, 0.0};  // calls made elsewhere, and how many were skipped
};

struct LayerState {
  double steps;            // k
  double weight_sum;       // W_k = 1 + decay * W_{k-1}; the newest step weighs 1 / W_k
  double variance;         // V
  double power;            // Q: running mean of sum s^2
  double mean_power;       // R: sum of the squared running means
  double noise;            // F: what R would be if steps were uncorrelated
  double agreement;        // D
  double selected;         // 0 or 1: the standing selection
  double amplified_steps;  // counted steps on which the layer was multiplied
  double changed_at;       // step number at which `selected` last changed
};

constexpr int kGlobalFields = sizeof(GlobalState) / sizeof(double);
constexpr int kLayerFields = sizeof(LayerState) / sizeof(double);

// One step's statistics of one layer, in units of the unscaled gradient.
struct LayerSums {
  Moments moments;  // count 0: the layer had no gradient
  SketchSums sketch;
};

GRADAMP_HD bool is_finite(const LayerSums& s) {
  return is_finite(s.moments.mean) && is_finite(s.moments.m2) && is_finite(energy(s.moments)) &&
         is_finite(s.sketch.power) && is_finite(s.sketch.dot) && is_finite(s.sketch.after);
}

}  // namespace gradamp
