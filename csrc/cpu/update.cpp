// An optimizer's update of one tile. Compiled once for each instruction set, each time into a
// namespace of its own.
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

}  // namespace

namespace cpu::GRADAMP_ISA {
namespace {

// The terms in fp32, each rounded once.
UpdateTerms<float> narrowed(const UpdateTerms<double>& t) {
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(t.gradient), f(t.coupled), f(t.faded), f(t.keep1), f(t.add1), f(t.keep2), f(t.add2),
          f(t.ahead),    f(t.plain),   f(t.rate),  f(t.eps)};
}

// Elements as they lie in memory, a vector of them at a time; of fp64 one.
template <class T>
struct Elements {
  static constexpr int kAtOnce = kLanes;
  using Vector = f32v;
  static f32v get(const T* p) { return load(p); }
  static void put(T* p, f32v x) { store(p, x); }
};

template <>
struct Elements<double> {
  static constexpr int kAtOnce = 1;
  using Vector = double;
  static double get(const double* p) { return *p; }
  static void put(double* p, double x) { *p = x; }
};

// `rule` is called with the parameter's elements, the gradient's and those of kStates states.
template <int kStates, class T, class Rule>
void each_vector(const UpdateTile& tile, const Rule& rule) {
  using E = Elements<T>;
  using V = typename E::Vector;
  const T* const gradient = static_cast<const T*>(tile.gradient);
  T* const parameter = static_cast<T*>(tile.parameter);
  T* states[kUpdateStates];
  for (int s = 0; s < kStates; ++s) states[s] = static_cast<T*>(tile.states[s]);

  int64_t i = 0;
  for (; i + E::kAtOnce <= tile.count; i += E::kAtOnce) {
    V p = E::get(parameter + i);
    V x[kUpdateStates];
    for (int s = 0; s < kStates; ++s) x[s] = E::get(states[s] + i);
    rule(p, E::get(gradient + i), x);
    E::put(parameter + i, p);
    for (int s = 0; s < kStates; ++s) E::put(states[s] + i, x[s]);
  }
  if constexpr (E::kAtOnce > 1) {
    const int64_t left = tile.count - i;
    if (left == 0) return;
    const auto put_last = [&](T* to, V values) {
      T last[E::kAtOnce];
      E::put(last, values);
      std::memcpy(to + i, last, left * sizeof(T));
    };
    V p = load_last(parameter + i, left);
    V x[kUpdateStates];
    for (int s = 0; s < kStates; ++s) x[s] = load_last(states[s] + i, left);
    rule(p, load_last(gradient + i, left), x);
    put_last(parameter, p);
    for (int s = 0; s < kStates; ++s) put_last(states[s], x[s]);
  }
}

template <class T, class C>
void update_elements(const UpdateTile& tile, const UpdateTerms<C>& t) {
  using V = typename Elements<T>::Vector;
  const int states = update_states(*tile.hyper);
  if (states == 0) {
    each_vector<0, T>(tile, [&](V& p, V g, V* x) { update_sgd<false>(t, p, g, x[0]); });
  } else if (states == 1) {
    each_vector<1, T>(tile, [&](V& p, V g, V* x) { update_sgd<true>(t, p, g, x[0]); });
  } else if (states == 2) {
    each_vector<2, T>(tile, [&](V& p, V g, V* x) { update_adam<false>(t, p, g, x[0], x[1], x[2]); });
  } else {
    each_vector<3, T>(tile, [&](V& p, V g, V* x) { update_adam<true>(t, p, g, x[0], x[1], x[2]); });
  }
}

}  // namespace

void update(const UpdateTile& tile) {
  switch (tile.dtype) {
    case DType::kFloat32:
      return update_elements<float>(tile, narrowed(*tile.terms));
    case DType::kBFloat16:
      return update_elements<bf16>(tile, narrowed(*tile.terms));
    case DType::kFloat16:
      return update_elements<fp16>(tile, narrowed(*tile.terms));
    case DType::kFloat64:
      return update_elements<double>(tile, *tile.terms);
  }
}

}  // namespace cpu::GRADAMP_ISA
}  // namespace gradamp
