#include "gradients.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace gradamp {

bool is_subclass(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (impl->is_python_dispatch()) return true;
  PyObject* object = impl->pyobj_slot()->load_pyobj();
  return object && !THPVariable_CheckExact(object);
}

bool share_memory(const std::vector<at::Tensor>& tensors) {
  std::vector<std::pair<const char*, size_t>> stretches;
  for (const at::Tensor& tensor : tensors)
    if (tensor.defined() && tensor.numel() > 0)
      stretches.emplace_back(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
  std::sort(stretches.begin(), stretches.end());
  for (size_t i = 1; i < stretches.size(); ++i)
    if (stretches[i - 1].first + stretches[i - 1].second > stretches[i].first) return true;
  return false;
}

KnownGradients::Known::Known(const at::Tensor& gradient)
    : dtype(gradient.scalar_type()),
      device(gradient.device()),
      sizes(gradient.sizes().vec()),
      strides(gradient.strides().vec()) {}

bool KnownGradients::Known::is_like(const at::Tensor& gradient) const {
  return gradient.scalar_type() == dtype && gradient.device() == device &&
         gradient.layout() == at::kStrided && gradient.sizes() == sizes &&
         gradient.strides() == strides && !gradient.is_neg() && !gradient.is_conj() &&
         !gradient.is_inference() && !is_subclass(gradient);
}

KnownGradients::KnownGradients(std::vector<py::object> parameters,
                               const std::vector<std::optional<at::Tensor>>& gradients,
                               std::vector<int64_t> tags, bool frozen_too)
    : parameters_(std::move(parameters)), tags_(std::move(tags)), frozen_too_(frozen_too) {
  TORCH_CHECK_VALUE(gradients.size() == parameters_.size() && tags_.size() == parameters_.size(),
                    "one gradient or None, and one tag, for each parameter");
  for (const std::optional<at::Tensor>& gradient : gradients)
    known_.push_back(gradient ? std::optional(Known(*gradient)) : std::nullopt);
}

std::optional<KnownGradients::Words> KnownGradients::read(const std::optional<py::bytes>& only,
                                                          bool apart) {
  const char* const counts = only ? PyBytes_AS_STRING(only->ptr()) : nullptr;
  TORCH_CHECK_VALUE(!only || PyBytes_GET_SIZE(only->ptr()) == static_cast<int64_t>(known_.size()),
                    "`only` needs one byte for each parameter");
  Words found;
  for (size_t i = 0; i < known_.size(); ++i) {
    const at::Tensor& parameter = THPVariable_Unpack(parameters_[i].ptr());
    const at::Tensor& gradient = parameter.grad();
    if (!known_[i]) {
      if (gradient.defined() && (!counts || counts[i])) return std::nullopt;
      found.first.push_back(0);
      continue;
    }
    if (!gradient.defined() || !(frozen_too_ || parameter.requires_grad()) ||
        !known_[i]->is_like(gradient))
      return std::nullopt;
    const auto address = reinterpret_cast<int64_t>(gradient.const_data_ptr());
    found.first.push_back(tags_[i] < 0 ? 0 : address | tags_[i]);
    found.second.push_back(gradient);
  }
  if (apart && found.first != apart_) {
    if (share_memory(found.second)) return std::nullopt;
    apart_ = found.first;
  }
  return found;
}

}  // namespace gradamp
