// The rules of a step that concern whole layers: state update, score, threshold,
// selection, schedule, multiplier. Host and device run this same code; a Group is
// the threads that run it together (one on the host, a block on the device):
//   int rank(), size();  double sum(double);  int64_t sum(int64_t);  double least(double);
//   void barrier();
// The sums are deterministic, and every rank gets them, and the least.
#pragma once

#include "state.h"

namespace gradamp {

GRADAMP_HD bool needs_norm(const Config& c) { return c.match_norm || c.max_norm > 0.0; }

struct SerialGroup {
  int rank() const { return 0; }
  int size() const { return 1; }
  double sum(double x) const { return x; }
  int64_t sum(int64_t x) const { return x; }
  double least(double x) const { return x; }
  void barrier() const {}
};

// ---- rounds --------------------------------------------------------------------------

// The number of the step under way, from 0, before its first call or its last is committed.
GRADAMP_HD double step_number(const GlobalState& g, const Turn& turn) {
  return turn.begins_round ? g.step : g.step - 1.0;
}

GRADAMP_HD void begin_round(GlobalState& g, const Turn& turn) {
  if (turn.begins_round) g.step += 1.0, g.round_skipped = 0.0;
}

// What a call leaves behind that is skipped: the round is, once.
GRADAMP_HD void skip_call(const Config& c, GlobalState& g, const Turn& turn) {
  begin_round(g, turn);
  if (g.round_skipped == 0.0) g.skipped_steps += 1.0;
  g.round_skipped = 1.0;
  if (needs_norm(c)) g.total_norm = NAN;
}

// ---- state update -------------------------------------------------------------------

// Whether all members of a layer have a gradient in this step: by their elements, which are whole
// numbers even where they were added up of parts.
GRADAMP_HD bool is_measured(const LayerState& s, const Sums& x) {
  const double count = x.moments.count, members = s.member_numel;  // both are loaded at once
  return (count != 0.0) & ((members == 0.0) | (fabs(count - members) < 0.5));
}

// Weight of the coming step in every running mean of the layer.
GRADAMP_HD double next_weight(const LayerState& s, double decay) {
  return 1.0 / (1.0 + decay * s.weight_sum);
}

GRADAMP_HD void update_layer(LayerState& s, const Sums& x, double decay) {
  const double weight = next_weight(s, decay);
  if (s.steps >= 1.0) {
    const double root = sqrt(x.sketch.power) * sqrt(x.sketch.before);
    const double agreement = root > 0.0 ? x.sketch.dot / root : 0.0;
    s.agreement += (agreement - s.agreement) / s.weight_sum;
  }
  const double keep = 1.0 - weight;
  s.variance += weight * (x.moments.m2 / x.moments.count - s.variance);
  s.power += weight * (x.sketch.power - s.power);
  s.mean_power = x.sketch.after;
  s.noise = keep * keep * s.noise + weight * weight * x.sketch.power;
  s.weight_sum = 1.0 + decay * s.weight_sum;
  s.steps += 1.0;
  if (s.member_numel == 0.0) s.member_numel = x.moments.count;
}

// ---- score and threshold ------------------------------------------------------------

// A number in (0, 1) for each decision and layer, from counters alone.
GRADAMP_HD double drawn(uint32_t seed, int64_t decision, int64_t layer) {
  const uint32_t stream = sign_word(sign_word(seed) ^ static_cast<uint32_t>(decision));
  return (sign_word(stream ^ static_cast<uint32_t>(layer)) + 0.5) / 4294967296.0;
}

// What is measured; not finite where the layer has no score yet.
GRADAMP_HD double score(const LayerState& s, Measure measure) {
  if (measure == Measure::kVariance) return s.steps >= 1.0 ? log(s.variance) : NAN;
  if (s.steps < 2.0) return NAN;
  return measure == Measure::kDirection ? -s.agreement : log(s.noise / s.mean_power);
}

GRADAMP_HD bool is_eligible(const LayerState& s, double score, double min_steps) {
  return s.steps >= min_steps && is_finite(score);
}

// Maps doubles to integers of the same order.
GRADAMP_HD uint64_t ordered_bits(double x) {
  union {
    double value;
    uint64_t bits;
  } u = {x};
  return u.bits >> 63 ? ~u.bits : u.bits | (uint64_t{1} << 63);
}

GRADAMP_HD double from_ordered_bits(uint64_t key) {
  union {
    uint64_t bits;
    double value;
  } u = {key >> 63 ? key & ~(uint64_t{1} << 63) : ~key};
  return u.value;
}

// The k-th smallest (0-based) finite score: binary search over the bits of the answer.
template <class Group>
GRADAMP_HD double kth_smallest(const double* scores, int64_t layers, int64_t k, Group& group) {
  uint64_t answer = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const uint64_t candidate = answer | (uint64_t{1} << bit);
    int64_t below = 0;
    for (int64_t l = group.rank(); l < layers; l += group.size())
      below += is_finite(scores[l]) && ordered_bits(scores[l]) < candidate;
    if (group.sum(below) <= k) answer = candidate;
  }
  return from_ordered_bits(answer);
}

