#include "engine.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

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

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

// One allocation on the device, cut into arrays. What is put into it is copied there once.
class Arena {
 public:
  template <class T>
  size_t put(const std::vector<T>& values) {
    const size_t at = reserve<T>(values.size());
    host_.resize(size_, 0);
    if (!values.empty()) std::memcpy(host_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  template <class T>
  size_t reserve(size_t count) {
    const size_t at = (size_ + kAlignment - 1) / kAlignment * kAlignment;
    size_ = at + count * sizeof(T);
    return at;
  }
  size_t size() const { return size_; }

  void allocate(at::Device device) {
    const auto bytes = at::TensorOptions().dtype(at::kByte);
    memory_ = at::zeros({static_cast<int64_t>(size_)}, bytes.device(device));
    const auto copied = static_cast<int64_t>(host_.size());
    at::Tensor host = at::empty({copied}, bytes);
    std::memcpy(host.data_ptr(), host_.data(), host_.size());
    memory_.narrow(0, 0, copied).copy_(host);
    host_.clear();
  }
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(memory_.data_ptr<uint8_t>() + offset);
  }
  // Not given to anyone else before what runs on the stream now has finished.
  void used_on(c10::Stream stream) { memory_.record_stream(stream); }

 private:
  static constexpr size_t kAlignment = 256;
  size_t size_ = 0;
  std::vector<uint8_t> host_;
  at::Tensor memory_;
};

class CudaEngine final : public Engine {
 public:
  CudaEngine(Layout layout, const Config& config, const StateView& state, at::Device device)
      : layout_(std::move(layout)),
        device_(device),
        tagged_(layout_.num_tensors() + kLargeTable, 0) {
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    TORCH_CHECK(!is_capturing(stream),
                "gradamp_fast: nothing can be allocated while a CUDA graph is captured: call "
                "amplifier.prepare() or make one step before the capture");
    check(inspect(hardware_), "loading the kernels");
    fill(config, state);
    cut(hardware_.large_table ? kLargeTable : kSmallTable);
    check(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming), "creating an event");
    check(cudaStreamSynchronize(stream), "uploading the tables");
  }

  ~CudaEngine() override {
    if (moved_) cudaEventDestroy(moved_);
  }
  CudaEngine(const CudaEngine&) = delete;
  CudaEngine& operator=(const CudaEngine&) = delete;

  void step(const StepInputs& in) override {
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream(device_.index());
    follow(stream);
    const bool norm = needs_norm(args_.config);
    const bool unscale = in.unscale && in.grad_scale;
    const bool two_phases = args_.config.exact || norm;
    const bool measures_only = two_phases && in.sums;
    const bool with_excluded = (norm || unscale) && !measures_only;
    for (int64_t t = 0; t < layout_.num_tensors(); ++t) {
      tagged_[t] = reinterpret_cast<uint64_t>(in.gradients[t]) |
                   static_cast<uint64_t>(in.dtypes[t]) << kDTypeShift;
      // What is selected stands on the device: whatever may be written counts as written.
      in.written[t] =
          in.gradients[t] && !measures_only && (t < layout_.measured || with_excluded);
    }
    args_.grad_scale = in.grad_scale;
    args_.found_inf = in.found_inf;
    args_.unscale = unscale;
    args_.exports = in.sums != nullptr;
    args_.work.layers = in.sums ? in.sums : layer_sums_;
    if (stress_.poison) poison(stream);
    cudaError_t error = launch_all(two_phases, with_excluded, stream);
    if (error != cudaSuccess && all_.front().tensor_end > kSmallTable) {
      cudaGetLastError();  // a driver that refuses large parameters: in smaller portions
      cut(kSmallTable);
      error = launch_all(two_phases, with_excluded, stream);
    }
    check(error, "the launch of a step");
  }

  void stress(const Stress& stress) override {
    stress_ = stress;
    args_.stress = stress.seed;
  }

 private:
  void cut(int capacity) {
    measured_ = make_chunks(first_tile_, layout_.measured, capacity);
    all_ = make_chunks(first_tile_, layout_.num_tensors(), capacity);
  }

