// What can be seen of gradients without a look at their elements.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

namespace gradamp {

bool is_subclass(const at::Tensor& tensor);

// Whether two of these dense tensors share memory. Undefined ones share none.
bool share_memory(const std::vector<at::Tensor>& tensors);

// Gradients that Python's reader looked at closely and accepted, without keeping them alive. Those
// that come later are not looked at again if they are as these were, but for their addresses.
class __attribute__((visibility("hidden"))) KnownGradients {
 public:
  // One gradient or none for each parameter, and what its word holds beside its address; -1 where
  // the word is 0. `frozen_too`: gradients of frozen parameters count.
  KnownGradients(std::vector<py::object> parameters,
                 const std::vector<std::optional<at::Tensor>>& gradients,
                 std::vector<int64_t> tags, bool frozen_too);

  using Words = std::pair<std::vector<int64_t>, std::vector<at::Tensor>>;
  // A word for each parameter, and the gradients that there are; nothing where one is not as it
  // was. `only`: call.Call.only. `apart`: nothing, too, where two share memory.
  std::optional<Words> read(const std::optional<py::bytes>& only, bool apart);

 private:
  struct Known {
    explicit Known(const at::Tensor& gradient);
    bool is_like(const at::Tensor& gradient) const;

    at::ScalarType dtype;
    at::Device device;
    std::vector<int64_t> sizes, strides;
  };

  std::vector<py::object> parameters_;
  std::vector<std::optional<Known>> known_;
  std::vector<int64_t> tags_;
  bool frozen_too_;
  std::vector<int64_t> apart_;  // the words of gradients that were seen to share no memory
};

}  // namespace gradamp