// The one after the k-th smallest, which is `low`; itself if there is none.
template <class Group>
GRADAMP_HD double next_smallest(const double* scores, int64_t layers, int64_t k, double low,
                                Group& group) {
  int64_t not_above = 0;
  double least = INFINITY;
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    if (!is_finite(scores[l])) continue;
    if (scores[l] <= low) ++not_above;
    else if (scores[l] < least) least = scores[l];
  }
  not_above = group.sum(not_above);
  least = group.least(least);
  return not_above > k + 1 || least == INFINITY ? low : least;
}

// Threshold over the finite entries of `scores` (ineligible layers hold NaN); NaN if none.
template <class Group>
GRADAMP_HD double threshold(const Config& c, const double* scores, int64_t layers, Group& group) {
  if (c.threshold == Threshold::kNumber) return c.threshold_value;
  int64_t mine = 0;
  double total = 0.0;
  for (int64_t l = group.rank(); l < layers; l += group.size())
    if (is_finite(scores[l])) ++mine, total += scores[l];
  const int64_t count = group.sum(mine);
  if (count == 0) return NAN;
  if (c.threshold == Threshold::kQuantile) {
    const double position = c.threshold_value * static_cast<double>(count - 1);
    const int64_t lower = static_cast<int64_t>(position);
    const double low = kth_smallest(scores, layers, lower, group);
    return low + (position - lower) * (next_smallest(scores, layers, lower, low, group) - low);
  }
  const double mean = group.sum(total) / static_cast<double>(count);
  if (c.threshold == Threshold::kMean) return mean;
  double squares = 0.0;
  for (int64_t l = group.rank(); l < layers; l += group.size())
    if (is_finite(scores[l])) squares += (scores[l] - mean) * (scores[l] - mean);
  const double spread = c.threshold_value * sqrt(group.sum(squares) / static_cast<double>(count));
  return c.select == Select::kBelow ? mean - spread : mean + spread;
}

// ---- growth -------------------------------------------------------------------------

constexpr double kLow = 0.1;    // of the mean direction: above it the learning rate is low
constexpr double kSurge = 4.0;  // times the least variance
constexpr double kEarly = 5.0;  // the least is kept from a layer's step min_steps / kEarly on

// Whether the layer's gradients are much larger than at their least.
GRADAMP_HD bool is_surging(const LayerState& s) { return s.variance > kSurge * s.least_variance; }

// What growth came to, less what a surge takes back.
GRADAMP_HD double grown(const LayerState& s) {
  if (!is_surging(s)) return s.factor;
  const double braked = s.factor * sqrt(kSurge * s.least_variance / s.variance);
  return braked > 1.0 ? braked : 1.0;
}

