// Enough of CUDA to compile the kernel for the host, where fibers stand for its threads:
// they run in random order between barriers, so what needs a barrier and has none shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ static  // blocks run one after another
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

extern Index thread;  // of the fiber that runs
extern int exchanged[256][2];

enum class Barrier { kWarp, kBlock };
void wait(Barrier barrier);
uint32_t increment(uint32_t* ticket, uint32_t last);  // wraps to zero after `last`

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
extern Index blockIdx, gridDim;

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
inline long long clock64() {
  static long long now = 0;
  return now += 1000;
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

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int values[] = {2, 1, 100 << 10};
  return *value = values[name], cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 size_t) {
  return *blocks = 3, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, int blocks, int threads, void** parameters,
                             size_t shared, cudaStream_t stream);
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, int blocks, int threads,
                                        void** parameters, size_t shared, cudaStream_t stream);
