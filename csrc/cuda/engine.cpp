#include "engine.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "memory.h"
#include "updates.h"

namespace gradamp::cuda {
namespace {

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "this build has kernels for " GRADAMP_ARCHS
             ": set TORCH_CUDA_ARCH_LIST to the GPU's compute capability and install again";
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
      return "this build needs a driver for CUDA " GRADAMP_CUDA " or later: update it";
    case cudaErrorMemoryAllocation:
      return "free some memory on the GPU";
    default:
      return "CUDA_LAUNCH_BLOCKING=1 shows whether an earlier kernel failed; "
             "backend=\"torch\" does without this one";
  }
}

std::string message(cudaError_t error, const char* doing) {
  return std::string("gradamp_fast: ") + doing + " failed: " + cudaGetErrorString(error) + " (" +
         cudaGetErrorName(error) + "): " + advice(error);
}

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of someone else would report it
  TORCH_CHECK(false, message(error, doing));
}

// Whether the driver says that it cannot make such a launch, rather than that something failed.
bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

class CudaEngine final : public Engine {
 public:
  CudaEngine(Tiling tiling, const Config& config, const StateView& state,
             std::vector<at::Tensor> state_tensors, at::Device device)
      : tiling_(std::move(tiling)),
        device_(device),
        memory_(std::make_shared<Memory>()),
        tagged_(tiling_.num_tensors() + kLargeTable, 0) {
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    TORCH_CHECK(!captured_on(stream).graph,
                "gradamp_fast: nothing can be allocated while a CUDA graph is captured: call "
                "amplifier.prepare() or make one step before the capture");
    free_what_graphs_left();
    load(Kind::kMultiply);
    split_into_launches(limits_[0].large_table ? kLargeTable : kSmallTable);
    memory_->state = std::move(state_tensors);
    fill(config, state, stream);
    check(cudaStreamSynchronize(stream), "uploading the tables");
    memory_->arena.forget_host_copy();
    check(cudaEventCreateWithFlags(&step_done_, cudaEventDisableTiming), "creating an event");
  }

  ~CudaEngine() override {
    if (step_done_) cudaEventDestroy(step_done_);
    free_what_graphs_left();
  }
  CudaEngine(const CudaEngine&) = delete;
  CudaEngine& operator=(const CudaEngine&) = delete;

