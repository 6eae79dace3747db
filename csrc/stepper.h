// The torch side of a step: reads .grad from the parameters' Python objects, checks that
// every gradient is of the usual kind, and hands the addresses to an engine.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "engine.h"
#include "tiles.h"
#include "updater.h"

namespace gradamp {

// What a step did; all but kDone: nothing. kRebind: the model has changed. kMissing: it may
// have, for a gradient is missing. kUnusual: Python looks closer, for it holds the rules of what
// a gradient may be and the errors that name a parameter. kMembers: it looks closer too, for a
// member of some layer joins, leaves, lies in another memory order, or has lacked a gradient for
// long; then it asks for the step again. kStateless: likewise, for an optimizer's state is still to
// be made. The others are those of call.Outcome.
enum class Outcome : int {
  kDone = 0,
  kEmpty = 1,
  kRebind = 2,
  kMissing = 3,
  kUnusual = 4,
  kMembers = 5,
  kStateless = 6
};

class __attribute__((visibility("hidden"))) Stepper {
 public:
  // `tensors` has (layer, numel, bucket_log2, first_bucket, first_word) for each parameter.
  Stepper(std::vector<py::object> parameters, std::vector<py::object> watched,
       const std::vector<std::tuple<int32_t, int64_t, int32_t, int64_t, uint32_t>>& tensors,
       int64_t num_layers, const py::dict& options, at::Tensor values, at::Tensor sketch,
       at::Tensor parity, const py::buffer& members, const py::buffer& lacking);

  // Parameters that are frozen, or whose byte in `only` is 0, count as having no gradient.
  // Unless `walked`, a parameter that had a gradient on its last step and has none now ends in
  // kMissing. `members_known`: who is a member has been looked at in Python. With `update`, null
  // or begun, parameters are updated; where there is no layer, those that are frozen as well.
  Outcome step(const std::optional<at::Tensor>& grad_scale,
               const std::optional<at::Tensor>& found_inf, bool unscale,
               const std::optional<py::bytes>& only, bool walked, Turn turn, Updater* update,
               bool members_known);

  // The same with flat dense gradients given, one for each parameter, and with `update` what is
  // updated for each. `sums`, fp64 [layers + 1, 8]: StepInputs.sums.
  Outcome step_gradients(std::vector<std::optional<at::Tensor>> gradients,
                         const std::optional<at::Tensor>& grad_scale,
                         const std::optional<at::Tensor>& found_inf, bool unscale, Turn turn,
                         const std::optional<at::Tensor>& sums, Updater* update,
                         const std::vector<std::optional<Updater::Given>>& updated);

  // Whatever is done next on the current stream sees the state as the last step left it.
  void settle() { engine_->settle(); }
  // The next step sees what was written to the state on the current stream.
  void written() { engine_->written(); }

  void stress(const Stress& stress) { engine_->stress(stress); }

 private:
  class Exclusive;
  Outcome collect(const char* only, bool walked, Updater* update);
  // Takes note of who is a member of its layer; false: Python has to.
  bool look_at_members(const char* only);
  bool lies_as_before(size_t index) const;
  // False: not a gradient that the engine can take as it is.
  bool take(size_t index, const at::Tensor& gradient);
  Outcome run(const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale, Turn turn,
              const std::optional<at::Tensor>& sums, Updater* update);
  // Whether two gradients share memory. Looked at only when addresses are not those of before.
  bool overlap();
  void release();

  std::vector<py::object> parameters_;
  std::vector<py::object> watched_;
  std::vector<int64_t> numel_;
  std::vector<uint8_t> had_gradient_;
  std::vector<int32_t> layer_;           // of each tensor; -1: excluded
  py::buffer_info members_, lacking_;    // `flags` and `lacking` of model/members.py
  std::vector<std::vector<int64_t>> strides_;  // of gradients whose flag is 2, when last looked at
  int64_t sums_numel_;
  bool alone_;  // no layer: an optimizer's update without amplifier
  at::Tensor values_, sketch_, parity_;
  std::unique_ptr<Engine> engine_;

  // These hold the step under way; the gradients are let go when it ends.
  std::atomic<bool> stepping_ = false;
  std::vector<at::Tensor> gradients_;
  std::vector<void*> addresses_;
  std::vector<DType> dtypes_;
  std::vector<uint8_t> written_;
  std::vector<void*> apart_;  // the addresses that overlap() looked at last
};

}  // namespace gradamp
