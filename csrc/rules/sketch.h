// The sketch: signed sums over runs of consecutive elements, and their running means.
#pragma once

#include "common.h"

namespace gradamp {

// The length of a tensor's buckets as a power of two, by the tensor's elements.
GRADAMP_HD int32_t bucket_log2(int64_t numel) {
  return numel < 4096 ? 0 : numel < 131072 ? 4 : 9;
}

// Bit (i mod 32) of sign_word(i / 32) set means that element i enters with a minus.
// The word is MurmurHash3's 32-bit finaliser.
GRADAMP_HD uint32_t sign_word(uint32_t word) {
  word ^= word >> 16;
  word *= 0x85ebca6bu;
  word ^= word >> 13;
  word *= 0xc2b2ae35u;
  word ^= word >> 16;
  return word;
}

// The same for the i-th element from `first_word` on.
GRADAMP_HD bool sign_is_minus(uint32_t first_word, int i) {
  return (sign_word(first_word + (i >> 5)) >> (i & 31)) & 1u;
}

// Sums over buckets: s is this step's bucket, h its running mean before this step. Real is
// double, or a vector of doubles with one set of sums in each lane.
template <class Real>
struct SketchSumsOf {
  Real power{};   // sum of s^2
  Real dot{};     // sum of s * h
  Real before{};  // sum of h^2
  Real after{};   // sum of h^2, h being the mean after this step

  GRADAMP_HD_MEMBER void add(Real s, Real h, Real next) {
    power += s * s;
    dot += s * h;
    before += h * h;
    after += next * next;
  }
};

using SketchSums = SketchSumsOf<double>;

GRADAMP_HD void add(SketchSums& a, const SketchSums& b) {
  a.power += b.power;
  a.dot += b.dot;
  a.before += b.before;
  a.after += b.after;
}

// The same for one set of sums per rank of a group; every rank gets the result.
template <class Group>
GRADAMP_HD SketchSums add_all(const SketchSums& mine, Group& group) {
  return {group.sum(mine.power), group.sum(mine.dot), group.sum(mine.before),
          group.sum(mine.after)};
}

template <class Real>
GRADAMP_HD Real moved_mean(Real s, Real h, double weight) {
  return h + weight * (s - h);
}

// Folds one bucket in and returns its new running mean.
GRADAMP_HD float update_bucket(float s, float h, double weight, SketchSums& sums) {
  const double sd = s, hd = h;
  const float next = static_cast<float>(moved_mean(sd, hd, weight));
  sums.add(sd, hd, next);
  return next;
}

}  // namespace gradamp
