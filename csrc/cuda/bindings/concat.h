// The bindings of the concatenation: nlkernels/ops/concat/cuda.py calls them.
#ifndef NLK_CUDA_BINDINGS_CONCAT_H_
#define NLK_CUDA_BINDINGS_CONCAT_H_

#include "cuda/bindings/common.h"
#include "nlk/cuda/concat.h"

namespace {

// Batch, sources, readers, channels.
inline nlk::cuda::ConcatArguments concat_arguments(const Sizes<4>& sizes) {
  nlk::cuda::ConcatArguments arguments{};
  arguments.batch = sizes[0];
  arguments.sources = sizes[1];
  arguments.readers = sizes[2];
  arguments.channels = sizes[3];
  return arguments;
}

inline void bind_concat(py::module_& module) {
  module.def("concat_sums", [](const Sizes<4>& sizes, bool has_dots) {
    nlk::cuda::ConcatArguments arguments = concat_arguments(sizes);
    arguments.dots = has_dots ? &arguments : nullptr;
    return nlk::cuda::concat_sums(arguments);
  });
  // Addresses of levels, order, scores and tops; whether the readers are the keys, with whom levels
  // fall; an address of 0 is a result that is not wanted.
  module.def("concat_walk", [](const PyLaunch& where, int dtype, const Sizes<4>& sizes,
                               const std::array<std::uintptr_t, 4>& sorted, bool keys_read,
                               std::int64_t divisor, const PyOperand& source, std::uintptr_t out,
                               const PyOperand& other, std::uintptr_t dots, std::uintptr_t sums) {
    nlk::cuda::ConcatArguments arguments = concat_arguments(sizes);
    arguments.dtype = dtype;
    arguments.levels = address<const float>(sorted[0]);
    arguments.order = address<const std::int64_t>(sorted[1]);
    arguments.scores = address<const float>(sorted[2]);
    arguments.tops = address<const float>(sorted[3]);
    arguments.first_reader = keys_read ? arguments.sources : 0;
    arguments.falls = keys_read;
    arguments.divisor = divisor;
    arguments.source = operand(source);
    arguments.out = address<void>(out);
    arguments.other = operand(other);
    arguments.dots = address<void>(dots);
    arguments.sums = address<float>(sums);
    check(nlk::cuda::concat_walk(arguments, launch(where)));
  });
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_CONCAT_H_
