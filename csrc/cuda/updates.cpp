#include "updates.h"

#include <algorithm>
#include <cstring>

namespace gradamp::cuda {
namespace {

// Of the host's bits: the same number is the same again, NaN too.
bool same_bits(const Hyper& a, const Hyper& b) { return std::memcmp(&a, &b, sizeof a) == 0; }
static_assert(sizeof(Hyper) == 6 * sizeof(int32_t) + sizeof(void*) + 5 * sizeof(double),
              "there is padding, which is not compared");

bool same_bits(const UpdateTensor& a, const UpdateTensor& b) {
  return a.parameter == b.parameter && a.steps == b.steps && a.group == b.group &&
         std::equal(a.states, a.states + kUpdateStates, b.states);
}

// Without what is not looked at, and may be anything.
UpdateTensor cleaned(UpdateTensor tensor, const Hyper& group) {
  for (int i = update_states(group); i < kUpdateStates; ++i) tensor.states[i] = nullptr;
  return tensor;
}

}  // namespace

template <class T>
bool Mirror<T>::is_same(const T& a, const T& b) {
  return same_bits(a, b);
}

template <class T>
cudaError_t Mirror<T>::upload(at::Device device, cudaStream_t stream) {
  if (!stale_) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (memory_ && !in_a_graph_) {
    error = cudaMemcpyAsync(memory_->arena.template at<T>(0), host_.data(),
                            host_.size() * sizeof(T), cudaMemcpyHostToDevice, stream);
  } else {
    auto memory = std::make_shared<Memory>();
    memory->arena.put(host_);
    error = memory->arena.allocate(device, stream);
    memory_ = std::move(memory);
    in_a_graph_ = false;
    captured_ = 0;
  }
  stale_ = error != cudaSuccess;
  return error;
}

template <class T>
cudaError_t Mirror<T>::keep_with(const Capture& capture) {
  if (!memory_ || capture.id == captured_) return cudaSuccess;
  const cudaError_t error = cuda::keep_with(capture.graph, memory_);
  if (error == cudaSuccess) captured_ = capture.id, in_a_graph_ = true;
  return error;
}

void Updates::note(const UpdateInputs& in, void* const* gradients, size_t tensors) {
  tensors_.resize(tensors);
  for (size_t t = 0; t < tensors; ++t)
    if (gradients[t])
      tensors_.set(t, cleaned(in.tensors[t], in.groups[in.tensors[t].group]));
  few_.clear();
  if (in.num_groups <= kFewGroups) {
    few_.assign(in.groups, in.groups + in.num_groups);
    groups_.resize(0);
    return;
  }
  groups_.resize(in.num_groups);
  for (int32_t i = 0; i < in.num_groups; ++i) groups_.set(i, in.groups[i]);
}

cudaError_t Updates::upload(at::Device device, cudaStream_t stream) {
  const cudaError_t error = tensors_.upload(device, stream);
  return error == cudaSuccess ? groups_.upload(device, stream) : error;
}

cudaError_t Updates::keep_with(const Capture& capture) {
  const cudaError_t error = tensors_.keep_with(capture);
  return error == cudaSuccess ? groups_.keep_with(capture) : error;
}

void Updates::used_on(c10::Stream stream) const {
  tensors_.used_on(stream);
  groups_.used_on(stream);
}

void Updates::write(UpdateArgs& args) const {
  args.tensors = tensors_.on_device();
  args.groups = groups_.on_device();
  std::copy(few_.begin(), few_.end(), args.few);
}

}  // namespace gradamp::cuda
