// What the torch side hands to a step. One engine serves one set of parameters on one device.
#pragma once

#include <cstdint>

#include "rules/common.h"
#include "rules/state.h"
#include "rules/update.h"

namespace gradamp {

// Where the state lives; the addresses never change.
struct StateView {
  GlobalState* global;
  LayerState* layers;
  float* sketch;    // [2][buckets]
  int64_t buckets;
  int32_t* parity;  // [measured tensors]: the row that holds the tensor's running means
};

// What an optimizer updates of a tensor, in the gradient's dtype and in its memory order.
struct UpdateTensor {
  void* parameter;
  void* states[kUpdateStates];  // as many as update_states() says
  float* steps;                 // updates before this one: of each tensor its own
  int32_t group;
};

struct UpdateInputs {
  const UpdateTensor* tensors;  // one per tensor; read only where there is a gradient
  const Hyper* groups;
  int32_t num_groups;
};

struct StepInputs {
  void* const* gradients;   // one per tensor; null: no gradient this step
  const DType* dtypes;
  const float* grad_scale;  // null: 1
  float* found_inf;         // null: not asked for
  bool unscale;
  Turn turn;
  uint8_t* written;         // out, one per tensor: the gradient, or the parameter, may have been
  // Not null: the step ends with these sums, one for each layer and one for the excluded
  // tensors, which may be left as it is. Gradients are multiplied if that needs no sums, and
  // each tensor's new running means are where the next parity will find them; nothing is
  // committed. If *found_inf is not 0 nothing at all is written.
  Sums* sums;
  // Not null: gradients stay as they are; wherever they would be multiplied, and where the
  // multiplier is 1, the parameters of all tensors with a gradient are updated instead, and one is
  // added to their `steps`. A step of an engine without layers does nothing else.
  const UpdateInputs* update;
};

// For tests: what a step must not depend on. Only engines with something to vary listen.
struct Stress {
  int32_t blocks = 0;       // of the grid; 0: as many as are useful
  bool cooperative = true;  // false: two phases are two launches
  bool poison = false;      // the workspace is filled with NaN before each step
};

class Engine {
 public:
  virtual ~Engine() = default;
  virtual void step(const StepInputs& in) = 0;
  // Whatever the caller does next, where it would step now, sees what the last step left.
  virtual void settle() {}
  // The next step sees what the caller wrote to the state, where it would step now.
  virtual void written() {}
  virtual void stress(const Stress&) {}
};

}  // namespace gradamp
