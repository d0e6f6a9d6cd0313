// What the bindings of all CUDA kernels share.
#ifndef NLK_CUDA_BINDINGS_COMMON_H_
#define NLK_CUDA_BINDINGS_COMMON_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "nlk/cuda/launch.h"

namespace py = pybind11;

namespace {

// Number of the device, and its stream.
using PyLaunch = std::tuple<int, std::uintptr_t>;

template <std::size_t kRank>
using Sizes = std::array<std::int64_t, kRank>;

template <typename T>
T* address(std::uintptr_t integer) {
  return reinterpret_cast<T*>(integer);
}

inline nlk::cuda::Launch launch(const PyLaunch& from) {
  return {std::get<0>(from), address<void>(std::get<1>(from))};
}

// Address, and strides of batch items, rows and channels: `_cuda.operand` of a (B,N,C) tensor.
using PyOperand = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

inline nlk::cuda::Operand operand(const PyOperand& from) {
  const auto [data, item, row, channel] = from;
  return {address<void>(data), item, row, channel};
}

// Raises RuntimeError unless a launch succeeded. Launches do not wait, so the GIL is kept.
inline void check(nlk::cuda::Error error) {
  if (error != 0) {
    throw std::runtime_error(std::string("nlkernels: a CUDA kernel could not be launched: ") +
                             nlk::cuda::error_name(error) + ": " + nlk::cuda::error_text(error));
  }
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_COMMON_H_