// After a step. A variance of 0 is none: nothing can be compared to it. Nor is there one where an
// optimizer's update is multiplied, which a surge of the gradients does not enlarge.
GRADAMP_HD void keep_least(LayerState& s, double min_steps) {
  if (s.on_update == 0.0 && kEarly * s.steps >= min_steps && s.variance > 0.0 && s.variance < s.least_variance)
    s.least_variance = s.variance;
}

GRADAMP_HD void settle(LayerState& s, double taken_back) {
  const double left = grown(s) / taken_back;
  s.factor = left > 1.0 ? left : 1.0;
  s.settled = 1.0;
  const bool comparable = s.on_update == 0.0 && s.variance > 0.0;
  s.least_variance = comparable ? s.variance : static_cast<double>(INFINITY);
}

// At a decision: layers grow by `factor`, or settle for good. `scores` are finite where layers
// are eligible.
template <class Group>
GRADAMP_HD void grow(const Config& c, GlobalState& g, LayerState* states, int64_t layers,
                     const double* scores, double factor, Group& group) {
  if (factor == 1.0 || g.rising != 0.0) return;
  const bool first = g.gated == 0.0;
  double elements = 0.0, direction = 0.0;
  for (int64_t l = group.rank(); l < layers; l += group.size())
    if (is_finite(scores[l]))
      elements += states[l].member_numel, direction += states[l].member_numel * states[l].agreement;
  elements = group.sum(elements);
  direction = group.sum(direction) / elements;
  if (elements == 0.0) return;
  const bool low = !first || direction > kLow;
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    LayerState& s = states[l];
    if (!is_finite(scores[l]) || s.settled != 0.0) continue;
    if (!low || s.selected == 0.0) {
      settle(s, first ? 1.0 : factor);  // what grew last was too much; at first nothing has grown
    } else if (!is_surging(s)) {
      s.factor = s.factor * factor < c.max_factor ? s.factor * factor : c.max_factor;
    }
  }
  if (group.rank() == 0) g.gated = 1.0;
}

// ---- decision -----------------------------------------------------------------------

// Chooses anew, in step `step`, which layers are amplified, and with `grow` by how much. `scores`
// is scratch for `layers` doubles; decisions are numbered so that each draws anew; `factor` is
// active_factor().
template <class Group>
GRADAMP_HD void decide(const Config& c, GlobalState& g, LayerState* states, int64_t layers,
                       int64_t decision, double step, double* scores, double factor,
                       Group& group) {
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    const double x = c.measure == Measure::kRandom ? drawn(c.seed, decision, l)
                                                   : score(states[l], c.measure);
    scores[l] = is_eligible(states[l], x, c.min_steps) ? x : NAN;
  }
  group.barrier();
  const double tau = threshold(c, scores, layers, group);
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    const double chosen = c.select == Select::kBelow ? scores[l] < tau : scores[l] > tau;
    if (chosen != states[l].selected) states[l].changed_at = step;
    states[l].selected = chosen;
  }
  if (group.rank() == 0) g.threshold = tau;
  if (c.grow) grow(c, g, states, layers, scores, factor, group);
}

// ---- schedule and multiplier --------------------------------------------------------

// What gradients are multiplied by before they count: rounded once to fp32, as torch's
// GradScaler does.
GRADAMP_HD double inverse_scale(const float* grad_scale) {
  return grad_scale ? static_cast<float>(1.0 / static_cast<double>(*grad_scale)) : 1.0;
}

// What selected layers are multiplied by on this step, or grow by: 1 outside all windows.
GRADAMP_HD double active_factor(const Config& c, const GlobalState& g, const Turn& turn) {
  if (c.schedule == ScheduleUnit::kAlways) return g.factor;
  const double now = c.schedule == ScheduleUnit::kEpoch ? g.epoch : step_number(g, turn);
  for (int32_t i = 0; i < c.num_windows; ++i) {
    const Window& w = c.windows[i];
    if (w.start <= now && now < w.stop) return is_finite(w.factor) ? w.factor : g.factor;
  }
  return 1.0;
}

