// How the host code of a unit launches a kernel, on a GPU or in the emulation of the tests.
#ifndef NLK_CUDA_LAUNCH_CUH_
#define NLK_CUDA_LAUNCH_CUH_

#include "nlk/cuda/launch.h"

#ifdef NLK_CUDA_EMULATION
#include "test/cuda/emulation.h"
#else
#include <cuda_runtime.h>

namespace nlk::cuda {

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int device_, before_ = 0;
  cudaError_t error_;
};

// Runs kernel<<<blocks, threads, shared>>>(arguments...) on a device and a stream; more than 48 KB
// of shared memory are asked for first. The stream belongs to the device's primary context.
template <typename... Parameters, typename... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared,
             const Launch& where, Arguments... arguments) {
  // What an earlier call left behind is none of this launch's errors.
  static_cast<void>(cudaGetLastError());
  const OnDevice device(where.device);
  cudaError_t error = device.error();
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(where.stream)>>>(arguments...);
  return cudaGetLastError();
}

// The dynamic shared memory of a block, aligned to 1024 bytes.
__device__ inline unsigned char* shared_memory_of_block() {
  extern __shared__ __align__(1024) unsigned char nlk_shared_memory[];
  return nlk_shared_memory;
}

}  // namespace nlk::cuda
#endif

#endif  // NLK_CUDA_LAUNCH_CUH_
