// The CUDA step on the host: the kernel's own source and its engine's, over shim/. In the copy
// that is compiled the few lines of assembly are replaced by calls of what shim/ declares.
#include <algorithm>
#include <string>

#include "blocks.h"
#include "runtime.h"
#include "step.cu"
#include "sgd.cu"
#include "adam.cu"
// The engine, in the same unit: it is no library here.
#include "engine.h"

using namespace gradamp;
using namespace gradamp::cuda;

namespace {

uint32_t seed = 0;

thread_local void** arguments;

template <int kCapacity>
void call_step() {
  step_kernel<kCapacity>(*static_cast<StepArgs*>(arguments[0]),
                         *static_cast<AddressTable<kCapacity>*>(arguments[1]),
                         *static_cast<int*>(arguments[2]));
}
template <UpdateRule kRule, int kCapacity, bool kMeasures>
void call_update() {
  constexpr auto kernel = kMeasures ? update_kernel<kRule, kCapacity> : apply_kernel<kRule, kCapacity>;
  kernel(*static_cast<StepArgs*>(arguments[0]),
         *static_cast<AddressTable<kCapacity>*>(arguments[1]), *static_cast<int*>(arguments[2]),
         *static_cast<UpdateArgs*>(arguments[3]));
}

struct Known {
  const void* kernel;
  const char* name;
  void (*call)();
};
template <int kCapacity>
std::vector<Known> kernels() {
  constexpr UpdateRule kSgd = UpdateRule::kSgd, kAdam = UpdateRule::kAdam;
  return {{kernel_for(Kind::kMultiply, kCapacity, true), "", call_step<kCapacity>},
          {kernel_for(Kind::kSgd, kCapacity, true), "sgd ", call_update<kSgd, kCapacity, true>},
          {kernel_for(Kind::kSgd, kCapacity, false), "sgd alone ", call_update<kSgd, kCapacity, false>},
          {kernel_for(Kind::kAdam, kCapacity, true), "adam ", call_update<kAdam, kCapacity, true>},
          {kernel_for(Kind::kAdam, kCapacity, false), "adam alone ",
           call_update<kAdam, kCapacity, false>}};
}
// Null: the table does not have it.
const Known* find(const std::vector<Known>& kernels, const void* kernel) {
  for (const Known& known : kernels)
    if (known.kernel == kernel) return &known;
  return nullptr;
}

cudaError_t run(const char* how, const void* kernel, int blocks, void** parameters,
                cudaStream_t stream) {
  static const std::vector<Known> of_small = kernels<kSmallTable>();
  static const std::vector<Known> of_large = kernels<kLargeTable>();
  const Known* const small = find(of_small, kernel);
  const Known& known = small ? *small : *find(of_large, kernel);
  const auto& a = *static_cast<const StepArgs*>(parameters[0]);
  standin::log(standin::text(how, " on ", standin::number(stream), ": ", known.name, small ? "small" : "large",
                             " table, phases ", *static_cast<int*>(parameters[2]), ", ", blocks,
                             " blocks, tensors from ", a.tensor_begin, ", tiles ", a.tile_begin,
                             " to ", a.tile_end));
  const cudaError_t error = standin::outcome(how);
  const bool captured = standin::capturing_stream == standin::number(stream);
  if (error != cudaSuccess || captured || !standin::answers["run"]) return error;
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(++seed));
  std::atomic<int> begun = 0;
  std::atomic<bool> all_ended = true;
  emulator::workers().run(blocks, [&](int worker) {
    // All together, and nothing that one does is ordered before what another does by this.
    begun.fetch_add(1, std::memory_order_relaxed);
    while (begun.load(std::memory_order_relaxed) < blocks) sched_yield();
    arguments = parameters;
    blockIdx.x = order[worker];
    gridDim.x = blocks;
    auto& block = emulator::Block::of_this_thread();
    if (!block.run(known.call, seed * 1000 + worker))
      all_ended = false;
  });
  return all_ended ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, int blocks, int, void** parameters, size_t,
                             cudaStream_t stream) {
  return run("launch", kernel, blocks, parameters, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, int blocks, int, void** parameters,
                                        size_t, cudaStream_t stream) {
  return run("cooperative launch", kernel, blocks, parameters, stream);
}

// ---- an engine, for Python -----------------------------------------------------------

namespace {

std::string problem;

template <class Body>
bool succeeds(const Body& body) {
  problem.clear();
  try {
    body();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.empty();
}

}  // namespace

extern "C" {

// Null if that fails, and emulated_problem() says why.
void* emulated_new(const int32_t* layer, const int64_t* numel, const int32_t* bucket_log2,
                   const int64_t* first_bucket, const uint32_t* first_word, int64_t tensors,
                   int64_t layers, const double* options, const double* windows, double* values,
                   float* sketch, int64_t buckets, int32_t* parity) {
  std::vector<TensorInfo> infos;
  for (int64_t t = 0; t < tensors; ++t)
    infos.push_back({numel[t], 0, first_bucket[t], layer[t], bucket_log2[t], first_word[t], 0});
  Config c;
  c.measure = static_cast<Measure>(options[0]);
  c.threshold = static_cast<Threshold>(options[1]);
  c.threshold_value = options[2];
  c.select = static_cast<Select>(options[3]);
  c.exact = options[4] != 0.0;
  c.match_norm = options[5] != 0.0;
  c.max_norm = options[6];
  c.decay = options[7];
  c.min_steps = options[8];
  c.refresh = static_cast<int64_t>(options[9]);
  c.schedule = static_cast<ScheduleUnit>(options[10]);
  c.seed = static_cast<uint32_t>(options[11]);
  c.grow = options[12] != 0.0;
  c.max_factor = options[13];
  c.num_windows = static_cast<int32_t>(options[14]);
  std::vector<Window> all;
  for (int i = 0; i < c.num_windows; ++i)
    all.push_back({windows[3 * i], windows[3 * i + 1], windows[3 * i + 2]});
  c.windows = all.data();
  const StateView state = {reinterpret_cast<GlobalState*>(values),
                           reinterpret_cast<LayerState*>(values + kGlobalFields), sketch, buckets,
                           parity};
  std::unique_ptr<Engine> engine;
  succeeds([&] {
    engine = make_engine(Tiling(infos, layers, tile_elements), c, state,
                         {at::Tensor(1, "values"), at::Tensor(1, "sketch"), at::Tensor(1, "parity")},
                         at::Device());
  });
  return engine.release();
}

void emulated_delete(void* engine) { delete static_cast<Engine*>(engine); }

const char* emulated_problem() { return problem.c_str(); }

int emulated_step(void* engine, void* const* gradients, const int32_t* dtypes,
                  const float* grad_scale, float* found_inf, int unscale, int begins_round,
                  int decides, Sums* sums, const UpdateTensor* updated, const Hyper* groups,
                  int num_groups, uint8_t* written, int blocks, int cooperative, uint32_t random) {
  Engine& e = *static_cast<Engine*>(engine);
  const UpdateInputs update = {updated, groups, num_groups};
  seed = random;
  return succeeds([&] {
    e.stress({blocks, cooperative != 0, true});
    e.step({gradients, reinterpret_cast<const DType*>(dtypes), grad_scale, found_inf, unscale != 0,
            {begins_round != 0, decides != 0}, written, sums, updated ? &update : nullptr});
  });
}

void emulated_settle(void* engine) { static_cast<Engine*>(engine)->settle(); }
void emulated_written(void* engine) { static_cast<Engine*>(engine)->written(); }

}  // extern "C"
