// The step on the CPU. Knows no torch: threads come from the caller.
#pragma once

#include <functional>
#include <memory>

#include "../engine.h"
#include "../tiles.h"
#include "../rules/state.h"

namespace gradamp::cpu {

constexpr int64_t kTileElements = 8192;  // 32 KB of fp32: read twice, the second time from L1
constexpr int64_t tile_elements(int64_t) { return kTileElements; }

// Runs body on `workers` threads at once and returns when all have finished.
using Parallel = std::function<void(int workers, const std::function<void()>& body)>;

struct Threads {
  std::function<int()> available;
  Parallel run;
};

std::unique_ptr<Engine> make_engine(Tiling tiling, const Config& config, const StateView& state,
                                    Threads threads);

// "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace gradamp::cpu
