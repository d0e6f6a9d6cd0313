// What csrc/cuda/device.cu says of a machine, in the emulation: no device.
#include "nlk/cuda/launch.h"

namespace nlk::cuda {

const char* error_name(Error error) { return error ? "emulation" : "cudaSuccess"; }
const char* error_text(Error error) { return error ? "more than a block may have" : "no error"; }
int device_count() { return 0; }
int runtime_version() { return 0; }
int driver_version() { return 0; }
int shared_memory(int) { return 0; }

}  // namespace nlk::cuda
