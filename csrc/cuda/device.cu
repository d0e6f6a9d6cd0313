// What a machine offers.
#include <cuda_runtime.h>

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

const char* error_name(Error error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

const char* error_text(Error error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int shared_memory(int device) {
  int bytes = 0;
  const auto asked = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  return cudaDeviceGetAttribute(&bytes, asked, device) == cudaSuccess ? bytes : 0;
}

}  // namespace nlk::cuda
