// What an optimizer does with one element once its multiplier is known. SGD: the multiplier acts
// on the gradient. Adam: on the update, while the moments take the plain gradient.
//
// Host and device run this same code, on one element or on a vector of them: Math<V> says what a
// type needs beside + - * /.
#pragma once

#include "state.h"

namespace gradamp {

enum class UpdateRule : int32_t { kSgd = 0, kAdam = 1 };

// Of one parameter group.
struct Hyper {
  UpdateRule rule;
  int32_t maximize;
  int32_t nesterov;        // SGD
  int32_t amsgrad;         // Adam
  int32_t decoupled;       // Adam: the decay acts on the parameter, not on the gradient
  int32_t rate_is_double;  // the dtype behind `rate`
  const void* rate;        // the learning rate, where the parameters are; null: `lr` holds it
  double lr;
  double weight_decay;
  double beta1;            // SGD: momentum
  double beta2;            // SGD: dampening
  double eps;              // Adam
};

// A tensor's optimizer state: its momentum buffer, or its moments and, with amsgrad, the largest
// of the second.
constexpr int kUpdateStates = 3;
GRADAMP_HD int update_states(const Hyper& h) {
  if (h.rule == UpdateRule::kSgd) return h.beta1 != 0.0 ? 1 : 0;
  return h.amsgrad ? 3 : 2;
}

// What is the same for all elements of a tensor in one step; T is what is computed in.
template <class T>
struct UpdateTerms {
  T gradient;  // what gradients are multiplied by: SGD's multiplier, the scale's inverse, the sign
  T coupled;   // of the parameter, added to its gradient
  T faded;     // of the parameter, taken from it
  T keep1, add1;  // of a first moment or momentum, and of the gradient in it
  T keep2, add2;  // of a second moment, and of the squared gradient in it
  T ahead;     // SGD: of the momentum, in what is stepped by; 1 without Nesterov
  T plain;     // SGD: of the gradient, in what is stepped by; 0 with momentum but for Nesterov
  T rate;      // Adam: with the multiplier and both bias corrections in it
  T eps;       // with the second bias correction in it
};

GRADAMP_HD double learning_rate(const Hyper& h) {
  if (!h.rate) return h.lr;
  return h.rate_is_double ? *static_cast<const double*>(h.rate)
                          : static_cast<double>(*static_cast<const float*>(h.rate));
}

// Of a whole exponent, which is what counts of updates are: a few products, where pow() takes
// hundreds of instructions on a GPU.
GRADAMP_HD double power(double base, double exponent) {
  double result = 1.0;
  for (auto left = static_cast<uint64_t>(exponent); left != 0; left >>= 1, base *= base)
    if (left & 1) result *= base;
  return result;
}

// `multiplier`: the layer's; `inverse`: of the gradients' scale, 1 where they are not scaled;
// `steps`: updates of the tensor before this one. SGD's first takes the gradient for momentum.
template <class T>
GRADAMP_HD UpdateTerms<T> update_terms(const Hyper& h, double multiplier, double inverse,
                                       double steps) {
  const double lr = learning_rate(h), sign = h.maximize ? -1.0 : 1.0;
  UpdateTerms<T> t = {};
  if (h.rule == UpdateRule::kSgd) {
    t.gradient = static_cast<T>(sign * static_cast<T>(inverse * multiplier));
    t.coupled = static_cast<T>(h.weight_decay);
    t.keep1 = static_cast<T>(steps == 0.0 ? 0.0 : h.beta1);
    t.add1 = static_cast<T>(steps == 0.0 ? 1.0 : 1.0 - h.beta2);
    t.ahead = static_cast<T>(h.nesterov ? h.beta1 : 1.0);
    t.plain = static_cast<T>(h.nesterov ? 1.0 : 0.0);
    t.rate = static_cast<T>(lr);
    return t;
  }
  const double corrected1 = 1.0 - power(h.beta1, steps + 1.0);
  const double corrected2 = sqrt(1.0 - power(h.beta2, steps + 1.0));
  t.gradient = static_cast<T>(sign * inverse);
  t.coupled = static_cast<T>(h.decoupled ? 0.0 : h.weight_decay);
  t.faded = static_cast<T>(h.decoupled ? lr * h.weight_decay : 0.0);
  t.keep1 = static_cast<T>(h.beta1);
  t.add1 = static_cast<T>(1.0 - h.beta1);
  t.keep2 = static_cast<T>(h.beta2);
  t.add2 = static_cast<T>(1.0 - h.beta2);
  t.rate = static_cast<T>(lr * multiplier * corrected2 / corrected1);
  t.eps = static_cast<T>(h.eps * corrected2);
  return t;
}

// A product that is rounded before anything is added to it: that makes SGD equal, bit for bit, to
// SGD on gradients that were multiplied before.
GRADAMP_HD float rounded_product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  volatile float product = x * y;
  return product;
#endif
}
GRADAMP_HD double rounded_product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  volatile double product = x * y;
  return product;
