// A number of another lane of the warp, on a GPU or in the emulation of the tests.
#ifndef NLK_CUDA_LANES_CUH_
#define NLK_CUDA_LANES_CUH_

#include "cuda/ptx.cuh"

namespace nlk::cuda {

#ifdef NLK_CUDA_EMULATION

inline float shuffle(float x, int lane) {
  const std::uint32_t mine[1] = {emulation::float_to_bits(x)};
  return emulation::bits_to_float(emulation::exchange(mine)[lane][0]);
}
inline int shuffle(int x, int lane) {
  const std::uint32_t mine[1] = {static_cast<std::uint32_t>(x)};
  return static_cast<int>(emulation::exchange(mine)[lane][0]);
}

#else

// Every lane of the warp takes part.
template <typename Number>
__device__ inline Number shuffle(Number x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

#endif

}  // namespace nlk::cuda

#endif  // NLK_CUDA_LANES_CUH_
