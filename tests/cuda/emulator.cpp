// The CUDA step on the host: the kernel's own source over shim/, and a small engine around it.
// EMULATED is the folder with the kernel's files, in which the few lines of assembly are
// replaced by calls of what shim/ declares.
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "step.cu"

namespace emulator {

Index thread;
int exchanged[256][2];

namespace {

constexpr int kThreads = gradamp::cuda::kThreads;
constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

std::vector<Fiber> fibers(kThreads);
ucontext_t scheduler;
std::vector<int> runnable;
std::vector<int> waiting[kThreads / 32 + 1];  // at the warps' barriers and the block's
std::mt19937 random_order;
void (*body)();

void run_block(void (*kernel)()) {
  body = kernel;
  for (int i = 0; i < kThreads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
    fiber.context.uc_link = &scheduler;
    groups[i].clear();
    makecontext(&fiber.context, [] { body(); }, 0);
    runnable.push_back(i);
  }
  while (!runnable.empty()) {
    std::swap(runnable[random_order() % runnable.size()], runnable.back());
    thread.x = runnable.back();
    runnable.pop_back();
    swapcontext(&scheduler, &fibers[thread.x].context);
  }
}

}  // namespace

void wait(Barrier barrier) {
  const int self = thread.x;
  const bool of_warp = barrier == Barrier::kWarp;
  std::vector<int>& here = waiting[of_warp ? self / 32 : kThreads / 32];
  here.push_back(self);
  if (here.size() == (of_warp ? 32u : static_cast<unsigned>(kThreads))) {
    runnable.insert(runnable.end(), here.begin(), here.end());
    here.clear();
  }
  swapcontext(&fibers[self].context, &scheduler);
}

uint32_t increment(uint32_t* ticket, uint32_t last) {
  const uint32_t old = *ticket;
  *ticket = old >= last ? 0 : old + 1;
  return old;
}

}  // namespace emulator

Index blockIdx, gridDim;

namespace {

using namespace gradamp;
using namespace gradamp::cuda;

void** arguments;

template <int kCapacity>
void call() {
  step_kernel<kCapacity>(*static_cast<StepArgs*>(arguments[0]),
                         *static_cast<AddressTable<kCapacity>*>(arguments[1]),
                         *static_cast<int*>(arguments[2]));
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, int blocks, int, void** parameters, size_t,
                             cudaStream_t) {
  arguments = parameters;
  gridDim.x = blocks;
  const bool small = kernel == kernel_for(kSmallTable);
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), emulator::random_order);
  for (int block : order) {
    blockIdx.x = block;
    emulator::run_block(small ? &call<kSmallTable> : &call<kLargeTable>);
  }
  return cudaSuccess;
}

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, int, int threads, void** parameters,
                                        size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, 1, threads, parameters, shared, stream);
}

// ---- a step, as csrc/cuda/engine.cpp makes it ---------------------------------------

namespace {

struct Emulated {
  Layout layout;
  HostTables tables;
  std::vector<Window> windows;
  std::vector<TileSums> tiles, groups;
  std::vector<LayerSums> layers;
  std::vector<double> scores, amplified;
  std::vector<uint32_t> tickets;
  Verdict verdict;
  StepArgs args = {};
  Device device = {};
};

template <class T>
void poison(std::vector<T>& values) {
  std::memset(static_cast<void*>(values.data()), 0xff, values.size() * sizeof(T));
}

}  // namespace

