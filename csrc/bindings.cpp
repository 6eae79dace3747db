#include <torch/csrc/utils/pybind.h>

#include "cpu/step.h"
#include "plan.h"
#if defined(GRADAMP_WITH_CUDA)
#include "cuda/engine.h"
#endif

namespace {

std::optional<std::string> cuda_unavailable([[maybe_unused]] int index) {
#if defined(GRADAMP_WITH_CUDA)
  return gradamp::cuda::unavailable(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
#else
  return "this build has no CUDA kernels";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using gradamp::Plan;
  m.doc() = "Compiled backends of gradamp_fast: the step on the CPU and, where built, on CUDA.";
  m.def("instruction_set", &gradamp::cpu::instruction_set, "What the CPU backend uses here.");
  m.def("cuda_unavailable", &cuda_unavailable, py::arg("index"),
        "Why the CUDA kernels cannot run on that GPU (-1: the current one), with the fix; None if "
        "they can.");
  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<py::object>, std::vector<py::object>,
                    const std::vector<std::tuple<int32_t, int64_t, int32_t, int64_t, uint32_t>>&,
                    int64_t, const py::dict&, at::Tensor, at::Tensor, at::Tensor>(),
           py::arg("parameters"), py::arg("watched"), py::arg("tensors"), py::arg("num_layers"),
           py::arg("options"), py::arg("values"), py::arg("sketch"), py::arg("parity"))
      .def("step",
           [](Plan& plan, const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale,
              const std::optional<py::bytes>& only, bool walked) {
             return static_cast<int>(plan.step(grad_scale, found_inf, unscale, only, walked));
           })
      .def("stress",
           [](Plan& plan, int32_t blocks, uint32_t seed, bool cooperative, bool poison) {
             plan.stress({blocks, seed, cooperative, poison});
           },
           py::arg("blocks") = 0, py::arg("seed") = 0, py::arg("cooperative") = true,
           py::arg("poison") = false,
           "For tests: what a step on CUDA must not depend on (Stress in csrc/engine.h).")
      .def("step_gradients",
           [](Plan& plan, std::vector<std::optional<at::Tensor>> gradients,
              const std::optional<at::Tensor>& grad_scale,
              const std::optional<at::Tensor>& found_inf, bool unscale,
              const std::optional<at::Tensor>& sums) {
             return static_cast<int>(
                 plan.step_gradients(std::move(gradients), grad_scale, found_inf, unscale, sums));
           });
}
