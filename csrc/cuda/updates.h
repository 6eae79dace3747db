// What an optimizer updates and by which numbers, where the kernels look it up: arrays on the device
// that are uploaded when the host's have changed, which the host knows by a copy.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "launch.h"
#include "memory.h"

namespace gradamp::cuda {

template <class T>
class Mirror {
 public:
  void resize(size_t count) {
    if (count == host_.size()) return;
    host_.assign(count, T{});
    memory_ = nullptr;
    stale_ = count != 0;
  }
  void set(size_t i, const T& value) {
    if (is_same(host_[i], value)) return;
    host_[i] = value;
    stale_ = true;
  }
  bool stale() const { return stale_; }
  const T* on_device() const { return memory_ ? memory_->arena.template at<T>(0) : nullptr; }

  // In the stream's order, after what reads the array now. What a graph reads is left to it.
  cudaError_t upload(at::Device device, cudaStream_t stream);
  cudaError_t keep_with(const Capture& capture);
  void used_on(c10::Stream stream) const {
    if (memory_) memory_->used_on(stream);
  }

 private:
  static bool is_same(const T& a, const T& b);

  std::vector<T> host_;
  std::shared_ptr<Memory> memory_;
  bool stale_ = false;
  unsigned long long captured_ = 0;  // the capture whose graph keeps the memory already
  bool in_a_graph_ = false;
};

class Updates {
 public:
  // Takes note of what a call updates: tensors where there is a gradient, and all groups.
  void note(const UpdateInputs& in, void* const* gradients, size_t tensors);
  bool stale() const { return tensors_.stale() || groups_.stale(); }
  cudaError_t upload(at::Device device, cudaStream_t stream);
  cudaError_t keep_with(const Capture& capture);
  void used_on(c10::Stream stream) const;
  void write(UpdateArgs& args) const;

 private:
  Mirror<UpdateTensor> tensors_;
  Mirror<Hyper> groups_;  // empty where they travel with the launch
  std::vector<Hyper> few_;
};

}  // namespace gradamp::cuda
