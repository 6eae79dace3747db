#include "stepper.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

#include "cpu/engine.h"
#include "gradients.h"
#if defined(GRADAMP_WITH_CUDA)
#include "cuda/engine.h"
#endif

namespace gradamp {
namespace {

// Bits of a byte of `only`, as model/gradients.py has them.
constexpr int kTrainable = 1, kFrozen = 2;

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
  c.grow = options["grow"].cast<bool>();
  c.max_factor = number("max_factor");
  return c;
}

// The engines size their buffers by these rules, and look nothing up in Python again.
void check_tensor(size_t index, const TensorInfo& info, int64_t row) {
  const int32_t least = bucket_log2(info.numel);  // of a part; that of its whole may be more
  TORCH_CHECK_VALUE(info.numel >= 0, "tensor ", index, " has numel ", info.numel);
  TORCH_CHECK_VALUE(
      info.bucket_log2 >= least &&
          (info.bucket_log2 == 0 || info.bucket_log2 == 4 || info.bucket_log2 == 9),
      "tensor ", index, " of ", info.numel, " elements has bucket_log2 ", info.bucket_log2,
      "; the bucket rule gives 0, 4 or 9, and ", least, " or more for so many elements");
  if (info.layer < 0) return;
  const int64_t buckets = (info.numel + (int64_t{1} << info.bucket_log2) - 1) >> info.bucket_log2;
  TORCH_CHECK_VALUE(info.first_bucket >= 0 && info.first_bucket + buckets <= row, "tensor ", index,
                    " has buckets ", info.first_bucket, " to ", info.first_bucket + buckets,
                    " in a sketch of ", row);
}

void check_state(const at::Tensor& values, const at::Tensor& sketch, const at::Tensor& parity,
                 int64_t num_layers, int64_t measured) {
  const int64_t numbers = kGlobalFields + num_layers * kLayerFields;
  TORCH_CHECK_VALUE(values.scalar_type() == at::kDouble && values.is_contiguous() &&
                        values.numel() == numbers,
                    "`values` must be ", numbers, " contiguous float64 numbers");
  TORCH_CHECK_VALUE(sketch.scalar_type() == at::kFloat && sketch.is_contiguous() &&
                        sketch.dim() == 2 && sketch.size(0) == 2,
                    "`sketch` must be contiguous float32 [2, buckets]");
  TORCH_CHECK_VALUE(parity.scalar_type() == at::kInt && parity.is_contiguous() &&
                        parity.numel() == measured,
                    "`parity` must be ", measured, " contiguous int32 numbers");
  TORCH_CHECK_VALUE(sketch.device() == values.device() && parity.device() == values.device(),
                    "`values`, `sketch` and `parity` must be on one device");
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

}  // namespace

Stepper::Stepper(std::vector<py::object> parameters, std::vector<py::object> watched,
           const std::vector<std::tuple<int32_t, int64_t, int32_t, int64_t, uint32_t>>& tensors,
           int64_t num_layers, const py::dict& options, at::Tensor values, at::Tensor sketch,
           at::Tensor parity, const py::buffer& members, const py::buffer& lacking)
    : parameters_(std::move(parameters)),
      watched_(std::move(watched)),
      had_gradient_(tensors.size(), 0),
      members_(members.request(true)),
      lacking_(lacking.request(true)),
      strides_(tensors.size()),
      sums_numel_((num_layers + 1) * kSumsColumns),
      values_(std::move(values)),
      sketch_(std::move(sketch)),
      parity_(std::move(parity)),
      gradients_(tensors.size()),
      addresses_(tensors.size(), nullptr),
      dtypes_(tensors.size(), DType::kFloat32),
      written_(tensors.size(), 0) {
  TORCH_CHECK_VALUE(parameters_.size() == tensors.size(),
                    "parameters and tensors differ in length");
  std::vector<TensorInfo> infos;
  int64_t measured = 0;
  for (const auto& [layer, numel, log2, first_bucket, first_word] : tensors) {
    infos.push_back({numel, 0, first_bucket, layer, log2, first_word, 0});
    numel_.push_back(numel);
    layer_.push_back(layer);
    measured += layer >= 0;
  }
  check_state(values_, sketch_, parity_, num_layers, measured);
  TORCH_CHECK_VALUE(members_.itemsize == 1 && members_.size == measured,
                    "`members` must be ", measured, " bytes");
  TORCH_CHECK_VALUE(lacking_.itemsize == 8 && lacking_.size == num_layers,
                    "`lacking` must be ", num_layers, " int64 numbers");
  for (size_t i = 0; i < infos.size(); ++i) check_tensor(i, infos[i], sketch_.size(1));
  double* const values_data = values_.data_ptr<double>();
  const StateView state = {reinterpret_cast<GlobalState*>(values_data),
                           reinterpret_cast<LayerState*>(values_data + kGlobalFields),
                           sketch_.data_ptr<float>(), sketch_.size(1), parity_.data_ptr<int32_t>()};
  const std::vector<Window> windows = read_windows(options);
  const Config config = read_config(options, windows);
#if defined(GRADAMP_WITH_CUDA)
  if (values_.is_cuda()) {
    engine_ = cuda::make_engine(Tiling(infos, num_layers, cuda::tile_elements), config, state,
                                {values_, sketch_, parity_}, values_.device());
    return;
  }
#endif
  TORCH_CHECK(values_.is_cpu(), "this build of the extension cannot serve ", values_.device());
  engine_ = cpu::make_engine(Tiling(infos, num_layers, cpu::tile_elements), config, state,
                             torch_threads());
}

// One step at a time: another thread may come in while the engine runs without Python's lock.
class Stepper::Exclusive {
 public:
  explicit Exclusive(Stepper& stepper) : stepper_(stepper) {
    TORCH_CHECK(!stepper_.stepping_.exchange(true),
                "gradamp_fast: another thread is in a step of this Amplifier: step it from one "
                "thread at a time");
  }
  ~Exclusive() {
    stepper_.release();
    stepper_.stepping_ = false;
  }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  Stepper& stepper_;
};

bool Stepper::take(size_t index, const at::Tensor& gradient) {
  const std::optional<DType> dtype = dtype_of(gradient);
  if (!dtype || gradient.layout() != at::kStrided || gradient.device() != values_.device() ||
      gradient.numel() != numel_[index] || gradient.is_neg() || gradient.is_inference() ||
      is_subclass(gradient) ||
      !gradient.unsafeGetTensorImpl()->is_non_overlapping_and_dense())
    return false;
  gradients_[index] = gradient;
  addresses_[index] = gradient.data_ptr();
  dtypes_[index] = *dtype;
  return true;
}

Outcome Stepper::collect(const char* only, bool walked, Updater* update) {
  for (const py::object& parameter : watched_)
    if (THPVariable_Unpack(parameter.ptr()).requires_grad()) return Outcome::kRebind;
  bool any = false, stateless = false;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const int counts = only ? only[i] : kTrainable;
    if (counts == 0) continue;
    const at::Tensor& parameter = THPVariable_Unpack(parameters_[i].ptr());
    const bool trainable = parameter.requires_grad();
    if (counts == kFrozen && trainable) continue;
    const at::Tensor& gradient = parameter.grad();
    if ((trainable || counts & kFrozen) && gradient.defined()) {
      if (!take(i, gradient)) return Outcome::kUnusual;
      any = true;
      if (!update) continue;
      const Updater::Found found = update->find(i, parameters_[i], gradient);
      if (found == Updater::Found::kUnusual) return Outcome::kUnusual;
      stateless = stateless || found == Updater::Found::kStateless;
    } else if (had_gradient_[i] && !walked) {
      return Outcome::kMissing;
    }
  }
  if (!any) return Outcome::kEmpty;
  if (stateless) return Outcome::kStateless;
  return !update && overlap() ? Outcome::kUnusual : Outcome::kDone;
}

