// 16-bit numbers and the few functions of them and of float that kernels need, on a GPU or in the
// emulation of the tests.
#ifndef NLK_CUDA_NUMBER_CUH_
#define NLK_CUDA_NUMBER_CUH_

#include <cstdint>

#include "cuda/launch.cuh"

#ifndef NLK_CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace nlk::cuda {

struct Half {
  std::uint16_t bits;
};

struct Bfloat16 {
  std::uint16_t bits;
};

#ifdef NLK_CUDA_EMULATION

inline float to_float(Half x) { return emulation::half_to_float(x.bits); }
inline float to_float(Bfloat16 x) { return emulation::bfloat16_to_float(x.bits); }
inline Half rounded(float x, Half) { return {emulation::float_to_half(x)}; }
inline Bfloat16 rounded(float x, Bfloat16) { return {emulation::float_to_bfloat16(x)}; }

#else

__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(Bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ inline Half rounded(float x, Half) { return {__half_as_ushort(__float2half_rn(x))}; }
__device__ inline Bfloat16 rounded(float x, Bfloat16) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float rounded(float x, float) { return x; }

// A float as a number of type T, rounded to nearest even.
template <typename T>
__device__ inline T to(float x) {
  return rounded(x, T{});
}

}  // namespace nlk::cuda

#endif  // NLK_CUDA_NUMBER_CUH_