  void fill(const Config& config, const StateView& state) {
    HostTables tables = make_tables(layout_);
    const auto layers = static_cast<size_t>(layout_.num_layers);
    const size_t tiles = arena_.put(tables.tiles);
    const size_t first_tile = arena_.put(tables.first_tile);
    const size_t layer_groups = arena_.put(tables.layers);
    const size_t windows =
        arena_.put(std::vector<Window>(config.windows, config.windows + config.num_windows));
    const size_t tickets = arena_.reserve<uint32_t>(tables.groups);
    const size_t block_ticket = arena_.reserve<uint32_t>(1);
    work_begin_ = arena_.reserve<TileSums>(tables.tiles.size());
    const size_t groups = arena_.reserve<TileSums>(tables.groups);
    const size_t layer_sums = arena_.reserve<LayerSums>(layers + 1);
    const size_t scores = arena_.reserve<double>(layers);
    const size_t amplified = arena_.reserve<double>(layers);
    const size_t verdict = arena_.reserve<Verdict>(1);
    arena_.allocate(device_);

    args_.config = config;
    args_.config.windows = arena_.at<Window>(windows);
    args_.state = state;
    args_.tables = {arena_.at<Tile>(tiles), arena_.at<int32_t>(first_tile),
                    arena_.at<LayerGroups>(layer_groups)};
    args_.work = {arena_.at<TileSums>(work_begin_),
                  arena_.at<TileSums>(groups),
                  arena_.at<LayerSums>(layer_sums),
                  {arena_.at<double>(scores), arena_.at<double>(amplified)},
                  arena_.at<Verdict>(verdict),
                  arena_.at<uint32_t>(tickets),
                  arena_.at<uint32_t>(block_ticket)};
    first_tile_ = std::move(tables.first_tile);
    layer_sums_ = args_.work.layers;
    args_.num_layers = static_cast<int32_t>(layers);
    args_.measured = static_cast<int32_t>(layout_.measured);
  }

  // Steps on different streams follow one another. Graphs are captured on a stream of their
  // own that nothing has run on, and wait for what the stream that replays them waits for.
  void follow(const c10::cuda::CUDAStream& stream) {
    if (last_ == stream || is_capturing(stream)) return;
    if (last_) {
      check(cudaEventRecord(moved_, last_->stream()), "recording an event");
      check(cudaStreamWaitEvent(stream, moved_), "waiting for an event");
    }
    arena_.used_on(stream.unwrap());
    last_ = stream;
  }

  void poison(cudaStream_t stream) {
    check(cudaMemsetAsync(arena_.at<uint8_t>(work_begin_), 0xff, arena_.size() - work_begin_,
                          stream),
          "poisoning the workspace");
  }

  cudaError_t launch_all(bool two_phases, bool with_excluded, cudaStream_t stream) {
    const std::vector<Chunk>& chunks = with_excluded ? all_ : measured_;
    args_.write_in_first_phase = !two_phases;
    if (!two_phases || args_.exports) return launch_phase(kMeasure, chunks, stream);
    if (chunks.size() == 1 && hardware_.cooperative && stress_.cooperative) {
      const cudaError_t error = launch_chunk(kBoth, chunks, 0, stream);
      if (error == cudaSuccess) return error;
      cudaGetLastError();  // refused: the same in two launches
      hardware_.cooperative = false;
    }
    const cudaError_t error = launch_phase(kMeasure, chunks, stream);
    return error == cudaSuccess ? launch_phase(kMultiply, chunks, stream) : error;
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
    const int tiles = chunk.tile_end - chunk.tile_begin;
    const int fitting = hardware_.blocks_per_processor * hardware_.processors;
    const int useful = std::max(tiles, 1);  // each on a processor of its own as far as they go
    const int blocks = std::min(stress_.blocks ? stress_.blocks : useful, fitting);
    return launch(args_, tagged_.data() + chunk.tensor_begin,
                  chunk.tensor_end - chunk.tensor_begin, phases, blocks, hardware_, stream);
  }

  Layout layout_;
  at::Device device_;
  Device hardware_ = {};
  std::vector<int32_t> first_tile_;    // of each tensor
  std::vector<Chunk> measured_, all_;  // launches of a step without and with excluded tensors
  Arena arena_;
  size_t work_begin_ = 0;  // of the arena's part that every step writes before it reads
  LayerSums* layer_sums_ = nullptr;
  StepArgs args_ = {};
  std::vector<uint64_t> tagged_;  // read by launches up to the end of their table
  std::optional<c10::cuda::CUDAStream> last_;
  cudaEvent_t moved_ = nullptr;
  Stress stress_;
};

}  // namespace

std::unique_ptr<Engine> make_engine(Layout layout, const Config& config, const StateView& state,
                                    at::Device device) {
  return std::make_unique<CudaEngine>(std::move(layout), config, state, device);
}

std::optional<std::string> unavailable(at::Device device) {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) {
    const c10::cuda::CUDAGuard guard(device);
    Device hardware;
    error = inspect(hardware);
  }
  if (error == cudaSuccess) return std::nullopt;
  cudaGetLastError();
  return message(error, "loading the kernels");
}

}  // namespace gradamp::cuda
