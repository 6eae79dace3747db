#include <torch/csrc/utils/pybind.h>

#include "cpu/step.h"
#include "plan.h"

namespace {

py::dict built_with() {
  py::dict facts;
  facts["torch"] = GRADAMP_TORCH_VERSION;
  facts["cuda"] = GRADAMP_CUDA_VERSION;
  facts["archs"] = GRADAMP_ARCHS;
  facts["cxx"] = __VERSION__;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using gradamp::Plan;
  m.doc() = "Compiled backends of gradamp_fast: the step on the CPU and, where built, on CUDA.";
  m.def("built_with", &built_with, "Versions this extension was compiled against.");
  m.def("instruction_set", &gradamp::cpu::instruction_set, "What the CPU backend uses here.");
  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<py::object>, std::vector<py::object>, const std::vector<int32_t>&,
                    const std::vector<int64_t>&, const std::vector<int64_t>&, int64_t,
                    const py::dict&, at::Tensor, at::Tensor, at::Tensor>(),
           py::arg("parameters"), py::arg("watched"), py::arg("layer"), py::arg("numel"),
           py::arg("first_bucket"), py::arg("num_layers"), py::arg("options"), py::arg("values"),
           py::arg("sketch"), py::arg("parity"))
      .def("step",
           [](Plan& plan, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale,
              const std::optional<py::bytes>& only, bool walked) {
             return static_cast<int>(plan.step(grad_scale, found_inf, unscale, only, walked));
           })
      .def("step_gradients",
           [](Plan& plan, std::vector<std::optional<at::Tensor>> gradients,
              const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale) {
             return static_cast<int>(
                 plan.step_gradients(std::move(gradients), grad_scale, found_inf, unscale));
           });
}