bool Stepper::overlap() {
  if (addresses_ == apart_) return false;
  if (share_memory(gradients_)) return true;
  apart_ = addresses_;
  return false;
}

bool Stepper::lies_as_before(size_t index) const {
  const auto* flags = static_cast<const uint8_t*>(members_.ptr);
  const at::Tensor& gradient = gradients_[index];
  if (flags[index] < 2) return gradient.is_contiguous();
  return flags[index] == 2 && !gradient.is_contiguous() && gradient.strides() == strides_[index];
}

bool Stepper::look_at_members(const char* only) {
  constexpr int64_t kLackingForLong = 1000;
  auto* flags = static_cast<uint8_t*>(members_.ptr);
  auto* lacking = static_cast<int64_t*>(lacking_.ptr);
  const size_t measured = members_.size;
  for (size_t begin = 0, end; begin < measured; begin = end) {
    const int32_t layer = layer_[begin];
    bool any = false, fresh = true, complete = true, as_before = true, all_members = true;
    for (end = begin; end < measured && layer_[end] == layer; ++end) {
      if (numel_[end] == 0) continue;
      if (gradients_[end].defined()) {
        any = true;
        as_before = as_before && lies_as_before(end);
        all_members = all_members && flags[end];
      } else if (flags[end]) {
        const bool may_have = (!only || only[end]) &&
                              THPVariable_Unpack(parameters_[end].ptr()).requires_grad();
        complete = complete && !may_have;
        all_members = all_members && may_have;
      }
      fresh = fresh && !flags[end];
    }
    if (!any) continue;
    if (!as_before || (!all_members && !fresh)) return false;
    if (fresh)
      for (size_t i = begin; i < end; ++i) flags[i] = gradients_[i].defined() && numel_[i] > 0;
    if (complete) {
      lacking[layer] = std::min<int64_t>(lacking[layer], 0);
    } else if (lacking[layer] < 0 || ++lacking[layer] == kLackingForLong) {
      return false;
    }
  }
  return true;
}