  void step(const StepInputs& in) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    const Capture capture = captured_on(stream);
    if (capture.graph) {
      stay_with(capture);
    } else {
      follow(stream);
    }
    const bool norm = needs_norm(args_.config);
    const bool unscale = in.unscale && in.grad_scale && !in.update;
    const bool alone = in.update && tiling_.measured == 0 && !norm;
    const bool two_phases = !alone && (args_.config.exact || norm);
    const bool measures_only = two_phases && in.sums;
    const bool with_excluded = (norm || unscale || in.update) && !measures_only;
    kind_ = in.update && !measures_only ? prepare_update(in, capture, stream) : Kind::kMultiply;
    update_.alone = alone;
    for (int64_t t = 0; t < tiling_.num_tensors(); ++t) {
      tagged_[t] = reinterpret_cast<uint64_t>(in.gradients[t]) |
                   static_cast<uint64_t>(in.dtypes[t]) << kDTypeShift;
      // What is selected stands on the device: whatever may be written counts as written.
      in.written[t] =
          in.gradients[t] && !measures_only && (t < tiling_.measured || with_excluded);
    }
    args_.grad_scale = in.grad_scale;
    args_.found_inf = in.found_inf;
    args_.unscale = unscale;
    args_.turn = in.turn;
    args_.measure_only = in.sums != nullptr;
    args_.work.layers = in.sums ? in.sums : layer_sums_;
    if (stress_.poison) poison(stream);
    launched_ = 0;
    const std::vector<Chunk>& chunks = with_excluded ? all_ : measured_;
    const auto launch_all = [&] {
      return alone ? launch_phase(kWrite, chunks, stream) : launch_step(two_phases, chunks, stream);
    };
    cudaError_t error = launch_all();
    if (is_refusal(error) && launched_ == 0 && all_.front().tensor_end > kSmallTable) {
      cudaGetLastError();  // large parameters were refused: the same in smaller portions
      split_into_launches(kSmallTable);
      error = launch_all();
    }
    check(error, "the launch of a step");
    if (!capture.graph) leave(stream);
  }

  void settle() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    if (last_ && last_ != stream && !captured_on(stream).graph) wait_for_last(stream);
  }

  void written() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    if (captured_on(stream).graph) return;
    follow(stream);
    leave(stream);
  }

  void stress(const Stress& stress) override { stress_ = stress; }

 private:
  void split_into_launches(int capacity) {
    measured_ = make_chunks(tiling_, tiling_.measured, capacity);
    all_ = make_chunks(tiling_, tiling_.num_tensors(), capacity);
  }

  void fill(const Config& config, const StateView& state, cudaStream_t stream) {
    Arena& arena = memory_->arena;
    const HostTables tables = make_tables(tiling_);
    const auto layers = static_cast<size_t>(tiling_.num_layers);
    const size_t tiles = arena.put(tables.tiles);
    const size_t tensors = arena.put(tables.tensors);
    const size_t layer_groups = arena.put(tables.layers);
    const size_t windows =
        arena.put(std::vector<Window>(config.windows, config.windows + config.num_windows));
    const size_t tickets = arena.reserve<uint32_t>(tables.groups);
    const size_t block_ticket = arena.reserve<uint32_t>(1);
    const size_t claims = arena.reserve<uint32_t>(1);
    work_begin_ = arena.reserve<Sums>(tiling_.num_tiles);
    const size_t groups = arena.reserve<Sums>(tables.groups);
    const size_t layer_sums = arena.reserve<Sums>(layers + 1);
    const size_t scores = arena.reserve<double>(layers);
    const size_t amplified = arena.reserve<double>(layers);
    const size_t verdict = arena.reserve<Verdict>(1);
    check(arena.allocate(device_, stream), "uploading the tables");

    args_.config = config;
    args_.config.windows = arena.at<Window>(windows);
    args_.state = state;
    args_.tables = {arena.at<Tile>(tiles), arena.at<MeasuredTensor>(tensors),
                    arena.at<LayerGroups>(layer_groups)};
    args_.work = {arena.at<Sums>(work_begin_),
                  arena.at<Sums>(groups),
                  arena.at<Sums>(layer_sums),
                  {arena.at<double>(scores), arena.at<double>(amplified)},
                  arena.at<Verdict>(verdict),
                  arena.at<uint32_t>(tickets),
                  arena.at<uint32_t>(block_ticket),
                  arena.at<uint32_t>(claims)};
    layer_sums_ = args_.work.layers;
    args_.num_layers = static_cast<int32_t>(layers);
    args_.measured = static_cast<int32_t>(tiling_.measured);
  }

  static Capture captured_on(cudaStream_t stream) {
    Capture capture;
    check(capture_on(stream, capture), "asking whether a graph is captured");
    return capture;
  }

  // What uses the state follows what used it last, on whichever stream.
  void follow(const c10::cuda::CUDAStream& stream) {
    if (last_ != stream) {
      if (last_) wait_for_last(stream);
      memory_->used_on(stream.unwrap());
      updates_.used_on(stream.unwrap());
      last_ = stream;
    }
    recorded_ = false;
  }

  // For those that follow on another stream, which may find that this one is gone. The default
  // stream stays: there, where most training runs, no step pays for an event.
  void leave(const c10::cuda::CUDAStream& stream) {
    recorded_ = stream.stream() != nullptr;
    if (recorded_) check(cudaEventRecord(step_done_, stream), "recording an event");
  }

  void wait_for_last(const c10::cuda::CUDAStream& stream) {
    if (!recorded_) check(cudaEventRecord(step_done_, last_->stream()), "recording an event");
    check(cudaStreamWaitEvent(stream, step_done_), "waiting for an event");
  }

  // A captured step waits for what the stream that replays it waits for: an event from outside
  // may not be waited for in a capture, nor one from inside out of it.
  void stay_with(const Capture& capture) {
    if (capture.id == captured_) return;
    check(keep_with(capture.graph, memory_), "keeping memory for a graph");
    captured_ = capture.id;
  }

  void poison(cudaStream_t stream) {
    const Arena& arena = memory_->arena;
    check(cudaMemsetAsync(arena.at<char>(work_begin_), 0xff, arena.size() - work_begin_, stream),
          "poisoning the workspace");
  }

  DeviceLimits& limits() { return limits_[static_cast<int>(kind_)]; }

  void load(Kind kind) {
    DeviceLimits& limits = limits_[static_cast<int>(kind)];
    if (limits.processors == 0) check(inspect(kind, limits), "loading the kernels");
  }

  // What a step needs that updates, and the kind of its kernels.
  Kind prepare_update(const StepInputs& in, const Capture& capture, cudaStream_t stream) {
    const UpdateInputs& update = *in.update;
    const UpdateRule rule = update.groups[0].rule;
    for (int32_t i = 1; i < update.num_groups; ++i)
      TORCH_CHECK(update.groups[i].rule == rule, "gradamp_fast: one step is of one optimizer");
    const Kind kind = rule == UpdateRule::kSgd ? Kind::kSgd : Kind::kAdam;
    updates_.note(update, in.gradients, tiling_.num_tensors());
    if (capture.graph) {
      TORCH_CHECK(!updates_.stale() && limits_[static_cast<int>(kind)].processors != 0,
                  "gradamp_fast: nothing can be uploaded while a CUDA graph is captured, and what "
                  "the optimizer updates is not what it was on the last step: make one step before "
                  "the capture");
      check(updates_.keep_with(capture), "keeping memory for a graph");
    } else {
      load(kind);
      check(updates_.upload(device_, stream), "uploading what is updated");
    }
    updates_.write(update_);
    return kind;
  }

  cudaError_t launch_step(bool two_phases, const std::vector<Chunk>& chunks, cudaStream_t stream) {
    args_.write_in_first_phase = !two_phases;
    if (!two_phases || args_.measure_only) return launch_phase(kMeasure, chunks, stream);
    if (chunks.size() == 1 && limits().cooperative && stress_.cooperative) {
      const cudaError_t error = launch_chunk(kBoth, chunks, 0, stream);
      if (!is_refusal(error)) return error;
      cudaGetLastError();  // refused: the same in two launches
      limits().cooperative = false;
    }
    const cudaError_t error = launch_phase(kMeasure, chunks, stream);
    return error == cudaSuccess ? launch_phase(kWrite, chunks, stream) : error;
  }

  cudaError_t launch_phase(Phases phase, const std::vector<Chunk>& chunks, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t i = 0; i < chunks.size() && error == cudaSuccess; ++i)
      error = launch_chunk(phase, chunks, i, stream);
    return error;
  }

  cudaError_t launch_chunk(Phases phases, const std::vector<Chunk>& chunks, size_t i,
                           cudaStream_t stream) {
    const Chunk& chunk = chunks[i];
    args_.tensor_begin = chunk.tensor_begin;
    args_.tile_begin = chunk.tile_begin;
    args_.tile_end = chunk.tile_end;
    args_.first_launch = i == 0;
    args_.last_launch = i + 1 == chunks.size();
    update_.tensors_of_launch = chunk.tensor_end - chunk.tensor_begin;
    const int tiles = chunk.tile_end - chunk.tile_begin;
    const int fitting = limits().blocks_per_processor * limits().processors;
    const int useful = std::max(tiles, 1);  // each on a processor of its own as far as they go
    const int blocks = std::min(stress_.blocks ? stress_.blocks : useful, fitting);
    const cudaError_t error =
        launch(kind_, args_, update_, tagged_.data() + chunk.tensor_begin,
               update_.tensors_of_launch, phases, blocks, limits(), stream);
    launched_ += error == cudaSuccess;
    return error;
  }

  Tiling tiling_;
  at::Device device_;
  DeviceLimits limits_[kKinds] = {};  // processors 0: kernels that no step has used
  Kind kind_ = Kind::kMultiply;
  std::vector<Chunk> measured_, all_;  // launches of a step without and with excluded tensors
  std::shared_ptr<Memory> memory_;
  size_t work_begin_ = 0;  // of the arena's part that every step writes before it reads
  Sums* layer_sums_ = nullptr;
  StepArgs args_ = {};
  Updates updates_;
  UpdateArgs update_ = {};
  std::vector<uint64_t> tagged_;  // read by launches up to the end of their table
  int launched_ = 0;                 // launches of the step under way: none is repeated
  unsigned long long captured_ = 0;  // the capture whose graph keeps the memory already
  std::optional<c10::cuda::CUDAStream> last_;  // to use the state, captures apart
  cudaEvent_t step_done_ = nullptr;
  bool recorded_ = false;  // since the last use of the state
  Stress stress_;
  std::mutex mutex_;  // another thread may look at the state while one steps
};

}  // namespace

std::unique_ptr<Engine> make_engine(Tiling tiling, const Config& config, const StateView& state,
                                    std::vector<at::Tensor> state_tensors, at::Device device) {
  return std::make_unique<CudaEngine>(std::move(tiling), config, state, std::move(state_tensors),
                                      device);
}

std::optional<std::string> unavailable(at::Device device) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) {
    const c10::cuda::CUDAGuard guard(device);
    DeviceLimits limits;
    error = inspect(Kind::kMultiply, limits);
  }
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();
  return message(error, "loading the kernels");
}

}  // namespace gradamp::cuda
