// Not part of the extension: kernels that a test compiles to look at the machine code of one
// dtype at a time.
#include "tile.cuh"

namespace gradamp::cuda {

// Everything that is done for each element.
template <class E>
__device__ inline void probe_elements(char* data, float* out, uint32_t signs, int valid,
                                      typename E::Wide factor) {
  const Step step = {data, reinterpret_cast<const uint32_t*>(data + kStepBytes)};
  const uint4 raw = load_vector<sizeof(typename E::Raw) == 2>(step, 0);
  const auto shift = load_element<E>(step, 0, 1);
  const VectorSums<E> full = add_up<E, true>(raw, shift, signs, valid);
  const VectorSums<E> part = add_up<E, false>(load_vector<false>(step, 1), shift, signs, valid);
  put_part(valid, valid == 0, static_cast<float>(full.part + part.part));
  *reinterpret_cast<uint4*>(data + lane_index() * 16) = scaled<E>(raw, factor);
  scale_element<E>(element_at<E>(step, 0, valid), data, factor);
  out[threadIdx.x] = static_cast<float>(full.d + full.d2 + part.d + part.d2);
}

// The whole steps of a tile, read only or written.
template <class E, bool kWrite>
__device__ inline void probe_tile(const StepArgs& a, const AddressTable<kSmallTable>& table,
                                  LaneSums* out) {
  Stream<kSmallTable> stream(a, table, static_cast<int>(blockIdx.x));
  stream.start();
  LaneSums sums;
  measure_whole<E, false, kWrite, false>(stream, warp_memory().work, 0, sums);
  out[threadIdx.x] = sums;
}

#define GRADAMP_PROBE(name, E)                                                                   \
  extern "C" __global__ void elements_##name(char* data, float* out, uint32_t signs, int valid,  \
                                             float factor) {                                     \
    probe_elements<E>(data, out, signs, valid, factor);                                          \
  }                                                                                              \
  extern "C" __global__ void read_##name(const __grid_constant__ StepArgs a,                     \
                                         const __grid_constant__ AddressTable<kSmallTable> table, \
                                         LaneSums* out) {                                        \
    probe_tile<E, false>(a, table, out);                                                         \
  }                                                                                              \
  extern "C" __global__ void write_##name(const __grid_constant__ StepArgs a,                    \
                                          const __grid_constant__ AddressTable<kSmallTable> table, \
                                          LaneSums* out) {                                       \
    probe_tile<E, true>(a, table, out);                                                          \
  }

GRADAMP_PROBE(float32, Float32)
GRADAMP_PROBE(bfloat16, BFloat16)
GRADAMP_PROBE(float16, Float16)
GRADAMP_PROBE(float64, Float64)

}  // namespace gradamp::cuda
