// What the host side of all CUDA kernels shares. Needs no CUDA header: bindings include it.
#ifndef NLK_CUDA_LAUNCH_H_
#define NLK_CUDA_LAUNCH_H_

#include <cstdint>

namespace nlk::cuda {

// Where a kernel runs: number of the device, and a cudaStream_t of its primary context.
struct Launch {
  int device;
  void* stream;
};

// A cudaError_t, 0 for success. A kernel that runs into an error says so at a later call.
using Error = int;

// "cudaErrorInvalidValue: invalid argument".
const char* error_name(Error error);
const char* error_text(Error error);

// Devices that the driver offers; 0 where there is no driver.
int device_count();

// The CUDA of this build and the newest one that the driver serves: 13000 for 13.0, 0 for none.
int runtime_version();
int driver_version();

// Shared memory in bytes that a block of a device may ask for; 0 where it cannot be asked.
int shared_memory(int device);

// Address and element strides of a (B,N,C) tensor: batch items, rows, channels.
struct Operand {
  void* data;
  std::int64_t item, row, channel;
};

}  // namespace nlk::cuda

#endif  // NLK_CUDA_LAUNCH_H_