void Stepper::release() {
  for (at::Tensor& gradient : gradients_) gradient.reset();
  std::fill(addresses_.begin(), addresses_.end(), nullptr);
}

Outcome Stepper::step(const std::optional<at::Tensor>& grad_scale,
                   const std::optional<at::Tensor>& found_inf, bool unscale,
                   const std::optional<py::bytes>& only, bool walked, Turn turn, Updater* update,
                   bool members_known) {
  const Exclusive exclusive(*this);
  const char* mask = only ? PyBytes_AS_STRING(only->ptr()) : nullptr;
  TORCH_CHECK(!only || PyBytes_GET_SIZE(only->ptr()) == static_cast<int64_t>(parameters_.size()),
              "`only` needs one byte for each parameter");
  const Outcome outcome = collect(mask, walked, update);
  if (outcome != Outcome::kDone) return outcome;
  if (!members_known && !look_at_members(mask)) return Outcome::kMembers;
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (!mask || mask[i]) had_gradient_[i] = gradients_[i].defined();
  if (members_known)
    for (size_t i = 0; i < strides_.size(); ++i)
      if (gradients_[i].defined()) strides_[i] = gradients_[i].strides().vec();
  return run(grad_scale, found_inf, unscale, turn, std::nullopt, update);
}

Outcome Stepper::step_gradients(std::vector<std::optional<at::Tensor>> gradients,
                             const std::optional<at::Tensor>& grad_scale,
                             const std::optional<at::Tensor>& found_inf, bool unscale, Turn turn,
                             const std::optional<at::Tensor>& sums, Updater* update,
                             const std::vector<std::optional<Updater::Given>>& updated) {
  const Exclusive exclusive(*this);
  TORCH_CHECK_VALUE(gradients.size() == parameters_.size(),
                    "one gradient or None for each parameter");
  TORCH_CHECK_VALUE(!sums || (sums->scalar_type() == at::kDouble && sums->is_contiguous() &&
                              sums->numel() == sums_numel_ && sums->device() == values_.device() &&
                              reinterpret_cast<uintptr_t>(sums->const_data_ptr()) % 16 == 0),
                    "`sums` must be contiguous, 16-byte aligned float64 [layers + 1, 8] on ", values_.device());
  for (size_t i = 0; i < gradients.size(); ++i) {
    TORCH_CHECK(!gradients[i] || take(i, *gradients[i]),
                "gradient ", i, " is not flat, dense and real");
    if (gradients[i]) had_gradient_[i] = 1;
    if (gradients[i] && update) update->give(i, updated.at(i).value());
  }
  return run(grad_scale, found_inf, unscale, turn, sums, update);
}

Outcome Stepper::run(const std::optional<at::Tensor>& grad_scale,
                  const std::optional<at::Tensor>& found_inf, bool unscale, Turn turn,
                  const std::optional<at::Tensor>& sums, Updater* update) {
  if (update) update->count_empty(gradients_, found_inf);
  {
    py::gil_scoped_release unlocked;
    engine_->step({addresses_.data(), dtypes_.data(),
                   grad_scale ? grad_scale->const_data_ptr<float>() : nullptr,
                   found_inf ? found_inf->mutable_data_ptr<float>() : nullptr, unscale, turn,
                   written_.data(),
                   sums ? reinterpret_cast<Sums*>(sums->mutable_data_ptr<double>()) : nullptr,
                   update ? update->inputs() : nullptr});
  }
  if (update) {
    update->end(written_);
  } else {
    for (size_t i = 0; i < gradients_.size(); ++i)
      if (written_[i]) gradients_[i].unsafeGetTensorImpl()->bump_version();
  }
  if (found_inf) found_inf->unsafeGetTensorImpl()->bump_version();
  return Outcome::kDone;
}

}  // namespace gradamp