#endif
}

// Quotients and roots. A GPU's own division and sqrt() branch in every element and call what costs
// registers; these are an estimate and Newton's steps, rounded as IEEE has it but for the last bit
// of a few. Where a step gives NaN the estimate was infinite or zero, as the result is.
#if defined(__CUDA_ARCH__)
template <class T>
__device__ inline T quotient_from(T x, T y, T inverse) {
  const T near = x * inverse, result = fma(fma(-near, y, x), inverse, near);
  return result == result ? result : near;
}
template <class T>
__device__ inline T root_from(T x, T inverse, T least) {
  const T near = x * inverse, root = fma(fma(-near, near, x), T(0.5) * inverse, near);
  return (x >= T(0) && x < least) || x == T(INFINITY) ? x : root;
}
__device__ inline float quotient(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return quotient_from(x, y, inverse);
}
__device__ inline float square_root(float x) { return root_from(x, rsqrtf(x), 1e-45f); }

// The estimates of 20 bits become as good as fp64 in two steps.
__device__ inline double quotient(double x, double y) {
  double inverse;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(y));
  const double estimate = inverse;
  for (int i = 0; i < 2; ++i) inverse = fma(fma(-inverse, y, 1.0), inverse, inverse);
  return quotient_from(x, y, inverse == inverse ? inverse : estimate);
}
__device__ inline double square_root(double x) {
  double inverse;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"(x));
  for (int i = 0; i < 2; ++i)
    inverse = fma(fma(-inverse * x, inverse, 1.0), 0.5 * inverse, inverse);
  return root_from(x, inverse, 0x1p-1022);
}
#else
template <class V>
GRADAMP_HD V quotient(V x, V y) {
  return x / y;
}
GRADAMP_HD float square_root(float x) { return sqrtf(x); }
GRADAMP_HD double square_root(double x) { return sqrt(x); }
#endif

namespace {  // as GRADAMP_HD: not to be merged

template <class V>
struct Math {
  GRADAMP_HD_MEMBER static V product(V x, V y) { return rounded_product(x, y); }
  GRADAMP_HD_MEMBER static V root(V x) { return square_root(x); }
  GRADAMP_HD_MEMBER static V larger(V x, V y) { return x < y ? y : x; }
};

}  // namespace

// a x + y. On a GPU rounded once and always the same way: left to itself the compiler chooses anew
// wherever this is inlined, and the same update would differ from one kernel to another.
template <class T, class V>
GRADAMP_HD V multiply_add(T a, V x, V y) {
#if defined(__CUDA_ARCH__)
  return fma(a, x, y);
#else
  return a * x + y;
#endif
}

// p: the parameter's elements; g: the gradient's, as backward() left them.
template <bool kMomentum, class V, class T>
GRADAMP_HD void update_sgd(const UpdateTerms<T>& t, V& p, V g, V& momentum) {
  g = Math<V>::product(g, t.gradient);
  g = multiply_add(t.coupled, p, g);
  if (kMomentum) {
    momentum = multiply_add(t.keep1, momentum, t.add1 * g);
    g = multiply_add(t.plain, g, t.ahead * momentum);
  }
  p = multiply_add(-t.rate, g, p);
}

template <bool kAmsgrad, class V, class T>
GRADAMP_HD void update_adam(const UpdateTerms<T>& t, V& p, V g, V& first, V& second, V& largest) {
  g = Math<V>::product(g, t.gradient);
  g = multiply_add(t.coupled, p, g);
  first = multiply_add(t.keep1, first, t.add1 * g);
  second = multiply_add(t.add2 * g, g, t.keep2 * second);
  if (kAmsgrad) largest = Math<V>::larger(largest, second);
  const V root = Math<V>::root(kAmsgrad ? largest : second);
  p = multiply_add(-t.faded, p, p);
  p = p - quotient(t.rate * first, root + t.eps);
}

}  // namespace gradamp
