// Enough of torch to compile csrc/cuda/engine.cpp for the host: tensors of bytes, a current
// stream, and nothing else. Tests count the tensors that live and see what is recorded on them.
#pragma once

#include <cstdint>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

#define TORCH_CHECK(condition, ...)                                        \
  do {                                                                     \
    if (!(condition)) throw std::runtime_error(standin::text(__VA_ARGS__)); \
  } while (false)

namespace standin {

template <class... T>
std::string text(const T&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

extern int live_tensors;
extern long current_stream;
void log(const std::string& line);

struct Storage {
  explicit Storage(size_t bytes, std::string name) : memory(bytes), name(std::move(name)) {
    ++live_tensors;
  }
  ~Storage() { --live_tensors; }
  std::vector<uint64_t> memory;  // in words: aligned
  std::string name;
};

}  // namespace standin

namespace c10 {
using DeviceIndex = signed char;
struct Device {
  DeviceIndex index() const { return 0; }
};
struct Stream {
  long id;
};
}  // namespace c10

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};
class CUDAStream {
 public:
  explicit CUDAStream(long id) : id_(id) {}
  bool operator==(const CUDAStream& other) const { return id_ == other.id_; }
  operator cudaStream_t() const { return stream(); }
  cudaStream_t stream() const { return reinterpret_cast<cudaStream_t>(id_); }
  Stream unwrap() const { return {id_}; }

 private:
  long id_;
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex) { return CUDAStream(standin::current_stream); }
}  // namespace c10::cuda

namespace at {
using c10::Device;
constexpr int kByte = 0;
struct TensorOptions {
  TensorOptions dtype(int) const { return {}; }
  TensorOptions device(Device) const { return {}; }
};
class Tensor {
 public:
  Tensor() = default;
  Tensor(size_t bytes, std::string name)
      : storage_(std::make_shared<standin::Storage>(bytes / 8 + 1, std::move(name))) {}
  void* mutable_data_ptr() const { return storage_->memory.data(); }
  void record_stream(c10::Stream stream) const {
    standin::log(standin::text("use ", storage_->name, " on ", stream.id));
  }

 private:
  std::shared_ptr<standin::Storage> storage_;
};
inline Tensor empty(std::initializer_list<int64_t> sizes, const TensorOptions&) {
  return {static_cast<size_t>(*sizes.begin()), "arena"};
}
}  // namespace at
