// An optimizer's update of one vector of elements. For the files that are compiled once for each
// instruction set.
#pragma once

#include "tile.h"
#include "vec.h"

namespace gradamp {
namespace {

// Rounded before the compiler can fuse an addition with it.
template <>
struct Math<cpu::f32v> {
  static cpu::f32v product(cpu::f32v x, float y) {
    cpu::f32v rounded = x * y;
#if defined(__x86_64__)
    __asm__("" : "+x"(rounded));
#else
    __asm__("" : "+m"(rounded));
#endif
    return rounded;
  }
  static cpu::f32v root(cpu::f32v x) { return cpu::root(x); }
  static cpu::f32v larger(cpu::f32v x, cpu::f32v y) { return cpu::larger(x, y); }
};

// The terms in fp32, each rounded once.
UpdateTerms<float> narrowed(const UpdateTerms<double>& t) {
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(t.gradient), f(t.coupled), f(t.faded), f(t.keep1), f(t.add1), f(t.keep2), f(t.add2),
          f(t.ahead),    f(t.plain),   f(t.rate),  f(t.eps)};
}

}  // namespace

namespace cpu {
namespace {

// By how many states there are, the rule is known as well.
template <int kStates, class V, class T>
inline __attribute__((always_inline)) void update_by(const UpdateTerms<T>& t, V& p, V g,
                                                     V (&x)[kUpdateStates]) {
  if constexpr (kStates < 2) {
    update_sgd<kStates == 1>(t, p, g, x[0]);
  } else {
    update_adam<kStates == 3>(t, p, g, x[0], x[1], x[2]);
  }
}

// Updates the elements of a tile, not fp64, for which their gradients are given.
template <int kStates, class T>
class Updating {
 public:
  explicit Updating(const UpdateTile& tile)
      : parameter_(static_cast<T*>(tile.parameter)), terms_(narrowed(*tile.terms)) {
    for (int s = 0; s < kStates; ++s) states_[s] = static_cast<T*>(tile.states[s]);
  }

  // A whole vector from element i on.
  void operator()(int64_t i, f32v gradient) const {
    f32v p = load(parameter_ + i), x[kUpdateStates];
    for (int s = 0; s < kStates; ++s) x[s] = load(states_[s] + i);
    update_by<kStates>(terms_, p, gradient, x);
    store(parameter_ + i, p);
    for (int s = 0; s < kStates; ++s) store(states_[s] + i, x[s]);
  }

  // The last elements, fewer than a vector.
  void last(int64_t i, f32v gradient, int64_t lanes) const {
    f32v p = load_last(parameter_ + i, lanes), x[kUpdateStates];
    for (int s = 0; s < kStates; ++s) x[s] = load_last(states_[s] + i, lanes);
    update_by<kStates>(terms_, p, gradient, x);
    store_last(parameter_ + i, p, lanes);
    for (int s = 0; s < kStates; ++s) store_last(states_[s] + i, x[s], lanes);
  }

 private:
  T* parameter_;
  T* states_[kUpdateStates];
  UpdateTerms<float> terms_;
};

}  // namespace
}  // namespace cpu
}  // namespace gradamp
