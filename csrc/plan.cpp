#include "plan.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

#include "cpu/step.h"
#if defined(GRADAMP_WITH_CUDA)
#include "cuda/engine.h"
#endif

namespace gradamp {
namespace {

std::vector<Window> read_windows(const py::dict& options) {
  std::vector<Window> windows;
  for (const py::handle& item : options["windows"]) {
    const auto window = item.cast<std::tuple<double, double, double>>();
    windows.push_back({std::get<0>(window), std::get<1>(window), std::get<2>(window)});
  }
  return windows;
}

Config read_config(const py::dict& options, const std::vector<Window>& windows) {
  const auto number = [&](const char* name) { return options[name].cast<double>(); };
  const auto choice = [&](const char* name) { return options[name].cast<int32_t>(); };
  Config c;
  c.measure = static_cast<Measure>(choice("measure"));
  c.threshold = static_cast<Threshold>(choice("threshold"));
  c.select = static_cast<Select>(choice("select"));
  c.schedule = static_cast<ScheduleUnit>(choice("schedule_unit"));
  c.windows = windows.data();
  c.num_windows = static_cast<int32_t>(windows.size());
  c.exact = options["exact"].cast<bool>();
  c.match_norm = options["match_norm"].cast<bool>();
  c.max_norm = number("max_norm");
  c.threshold_value = number("threshold_value");
  c.decay = number("decay");
  c.min_steps = number("min_steps");
  c.refresh = static_cast<int64_t>(number("refresh"));
  c.seed = options["seed"].cast<uint32_t>();
  return c;
}

cpu::Threads torch_threads() {
  return {[] { return at::get_num_threads(); },
          [](int workers, const std::function<void()>& body) {
            at::parallel_for(0, workers, 1, [&](int64_t, int64_t) { body(); });
          }};
}

std::optional<DType> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kDouble:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

bool is_subclass(const at::Tensor& tensor) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (impl->is_python_dispatch()) return true;
  PyObject* object = impl->pyobj_slot()->load_pyobj();
  return object && !THPVariable_CheckExact(object);
}

}  // namespace

Plan::Plan(std::vector<py::object> parameters, std::vector<py::object> watched,
           const std::vector<std::tuple<int32_t, int64_t, int32_t, int64_t, uint32_t>>& tensors,
           int64_t num_layers, const py::dict& options, at::Tensor values, at::Tensor sketch,
           at::Tensor parity)
    : parameters_(std::move(parameters)),
      watched_(std::move(watched)),
      had_gradient_(tensors.size(), 0),
      values_(std::move(values)),
      sketch_(std::move(sketch)),
      parity_(std::move(parity)),
      gradients_(tensors.size()),
      addresses_(tensors.size(), nullptr),
      dtypes_(tensors.size(), DType::kFloat32),
      written_(tensors.size(), 0) {
  TORCH_CHECK(parameters_.size() == tensors.size(), "parameters and tensors differ in length");
  std::vector<TensorInfo> infos;
  for (const auto& [layer, numel, bucket_log2, first_bucket, first_word] : tensors) {
    infos.push_back({numel, 0, first_bucket, layer, bucket_log2, first_word});
    numel_.push_back(numel);
  }
  TORCH_CHECK(values_.numel() == kGlobalFields + num_layers * kLayerFields,
              "the state has ", values_.numel(), " values; this build of the extension wants ",
              kGlobalFields + num_layers * kLayerFields, ": rebuild gradamp_fast");
  double* const values_data = values_.data_ptr<double>();
  const StateView state = {reinterpret_cast<GlobalState*>(values_data),
                           reinterpret_cast<LayerState*>(values_data + kGlobalFields),
                           sketch_.data_ptr<float>(), sketch_.size(1), parity_.data_ptr<int32_t>()};
  const std::vector<Window> windows = read_windows(options);
  const Config config = read_config(options, windows);
  const auto layout = [&](int64_t tile_elements) {
    return Layout(infos, num_layers, tile_elements);
  };
#if defined(GRADAMP_WITH_CUDA)
  if (values_.is_cuda()) {
    engine_ = cuda::make_engine(layout(cuda::kTileElements), config, state, values_.device());
    return;
  }
#endif
  TORCH_CHECK(values_.is_cpu(), "this build of the extension cannot serve ", values_.device());
  engine_ = cpu::make_engine(layout(cpu::kTileElements), config, state, torch_threads());
}