// What a layer's gradients are multiplied by as its state stands.
GRADAMP_HD double amplification(const Config& c, const LayerState& s, double factor) {
  if (c.grow) return factor != 1.0 ? grown(s) : 1.0;
  return s.selected != 0.0 ? factor : 1.0;
}

// A multiplier is rounded once, to the precision that it is applied in.
GRADAMP_HD double as_applied(double multiplier, DType dtype) {
  return dtype == DType::kFloat64 ? multiplier
                                  : static_cast<double>(static_cast<float>(multiplier));
}

// What every gradient is multiplied by on top, from the sums of squares before and
// after amplification. A NaN norm gives NaN, as torch.nn.utils.clip_grad_norm_ does.
GRADAMP_HD double norm_coefficient(const Config& c, double before, double after) {
  if (c.match_norm) return after > 0.0 ? sqrt(before / after) : 1.0;
  const double coefficient = c.max_norm / (sqrt(after) + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// ---- commit -------------------------------------------------------------------------

// Scratch of a commit, one of each for every layer.
struct Scratch {
  double* scores;
  double* amplified;  // what the layer's gradients are multiplied by in this step
};

// Folds one call's sums into the state; returns false, and skips it, if a layer's sums are not
// finite. `factor` is active_factor() at the start of the call. sums[l].moments.count == 0 marks
// a layer without gradient; one that lacks some of its members' only passes by.
template <class Group>
GRADAMP_HD bool commit(const Config& c, GlobalState& g, LayerState* states, const Sums* sums,
                       int64_t layers, const Scratch& scratch, double factor, const Turn& turn,
                       Group& group) {
  int64_t bad = 0;
  for (int64_t l = group.rank(); l < layers; l += group.size())
    bad += sums[l].moments.count != 0.0 && !is_finite(sums[l]);
  if (group.sum(bad) != 0) {
    if (group.rank() == 0) skip_call(c, g, turn);
    return false;
  }
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    scratch.amplified[l] = amplification(c, states[l], factor);
    if (!is_measured(states[l], sums[l])) continue;
    update_layer(states[l], sums[l], c.decay);
    if (c.grow) keep_least(states[l], c.min_steps);
  }
  group.barrier();
  const double step = step_number(g, turn);
  const bool skipped = !turn.begins_round && g.round_skipped != 0.0;
  const int64_t counted = static_cast<int64_t>(step - g.skipped_steps) + 1;
  if (turn.decides && !skipped && c.refresh > 0 && counted % c.refresh == 0)
    decide(c, g, states, layers, counted / c.refresh, step, scratch.scores, factor, group);
  group.barrier();
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    if (c.exact) scratch.amplified[l] = amplification(c, states[l], factor);
    if (is_measured(states[l], sums[l]) && scratch.amplified[l] != 1.0)
      states[l].amplified_steps += 1.0;
  }
  if (group.rank() == 0) begin_round(g, turn);
  return true;
}

// Square root of the sums of squares over the layers and `excluded` (count 0: none),
// before and after amplification; returns the coefficient and stores the norm. Gradients of
// layers whose optimizer's updates are multiplied are not amplified.
template <class Group>
GRADAMP_HD double apply_norm(const Config& c, GlobalState& g, const LayerState* states,
                             const Sums* sums, int64_t layers, const Moments& excluded,
                             const double* amplified, Group& group) {
  double before = 0.0, after = 0.0;
  for (int64_t l = group.rank(); l < layers; l += group.size()) {
    if (sums[l].moments.count == 0.0) continue;
    const double power = energy(sums[l].moments);
    const double multiplier = states[l].on_update != 0.0 ? 1.0 : amplified[l];
    before += power;
    after += multiplier * multiplier * power;
  }
  before = group.sum(before);
  after = group.sum(after);
  if (excluded.count != 0.0) before += energy(excluded), after += energy(excluded);
  group.barrier();
  if (group.rank() == 0) g.total_norm = sqrt(c.match_norm ? before : after);
  return norm_coefficient(c, before, after);
}

}  // namespace gradamp
