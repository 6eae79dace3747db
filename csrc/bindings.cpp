#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/engine.h"
#if defined(GRADAMP_WITH_CUDA)
#include "cuda/engine.h"
#endif
#include "gradients.h"
#include "rules/decide.h"
#include "stepper.h"

namespace {

std::optional<std::string> cuda_unavailable([[maybe_unused]] int index) {
#if defined(GRADAMP_WITH_CUDA)
  return gradamp::cuda::unavailable(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
#else
  return "this build has no CUDA kernels";
#endif
}

#define GRADAMP_FIELD(name) #name,
#define GRADAMP_VALUE(name, text) #text,
const std::vector<std::string> kGlobals = {GRADAMP_GLOBAL_FIELDS(GRADAMP_FIELD)};
const std::vector<std::string> kLayers = {GRADAMP_LAYER_FIELDS(GRADAMP_FIELD)};
const std::map<std::string, std::vector<std::string>> kEnums = {
    {"measure", {GRADAMP_MEASURES(GRADAMP_VALUE)}},
    {"threshold", {GRADAMP_THRESHOLDS(GRADAMP_VALUE)}},
    {"select", {GRADAMP_SELECTS(GRADAMP_VALUE)}},
    {"schedule_unit", {GRADAMP_SCHEDULE_UNITS(GRADAMP_VALUE)}},
};

py::tuple names(const std::vector<std::string>& list) { return py::tuple(py::cast(list)); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  using gradamp::KnownGradients;
  using gradamp::Stepper;
  using gradamp::Updater;
  m.doc() = "Compiled backends of gradamp_fast: the step on the CPU and, where built, on CUDA.";
  py::dict enums;
  for (const auto& [option, values] : kEnums) enums[py::str(option)] = names(values);
  m.attr("GLOBAL_FIELDS") = names(kGlobals);
  m.attr("LAYER_FIELDS") = names(kLayers);
  m.attr("ENUMS") = enums;
  m.attr("GROWTH") = py::make_tuple(gradamp::kLow, gradamp::kSurge, gradamp::kEarly);
  m.def("instruction_set", &gradamp::cpu::instruction_set, "What the CPU backend uses here.");
  m.def("cuda_unavailable", &cuda_unavailable, py::arg("index"),
        "Why the CUDA kernels cannot run on that GPU (-1: the current one), with the fix; None if "
        "they can.");
  py::class_<KnownGradients>(m, "KnownGradients")
      .def(py::init<std::vector<py::object>, const std::vector<std::optional<at::Tensor>>&,
                    std::vector<int64_t>, bool>(),
           py::arg("parameters"), py::arg("gradients"), py::arg("tags"), py::arg("frozen_too"))
      .def("read", &KnownGradients::read, py::arg("only"), py::arg("apart"));
  py::class_<Updater>(m, "Updater")
      .def(py::init<std::vector<int32_t>>(), py::arg("groups"))
      .def("begin", &Updater::begin, py::arg("state"), py::arg("counts"), py::arg("hypers"));
  py::class_<Stepper>(m, "Stepper")
      .def(py::init<std::vector<py::object>, std::vector<py::object>,
                    const std::vector<std::tuple<int32_t, int64_t, int32_t, int64_t, uint32_t>>&,
                    int64_t, const py::dict&, at::Tensor, at::Tensor, at::Tensor,
                    const py::buffer&, const py::buffer&>(),
           py::arg("parameters"), py::arg("watched"), py::arg("tensors"), py::arg("num_layers"),
           py::arg("options"), py::arg("values"), py::arg("sketch"), py::arg("parity"),
           py::arg("members"), py::arg("lacking"))
      .def("step",
           [](Stepper& stepper, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale,
              const std::optional<py::bytes>& only, bool walked, bool begins_round, bool decides,
              Updater* update, bool members_known) {
             return static_cast<int>(stepper.step(grad_scale, found_inf, unscale, only, walked,
                                                  {begins_round, decides}, update, members_known));
           },
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("unscale"), py::arg("only"),
           py::arg("walked"), py::arg("begins_round"), py::arg("decides"), py::arg("update"),
           py::arg("members_known") = false)
      .def("stress",
           [](Stepper& stepper, int32_t blocks, bool cooperative, bool poison) {
             stepper.stress({blocks, cooperative, poison});
           },
           py::arg("blocks") = 0, py::arg("cooperative") = true, py::arg("poison") = false,
           "For tests: what a step on CUDA must not depend on (Stress in csrc/engine.h).")
      .def("step_gradients",
           [](Stepper& stepper, std::vector<std::optional<at::Tensor>> gradients,
              const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale, bool begins_round,
              bool decides, const std::optional<at::Tensor>& sums, Updater* update,
              const std::vector<std::optional<Updater::Given>>& updated) {
             return static_cast<int>(
                 stepper.step_gradients(std::move(gradients), grad_scale, found_inf, unscale,
                                        {begins_round, decides}, sums, update, updated));
           })
      .def("settle", &Stepper::settle,
           "What is done next on the current stream sees the state as the last step left it.")
      .def("written", &Stepper::written,
           "The next step sees what was written to the state on the current stream.");
}