bool Plan::take(size_t index, const at::Tensor& gradient) {
  const std::optional<DType> dtype = dtype_of(gradient);
  if (!dtype || gradient.layout() != at::kStrided || gradient.device() != values_.device() ||
      gradient.numel() != numel_[index] || gradient.is_neg() || is_subclass(gradient) ||
      !gradient.unsafeGetTensorImpl()->is_non_overlapping_and_dense())
    return false;
  gradients_[index] = gradient;
  addresses_[index] = gradient.data_ptr();
  dtypes_[index] = *dtype;
  return true;
}

Outcome Plan::collect(const char* only, bool walked) {
  for (const py::object& parameter : watched_)
    if (THPVariable_Unpack(parameter.ptr()).requires_grad()) return Outcome::kRebind;
  bool any = false;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (only && !only[i]) continue;
    const at::Tensor& parameter = THPVariable_Unpack(parameters_[i].ptr());
    const at::Tensor& gradient = parameter.grad();
    if (parameter.requires_grad() && gradient.defined()) {
      if (!take(i, gradient)) return Outcome::kUnusual;
      any = true;
    } else if (had_gradient_[i] && !walked) {
      return Outcome::kRebind;
    }
  }
  return any ? Outcome::kDone : Outcome::kEmpty;
}

void Plan::release() {
  for (at::Tensor& gradient : gradients_) gradient.reset();
  std::fill(addresses_.begin(), addresses_.end(), nullptr);
}

Outcome Plan::step(const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf, bool unscale,
                   const std::optional<py::bytes>& only, bool walked) {
  const char* mask = only ? PyBytes_AS_STRING(only->ptr()) : nullptr;
  TORCH_CHECK(!only || PyBytes_GET_SIZE(only->ptr()) == static_cast<int64_t>(parameters_.size()),
              "`only` needs one byte for each parameter");
  const Outcome outcome = collect(mask, walked);
  if (outcome != Outcome::kDone) {
    release();
    return outcome;
  }
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (!mask || mask[i]) had_gradient_[i] = gradients_[i].defined();
  return run(grad_scale, found_inf, unscale, std::nullopt);
}

Outcome Plan::step_gradients(std::vector<std::optional<at::Tensor>> gradients,
                             const std::optional<at::Tensor>& grad_scale,
                             const std::optional<at::Tensor>& found_inf, bool unscale,
                             const std::optional<at::Tensor>& sums) {
  TORCH_CHECK(gradients.size() == parameters_.size(), "one gradient or None for each parameter");
  for (size_t i = 0; i < gradients.size(); ++i) {
    TORCH_CHECK(!gradients[i] || take(i, *gradients[i]),
                "gradient ", i, " is not flat, dense and real");
    if (gradients[i]) had_gradient_[i] = 1;
  }
  return run(grad_scale, found_inf, unscale, sums);
}

Outcome Plan::run(const std::optional<at::Tensor>& grad_scale,
                  const std::optional<at::Tensor>& found_inf, bool unscale,
                  const std::optional<at::Tensor>& sums) {
  struct Release {
    Plan& plan;
    ~Release() { plan.release(); }
  } release_at_end{*this};
  {
    py::gil_scoped_release unlocked;
    engine_->step({addresses_.data(), dtypes_.data(),
                   grad_scale ? grad_scale->const_data_ptr<float>() : nullptr,
                   found_inf ? found_inf->mutable_data_ptr<float>() : nullptr, unscale,
                   written_.data(),
                   sums ? reinterpret_cast<LayerSums*>(sums->mutable_data_ptr<double>()) : nullptr});
  }
  for (size_t i = 0; i < gradients_.size(); ++i)
    if (written_[i]) gradients_[i].unsafeGetTensorImpl()->bump_version();
  if (found_inf) found_inf->unsafeGetTensorImpl()->bump_version();
  return Outcome::kDone;
}

}  // namespace gradamp
