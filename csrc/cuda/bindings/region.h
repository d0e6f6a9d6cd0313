// The bindings of region aggregation: nlkernels/ops/region/cuda.py calls them.
#ifndef NLK_CUDA_BINDINGS_REGION_H_
#define NLK_CUDA_BINDINGS_REGION_H_

#include "cuda/bindings/common.h"
#include "nlk/cuda/region.h"

namespace {

// Address, and strides of (B,C,T,H,W).
using PyClip = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                          std::int64_t>;

inline nlk::cuda::Clip clip(const PyClip& from) {
  const auto [data, item, channel, frame, row, column] = from;
  return {address<void>(data), {item, channel, frame, row, column}};
}

// dtype, (B,C,T,H,W), (kt,kh,kw), whether channels are neighbours.
using PyRegion = std::tuple<int, Sizes<5>, Sizes<3>, bool>;

inline nlk::cuda::RegionArguments region_arguments(const PyRegion& from) {
  nlk::cuda::RegionArguments arguments{};
  arguments.dtype = std::get<0>(from);
  for (int axis = 0; axis < 5; ++axis) arguments.sizes[axis] = std::get<1>(from)[axis];
  for (int axis = 0; axis < 3; ++axis) arguments.kernel[axis] = std::get<2>(from)[axis];
  arguments.channels_last = std::get<3>(from);
  return arguments;
}

inline void bind_region(py::module_& module) {
  module.attr("region_largest") = nlk::cuda::kRegionLargest;
  module.def("region_correlate", [](const PyLaunch& where, const PyRegion& region, const PyClip& x,
                                    std::uintptr_t weight, const Sizes<4>& weight_strides,
                                    const PyClip& out, bool flip) {
    nlk::cuda::RegionArguments arguments = region_arguments(region);
    arguments.x = clip(x);
    arguments.weight = address<void>(weight);
    for (int axis = 0; axis < 4; ++axis) arguments.weight_strides[axis] = weight_strides[axis];
    check(nlk::cuda::region_correlate(arguments, clip(out), flip, launch(where)));
  });
  module.def("region_weight_parts", [](const PyRegion& region) {
    return nlk::cuda::region_weight_parts(region_arguments(region));
  });
  module.def("region_weight_gradient",
             [](const PyLaunch& where, const PyRegion& region, const PyClip& x, const PyClip& grad,
                std::uintptr_t parts, std::uintptr_t d_weight) {
               nlk::cuda::RegionArguments arguments = region_arguments(region);
               arguments.x = clip(x);
               check(nlk::cuda::region_weight_gradient(arguments, clip(grad), address<float>(parts),
                                                       address<void>(d_weight), launch(where)));
             });
}

}  // namespace

#endif  // NLK_CUDA_BINDINGS_REGION_H_
