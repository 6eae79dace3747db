#include "memory.h"

#include <ATen/ops/empty.h>

#include <mutex>
#include <utility>

namespace gradamp::cuda {
namespace {

using Kept = std::shared_ptr<const Memory>;

struct Left {
  std::mutex mutex;
  std::vector<Kept> memory;
};

// Never destroyed: graphs may outlive the static objects of this library.
Left& left_by_graphs() {
  static Left* const left = new Left;
  return *left;
}

void leave(void* kept) {
  const std::unique_ptr<Kept> memory(static_cast<Kept*>(kept));
  Left& left = left_by_graphs();
  const std::lock_guard<std::mutex> lock(left.mutex);
  left.memory.push_back(std::move(*memory));
}

}  // namespace

cudaError_t Arena::allocate(at::Device device, cudaStream_t stream) {
  memory_ = at::empty({static_cast<int64_t>(size_)}, at::TensorOptions().dtype(at::kByte).device(device));
  const size_t copied = host_.size();
  cudaError_t error = cudaMemcpyAsync(at<char>(0), host_.data(), copied, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess && copied < size_)
    error = cudaMemsetAsync(at<char>(copied), 0, size_ - copied, stream);
  return error;
}

void Memory::used_on(c10::Stream stream) const {
  arena.tensor().record_stream(stream);
  for (const at::Tensor& tensor : state) tensor.record_stream(stream);
}

cudaError_t capture_on(cudaStream_t stream, Capture& capture) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph,
                                                     nullptr, nullptr, nullptr);
#else
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph, nullptr, nullptr);
#endif
  if (status == cudaStreamCaptureStatusNone) capture = {};
  return error;
}

cudaError_t keep_with(cudaGraph_t graph, std::shared_ptr<const Memory> memory) {
  auto kept = std::make_unique<Kept>(std::move(memory));
  cudaUserObject_t object = nullptr;
  cudaError_t error =
      cudaUserObjectCreate(&object, kept.get(), leave, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) return error;
  kept.release();  // the object's now, and the graph's from here on
  error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  return error;
}

void free_what_graphs_left() {
  std::vector<Kept> memory;  // freed when the lock is gone: that may wait for Python's
  Left& left = left_by_graphs();
  const std::lock_guard<std::mutex> lock(left.mutex);
  memory.swap(left.memory);
}

}  // namespace gradamp::cuda
