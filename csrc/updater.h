// The torch side of an optimizer's update: finds the state of each parameter where the optimizer
// keeps it, and checks that everything lies in memory as the gradient does.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>
#include <vector>

#include "engine.h"

namespace gradamp {

class __attribute__((visibility("hidden"))) Updater {
 public:
  // The group of each tensor that a step is made of; -1: the optimizer does not hold it.
  explicit Updater(std::vector<int32_t> groups);

  // Before each step. `state` is the optimizer's, by parameter; `counts`, by parameter, holds what
  // counts its updates, where the state does not. `hypers`: reference.Hyper of each group.
  void begin(py::dict state, std::optional<py::dict> counts, const std::vector<py::tuple>& hypers);

  // kStateless: some state is missing, or not what a step can use. kUnusual: something lies in
  // another way than the gradient.
  enum class Found { kAll, kStateless, kUnusual };
  Found find(size_t index, const py::object& parameter, const at::Tensor& gradient);

  // The same with flat tensors given: a parameter, its states, and what counts its updates.
  using Given = std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor>;
  void give(size_t index, const Given& given);

  const UpdateInputs* inputs() const { return &inputs_; }
  // What the step wrote is marked so; then the tensors are let go.
  void end(const std::vector<uint8_t>& written);

 private:
  struct Held {
    at::Tensor parameter, steps;
    std::array<at::Tensor, kUpdateStates> states;
  };
  void hold(size_t index, const Held& held, int states);

  std::vector<int32_t> groups_;
  std::vector<Hyper> hypers_;
  std::vector<at::Tensor> rates_;  // that `hypers_` point to
  std::vector<UpdateTensor> tensors_;
  std::vector<Held> held_;
  py::dict state_;
  std::optional<py::dict> counts_;
  UpdateInputs inputs_ = {};
};

}  // namespace gradamp
