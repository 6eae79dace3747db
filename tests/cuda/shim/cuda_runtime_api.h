// Enough of CUDA to compile the kernel and its engine for the host. Threads stand for blocks,
// and fibers for a block's threads: they run in random order between barriers, so that what needs
// a barrier and has none shows.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline

#define __builtin_assume(...)

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct Index {
  int x;
};

namespace emulator {

extern thread_local Index thread;  // of the fiber that runs
extern thread_local int exchanged[256][2];

enum class Barrier { kWarp, kBlock };
void wait(Barrier barrier);
void wait_for_all_blocks();
// The block's, of whatever size the launch asks for.
template <class T>
T* shared_memory() {
  alignas(16) static thread_local char memory[228 << 10];
  return reinterpret_cast<T*>(memory);
}

void delay();  // lets other blocks come in between, as chance will have it
// Adds one, or wraps to zero after `last`, as the instruction atom.<order>.inc does.
template <std::memory_order kOrder>
uint32_t increment(uint32_t* ticket, uint32_t last) {
  delay();
  const std::atomic_ref<uint32_t> shared(*ticket);
  uint32_t old = shared.load(std::memory_order_relaxed);
  while (!shared.compare_exchange_weak(old, old >= last ? 0 : old + 1, kOrder,
                                       std::memory_order_relaxed)) {
  }
  delay();
  return old;
}
// What the sanitizer, which knows of no fences, sees of one behind a ticket that was the last.
template <std::memory_order kOrder>
void fence(uint32_t* ticket) {
  if (kOrder == std::memory_order_acq_rel)
    std::atomic_ref<uint32_t>(*ticket).load(std::memory_order_acquire);
}

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= sizeof(exchanged[0]));
  std::memcpy(exchanged[thread.x], &value, sizeof(T));
  wait(Barrier::kWarp);
  std::memcpy(&value, exchanged[thread.x / 32 * 32 + source], sizeof(T));
  wait(Barrier::kWarp);
  return value;
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulator

#define threadIdx emulator::thread
extern thread_local Index blockIdx, gridDim;

inline void __syncthreads() { emulator::wait(emulator::Barrier::kBlock); }
inline void __syncwarp() { emulator::wait(emulator::Barrier::kWarp); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, (threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = threadIdx.x % 32;
  return emulator::shuffle(value, lane < by ? lane : lane - by);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  const int lane = threadIdx.x % 32;
  return emulator::shuffle(value, lane / width * width + source % width);
}
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  return emulator::increment<std::memory_order_relaxed>(counter, last);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    votes |= static_cast<unsigned>(emulator::shuffle(vote, lane)) << lane;
  return votes;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t x) { return emulator::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits<uint32_t>(x); }
inline double __hiloint2double(int high, int low) {
  return emulator::bits<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                                static_cast<uint32_t>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(emulator::bits<uint64_t>(x)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// ---- the runtime --------------------------------------------------------------------

#define CUDART_VERSION 13000

using cudaStream_t = struct StreamStandIn*;
using cudaEvent_t = struct EventStandIn*;
using cudaGraph_t = struct GraphStandIn*;
using cudaUserObject_t = struct UserObjectStandIn*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorSystemDriverMismatch = 803,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum { cudaEventDisableTiming = 2, cudaUserObjectNoDestructorSync = 1, cudaGraphUserObjectMove = 1 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph, void*, void*,
                                     void*);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* what, void (*destroy)(void*),
                                 unsigned count, unsigned flags);
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags);
cudaError_t cudaLaunchKernel(const void* kernel, int blocks, int threads, void** parameters,
                             size_t shared, cudaStream_t stream);
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, int blocks, int threads,
                                        void** parameters, size_t shared, cudaStream_t stream);
