// Not part of the extension: kernels that a test compiles to look at the machine code of one
// dtype at a time.
#include "tile.cuh"

namespace gradamp::cuda {

// Everything that is done for each element.
template <class E>
__device__ inline void probe_elements(char* data, float* out, uint32_t signs, int valid,
                                      typename E::Wide factor, float* buckets) {
  const Cursor p(data + lane_index() * 16);
  const uint4 raw = complete<false>(load_word(p, 0), p, 0);
  const auto shift = first_element<E>(raw);
  const VectorSums<E> full = add_up<E, true>(raw, shift, signs, valid);
  const VectorSums<E> part = add_up<E, false>(load_part<E>(data, valid), shift, signs, valid);
  const VectorSums<E> again = add_up_scaled<E, true>(raw, shift, full.d2, valid, factor);
  const typename E::Wide sums[1] = {full.part + part.part};
  store_buckets<E, 1>(sums, valid, valid, buckets);
  store_row<E, true>(p, 0, scaled<E>(raw, factor));
  store_row<E, false>(p, 1, scaled<E>(raw, factor));
  out[threadIdx.x] = static_cast<float>(full.d + full.d2 + part.d + part.d2 + again.d + again.d2);
}

#define GRADAMP_PROBE(name, E)                                                                    \
  extern "C" __global__ void elements_##name(char* data, float* out, uint32_t signs, int valid,   \
                                             float factor, float* buckets) {                      \
    probe_elements<E>(data, out, signs, valid, factor, buckets);                                  \
  }                                                                                               \
  extern "C" __global__ void tile_##name(TileData tile, Pass<E> pass, Moments* out) {             \
    out[threadIdx.x] = measure_elements<E>(tile, pass);                                           \
  }

GRADAMP_PROBE(float32, Float32)
GRADAMP_PROBE(bfloat16, BFloat16)
GRADAMP_PROBE(float16, Float16)
GRADAMP_PROBE(float64, Float64)

}  // namespace gradamp::cuda
