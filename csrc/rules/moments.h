// Mean and sum of squared deviations, merged without cancellation.
#pragma once

#include "common.h"

namespace gradamp {

// Whether a sum of squares in fp32 is as good as its addends: beyond this range squares of a few
// elements vanish or overflow, and are taken again, of elements scaled into it.
GRADAMP_HD bool squares_in_range(float squares) { return squares >= 1e-28f && squares <= 1e34f; }

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;  // sum of (x - mean)^2
};

// Moments of `count` values x from the sums of d = x - shift.
GRADAMP_HD Moments shifted_moments(double count, double shift, double sum_d, double sum_d2) {
  const double mean_d = sum_d / count;
  const double m2 = sum_d2 - sum_d * mean_d;
  return {count, shift + mean_d, m2 < 0.0 ? 0.0 : m2};
}

// Chan, Golub and LeVeque's pairwise update, `share` being b's part of the elements.
GRADAMP_HD Moments merge(const Moments& a, const Moments& b, double share) {
  const double delta = b.mean - a.mean;
  return {a.count + b.count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// A NaN or Inf on either side survives.
GRADAMP_HD Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0.0) return b;
  if (b.count == 0.0) return a;
  return merge(a, b, b.count / (a.count + b.count));
}

// The same for one set per rank of a group; every rank gets the result.
template <class Group>
GRADAMP_HD Moments merge_all(const Moments& mine, Group& group) {
  const double count = group.sum(mine.count);
  if (count == 0.0) return Moments{};
  const double mean = group.sum(mine.count * mine.mean) / count;
  const double delta = mine.mean - mean;
  return {count, mean, group.sum(mine.m2 + mine.count * delta * delta)};
}

// Sum of x^2.
GRADAMP_HD double energy(const Moments& m) { return m.m2 + m.count * m.mean * m.mean; }

}  // namespace gradamp
