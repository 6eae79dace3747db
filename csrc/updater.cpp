#include "updater.h"

#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace gradamp {
namespace {

// Names of a parameter's state in torch's optimizers, in the order of UpdateTensor::states.
PyObject* state_name(UpdateRule rule, int index) {
  static PyObject* const momentum = PyUnicode_InternFromString("momentum_buffer");
  static PyObject* const moments[kUpdateStates] = {PyUnicode_InternFromString("exp_avg"),
                                                   PyUnicode_InternFromString("exp_avg_sq"),
                                                   PyUnicode_InternFromString("max_exp_avg_sq")};
  return rule == UpdateRule::kSgd ? momentum : moments[index];
}

PyObject* steps_name() {
  static PyObject* const name = PyUnicode_InternFromString("step");
  return name;
}

// Null: not there, or no plain tensor.
const at::Tensor* tensor_at(PyObject* dictionary, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(dictionary, key);
  if (!found) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return nullptr;
  }
  return THPVariable_CheckExact(found) ? &THPVariable_Unpack(found) : nullptr;
}

bool lies_like(const at::Tensor& tensor, const at::Tensor& gradient) {
  return tensor.scalar_type() == gradient.scalar_type() && tensor.device() == gradient.device() &&
         tensor.layout() == at::kStrided && tensor.sizes() == gradient.sizes() &&
         !tensor.is_neg() && !tensor.is_inference() &&
         (tensor.strides() == gradient.strides() ||
          (tensor.is_contiguous() && gradient.is_contiguous()));
}

// In the order of reference.Hyper.
Hyper read_hyper(const py::tuple& given, std::vector<at::Tensor>& rates) {
  Hyper h = {};
  h.rule = given[0].cast<std::string>() == "sgd" ? UpdateRule::kSgd : UpdateRule::kAdam;
  if (THPVariable_Check(given[1].ptr())) {
    const at::Tensor& rate = THPVariable_Unpack(given[1].ptr());
    h.rate = rate.const_data_ptr();
    h.rate_is_double = rate.scalar_type() == at::kDouble;
    rates.push_back(rate);
  } else {
    h.lr = given[1].cast<double>();
  }
  h.weight_decay = given[2].cast<double>();
  h.beta1 = given[3].cast<double>();
  h.beta2 = given[4].cast<double>();
  h.eps = given[5].cast<double>();
  h.maximize = given[6].cast<bool>();
  h.nesterov = given[7].cast<bool>();
  h.amsgrad = given[8].cast<bool>();
  h.decoupled = given[9].cast<bool>();
  return h;
}

}  // namespace

Updater::Updater(std::vector<int32_t> groups)
    : groups_(std::move(groups)), tensors_(groups_.size()), held_(groups_.size()) {}

void Updater::begin(py::dict state, std::optional<py::dict> counts,
                    const std::vector<py::tuple>& hypers) {
  state_ = std::move(state);
  counts_ = std::move(counts);
  hypers_.clear();
  rates_.clear();
  for (const py::tuple& hyper : hypers) hypers_.push_back(read_hyper(hyper, rates_));
  inputs_ = {tensors_.data(), hypers_.data(), static_cast<int32_t>(hypers_.size())};
}

Updater::Found Updater::find(size_t index, const py::object& parameter,
                             const at::Tensor& gradient) {
  TORCH_CHECK(groups_[index] >= 0, "gradient ", index, " is not the optimizer's");
  const Hyper& hyper = hypers_.at(groups_[index]);
  Held held;
  held.parameter = THPVariable_Unpack(parameter.ptr());
  if (!THPVariable_CheckExact(parameter.ptr()) || !lies_like(held.parameter, gradient))
    return Found::kUnusual;
  PyObject* const own = PyDict_GetItemWithError(state_.ptr(), parameter.ptr());
  if (!own && PyErr_Occurred()) throw py::error_already_set();
  const int states = update_states(hyper);
  for (int s = 0; s < states; ++s) {
    const at::Tensor* const state = own ? tensor_at(own, state_name(hyper.rule, s)) : nullptr;
    if (!state) return Found::kStateless;
    if (!lies_like(*state, gradient)) return Found::kUnusual;
    held.states[s] = *state;
  }
  const at::Tensor* steps = nullptr;
  if (counts_) {
    steps = tensor_at(counts_->ptr(), parameter.ptr());
  } else if (own) {
    steps = tensor_at(own, steps_name());
  }
  if (!steps || steps->scalar_type() != at::kFloat || steps->numel() != 1 ||
      steps->device() != gradient.device())
    return Found::kStateless;
  held.steps = *steps;
  hold(index, held, states);
  return Found::kAll;
}

void Updater::give(size_t index, const Given& given) {
  const auto& [parameter, states, steps] = given;
  const int expected = update_states(hypers_.at(groups_.at(index)));
  TORCH_CHECK_VALUE(static_cast<int>(states.size()) == expected, "tensor ", index, " has ",
                    states.size(), " states instead of ", expected);
  Held held;
  held.parameter = parameter;
  held.steps = steps;
  for (int s = 0; s < expected; ++s) held.states[s] = states[s];
  hold(index, held, expected);
}

void Updater::hold(size_t index, const Held& held, int states) {
  UpdateTensor& tensor = tensors_[index];
  tensor = {held.parameter.mutable_data_ptr(), {}, held.steps.mutable_data_ptr<float>(),
            groups_[index]};
  for (int s = 0; s < states; ++s) tensor.states[s] = held.states[s].mutable_data_ptr();
  held_[index] = held;
}

void Updater::end(const std::vector<uint8_t>& written) {
  const auto mark = [](const at::Tensor& tensor) {
    if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  };
  for (size_t i = 0; i < held_.size(); ++i) {
    if (written[i]) {
      mark(held_[i].parameter);
      mark(held_[i].steps);
      for (const at::Tensor& state : held_[i].states) mark(state);
    }
    held_[i] = {};
  }
  rates_.clear();
}

}  // namespace gradamp
