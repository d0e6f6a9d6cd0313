// Tensor maps and launches in the model of the machine.
#ifndef NLK_TEST_CUDA_HOPPER_LAUNCH_H_
#define NLK_TEST_CUDA_HOPPER_LAUNCH_H_

#include <cstdio>

#include "nlk/cuda/launch.h"
#include "test/cuda/hopper/machine.h"

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;

namespace nlk::cuda::hopper {

struct OnDevice {
  explicit OnDevice(int) {}
  Error error() const { return cudaSuccess; }
};

// What the copy engine asks of a tensor is checked as cuTensorMapEncodeTiled does.
inline Error make_map(TensorMap& map, bool, void* data, const std::int64_t (&sizes)[3],
                      const std::int64_t (&strides)[3], int lines) {
  map.data = static_cast<const std::uint16_t*>(data);
  map.box[0] = kLineNumbers;
  map.box[1] = lines;
  bool legal = reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && strides[0] == 1 && lines <= 256;
  for (int d = 0; d < 3; ++d) {
    map.sizes[d] = sizes[d];
    map.strides[d] = strides[d];
    legal = legal && sizes[d] > 0 && (d == 0 || (strides[d] > 0 && strides[d] % 8 == 0));
  }
  return legal ? cudaSuccess : cudaErrorInvalidValue;
}

// `where.device` is the seed.
template <typename... Parameters, typename... Arguments>
Error launch_clusters(void (*kernel)(Parameters...), int blocks, int cluster, int threads, int shared,
                      const Launch& where, const Arguments&... arguments) {
  if (shared > 232448) return cudaErrorInvalidValue;
  machine::Machine model(static_cast<std::uint64_t>(where.device));
  try {
    model.run(blocks, cluster, threads, [&] { kernel(arguments...); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulated kernel: %s\n", error.what());
    return 719;
  }
  return cudaSuccess;
}

}  // namespace nlk::cuda::hopper

#endif  // NLK_TEST_CUDA_HOPPER_LAUNCH_H_
