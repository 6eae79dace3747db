// The step on an NVIDIA GPU: owns what it needs on the device and launches the kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../engine.h"
#include "../tiles.h"
#include "tables.h"

namespace gradamp::cuda {

// Allocates and uploads everything a step needs; a step then only launches. Cannot be
// called while a CUDA graph is captured. The tensors are those that `state` points into.
std::unique_ptr<Engine> make_engine(Tiling tiling, const Config& config, const StateView& state,
                                    std::vector<at::Tensor> state_tensors, at::Device device);

// Why the kernels of this build cannot run on the device, with the fix.
std::optional<std::string> unavailable(at::Device device);

}  // namespace gradamp::cuda
