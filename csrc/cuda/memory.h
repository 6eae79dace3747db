// Device memory that kernels read and write, and how long it lives: as long as the engine, and
// as long as any CUDA graph that captured one of its steps.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <vector>

namespace gradamp::cuda {

// One allocation on the device, cut into arrays. Those that are put into it come first and are
// copied there once; the rest begins as zeros.
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
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.mutable_data_ptr()) + offset);
  }
  size_t size() const { return size_; }
  const at::Tensor& tensor() const { return memory_; }

  // Copies on the stream; what was put must have arrived before the host's copy may go.
  cudaError_t allocate(at::Device device, cudaStream_t stream);
  void forget_host_copy() { host_ = {}; }

 private:
  static constexpr size_t kAlignment = 256;
  size_t size_ = 0;
  std::vector<char> host_;
  at::Tensor memory_;
};

struct Memory {
  Arena arena;
  std::vector<at::Tensor> state;

  // Not given to anyone else before what runs on the stream now has finished.
  void used_on(c10::Stream stream) const;
};

// What is captured on a stream; graph null: nothing.
struct Capture {
  cudaGraph_t graph = nullptr;
  unsigned long long id = 0;
};

cudaError_t capture_on(cudaStream_t stream, Capture& capture);

// The graph, and all that is instantiated from it, keep the memory until they are destroyed.
cudaError_t keep_with(cudaGraph_t graph, std::shared_ptr<const Memory> memory);

// Frees what destroyed graphs kept: they are told on a thread that must not call CUDA.
void free_what_graphs_left();

}  // namespace gradamp::cuda