extern "C" {

void* emulated_new(const int32_t* layer, const int64_t* numel, const int32_t* bucket_log2,
                   const int64_t* first_bucket, const uint32_t* first_word, int64_t tensors, int64_t layers, const double* options, const double* windows,
                   double* values, float* sketch, int64_t buckets, int32_t* parity) {
  std::vector<TensorInfo> infos;
  for (int64_t t = 0; t < tensors; ++t)
    infos.push_back({numel[t], 0, first_bucket[t], layer[t], bucket_log2[t], first_word[t]});
  auto* e = new Emulated{Layout(infos, layers, kTileElements)};
  e->tables = make_tables(e->layout);
  Config& c = e->args.config;
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
  c.num_windows = static_cast<int32_t>(options[12]);
  for (int i = 0; i < c.num_windows; ++i)
    e->windows.push_back({windows[3 * i], windows[3 * i + 1], windows[3 * i + 2]});
  c.windows = e->windows.data();
  e->tiles.resize(e->tables.tiles.size());
  e->groups.resize(e->tables.groups);
  e->layers.resize(layers + 1);
  e->scores.resize(layers);
  e->amplified.resize(layers);
  e->tickets.resize(e->tables.groups + 1);
  e->args.state = {reinterpret_cast<GlobalState*>(values),
                   reinterpret_cast<LayerState*>(values + kGlobalFields), sketch, buckets, parity};
  e->args.tables = {e->tables.tiles.data(), e->tables.first_tile.data(), e->tables.layers.data()};
  e->args.work = {e->tiles.data(),
                  e->groups.data(),
                  e->layers.data(),
                  {e->scores.data(), e->amplified.data()},
                  &e->verdict,
                  e->tickets.data(),
                  e->tickets.data() + e->tables.groups};
  e->args.num_layers = static_cast<int32_t>(layers);
  e->args.measured = static_cast<int32_t>(e->layout.measured);
  inspect(e->device);
  return e;
}

void emulated_delete(void* engine) { delete static_cast<Emulated*>(engine); }

// Returns the number of launches, or -1 if a ticket is left over.
int emulated_step(void* engine, void* const* gradients, const int32_t* dtypes,
                  const float* grad_scale, float* found_inf, int unscale, LayerSums* sums,
                  int capacity, int blocks, int cooperative, uint32_t seed) {
  auto& e = *static_cast<Emulated*>(engine);
  emulator::random_order.seed(seed);
  poison(e.tiles), poison(e.groups), poison(e.layers), poison(e.scores), poison(e.amplified);
  std::vector<uint64_t> tagged(e.layout.num_tensors() + kLargeTable);
  for (int64_t t = 0; t < e.layout.num_tensors(); ++t)
    tagged[t] = reinterpret_cast<uint64_t>(gradients[t]) | static_cast<uint64_t>(dtypes[t])
                                                               << kDTypeShift;
  StepArgs& a = e.args;
  const bool norm = needs_norm(a.config), two_phases = a.config.exact || norm;
  a.grad_scale = grad_scale;
  a.found_inf = found_inf;
  a.unscale = unscale && grad_scale;
  a.exports = sums != nullptr;
  a.work.layers = sums ? sums : e.layers.data();
  a.write_in_first_phase = !two_phases;
  const bool with_excluded = (norm || a.unscale) && !(two_phases && sums);
  const int64_t tensors = with_excluded ? e.layout.num_tensors() : e.layout.measured;
  const std::vector<Chunk> chunks = make_chunks(e.tables.first_tile, tensors, capacity);
  int launches = 0;
  const auto phase = [&](Phases phases) {
    for (size_t i = 0; i < chunks.size(); ++i) {
      a.tensor_begin = chunks[i].tensor_begin;
      a.tile_begin = chunks[i].tile_begin;
      a.tile_end = chunks[i].tile_end;
      a.first_launch = i == 0;
      a.last_launch = i + 1 == chunks.size();
      launch(a, tagged.data() + chunks[i].tensor_begin,
             chunks[i].tensor_end - chunks[i].tensor_begin, phases, blocks, e.device, nullptr);
      ++launches;
    }
  };
  if (!two_phases || sums) {
    phase(kMeasure);
  } else if (cooperative && chunks.size() == 1) {
    phase(kBoth);
  } else {
    phase(kMeasure), phase(kMultiply);
  }
  for (uint32_t ticket : e.tickets)
    if (ticket != 0) return -1;
  return launches;
}

}  // extern "C"
