// Tensor maps and launches of clusters, on a GPU or in the tests' model of it.
#ifndef NLK_CUDA_HOPPER_LAUNCH_CUH_
#define NLK_CUDA_HOPPER_LAUNCH_CUH_

#include "nlk/cuda/hopper/ptx.h"
#include "nlk/cuda/launch.h"

#ifdef NLK_HOPPER_EMULATION
#include "test/cuda/hopper/launch.h"
#else

#include <cuda_runtime.h>

#include "cuda/launch.cuh"

namespace nlk::cuda::hopper {

// cuTensorMapEncodeTiled, asked of the driver that is loaded: nothing links against libcuda.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

inline Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                             cudaEnableDefault, &status);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// A map of 16-bit numbers with boxes of 64 x `lines` x 1, swizzled; strides in elements, the innermost 1.
inline Error make_map(TensorMap& map, bool bfloat, void* data, const std::int64_t (&sizes)[3],
                      const std::int64_t (&strides)[3], int lines) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(sizes[0]), static_cast<cuuint64_t>(sizes[1]),
                              static_cast<cuuint64_t>(sizes[2])};
  const cuuint64_t steps[2] = {static_cast<cuuint64_t>(2 * strides[1]),
                               static_cast<cuuint64_t>(2 * strides[2])};
  const cuuint32_t box[3] = {kLineNumbers, static_cast<cuuint32_t>(lines), 1}, unit[3] = {1, 1, 1};
  const CUresult result = encode(
      &map, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, data, dims,
      steps, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// As launch() of cuda/launch.cuh, for clusters of blocks, on the current device.
template <typename... Parameters, typename... Arguments>
Error launch_clusters(void (*kernel)(Parameters...), int blocks, int cluster, int threads, int shared,
                      const Launch& where, const Arguments&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_HOPPER_EMULATION

#endif  // NLK_CUDA_HOPPER_LAUNCH_CUH_
