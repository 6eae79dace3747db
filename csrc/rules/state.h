// What a step is told (Config), what it measures (Sums) and what it leaves behind (GlobalState,
// LayerState). The state is plain doubles throughout, so that it is one flat fp64 tensor:
//   [ GlobalState | LayerState of layer 0 | LayerState of layer 1 | ... ]
// The lists of its columns and of the options' values stand here once for C++; the extension
// exports them, and Python compares them with its own before it binds anything.
#pragma once

#include "common.h"
#include "moments.h"
#include "sketch.h"

namespace gradamp {

// Each list calls X with what it names, in order: values of enumerations as they are named here
// and in Python, columns of the state by the name they have in both.
#define GRADAMP_MEASURES(X)    \
  X(kFluctuation, fluctuation) \
  X(kDirection, direction)     \
  X(kVariance, variance)       \
  X(kRandom, random)
#define GRADAMP_THRESHOLDS(X) X(kMean, mean) X(kStd, std) X(kQuantile, quantile) X(kNumber, number)
#define GRADAMP_SELECTS(X) X(kBelow, below) X(kAbove, above)
#define GRADAMP_SCHEDULE_UNITS(X) X(kAlways, always) X(kEpoch, epoch) X(kStep, step)

#define GRADAMP_GLOBAL_FIELDS(X)                                                        \
  X(step)               /* calls so far, skipped ones included */                       \
  X(skipped_steps)                                                                      \
  X(epoch)              /* -1: never set */                                             \
  X(threshold)          /* tau of the last decision, NaN before the first */            \
  X(factor)                                                                             \
  X(total_norm)         /* before clipping */                                           \
  X(unmeasured_steps)   /* calls that Python made without an engine, on top of step */  \
  X(unmeasured_skipped) /* how many of those were skipped */                            \
  X(round_skipped)      /* 1: a call of the round under way, or of the last, was */     \
  X(gated)              /* 0: no decision yet at which anything could grow */           \
  X(rising)             /* 1: the learning rate rises: nothing grows or settles */

#define GRADAMP_LAYER_FIELDS(X)                                                         \
  X(steps)           /* k */                                                            \
  X(weight_sum)      /* W_k = 1 + decay * W_{k-1}; the newest step weighs 1 / W_k */    \
  X(variance)        /* V */                                                            \
  X(power)           /* Q: running mean of sum s^2 */                                   \
  X(mean_power)      /* R: sum of the squared running means */                          \
  X(noise)           /* F: what R would be if steps were uncorrelated */                \
  X(agreement)       /* D */                                                            \
  X(selected)        /* 0 or 1: the standing selection */                               \
  X(amplified_steps) /* counted steps on which the layer was multiplied */              \
  X(changed_at)      /* step number at which `selected` last changed */                 \
  X(member_numel)    /* elements of its members; 0: those of the first step measured */ \
  X(factor)          /* a: what growth came to */                                       \
  X(settled)         /* 0 or 1: it grows no more */                                     \
  X(least_variance)  /* V_min; infinite before there is one, and with on_update */         \
  X(on_update)       /* 1: an optimizer's update is multiplied, not the gradient */

#define GRADAMP_ENUMERATOR(name, text) name,
enum class Measure : int32_t { GRADAMP_MEASURES(GRADAMP_ENUMERATOR) };
enum class Threshold : int32_t { GRADAMP_THRESHOLDS(GRADAMP_ENUMERATOR) };
enum class Select : int32_t { GRADAMP_SELECTS(GRADAMP_ENUMERATOR) };
enum class ScheduleUnit : int32_t { GRADAMP_SCHEDULE_UNITS(GRADAMP_ENUMERATOR) };
#undef GRADAMP_ENUMERATOR

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
  int32_t grow = 0;
  double max_factor = 0.0;        // with `grow`
};

#define GRADAMP_COLUMN(name) double name;
struct GlobalState {
  GRADAMP_GLOBAL_FIELDS(GRADAMP_COLUMN)
};
struct LayerState {
  GRADAMP_LAYER_FIELDS(GRADAMP_COLUMN)
};
#undef GRADAMP_COLUMN

// A step is a round of calls, one for each optimizer that is attached. Of how many only the host
// knows.
struct Turn {
  bool begins_round = true;
  bool decides = true;  // where a decision is due in this round
};

constexpr int kGlobalFields = sizeof(GlobalState) / sizeof(double);
constexpr int kLayerFields = sizeof(LayerState) / sizeof(double);

// One step's statistics of a tile, of several, or of a layer, in units of the unscaled gradient.
// Padded to eight doubles, so that four 16-byte accesses move it.
struct alignas(16) Sums {
  Moments moments;  // count 0: there was no gradient
  SketchSums sketch;
};
constexpr int kSumsColumns = sizeof(Sums) / sizeof(double);
static_assert(kSumsColumns == 8);

// Where this is not so some element is not finite, or a sum has overflowed.
GRADAMP_HD bool is_finite(const Sums& s) {
  return is_finite(energy(s.moments) + s.sketch.power + fabs(s.sketch.dot) + s.sketch.after);
}

}  // namespace gradamp
