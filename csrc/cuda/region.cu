// Region aggregation on GPUs; see include/nlk/cuda/region.h.
//
// What bounds it, by count: 147 products of float32 a number (3x7x7) are 5.3 times the time of a copy
// in 16 bits on a part of 16896 products a clock at 4.3 TB/s and 1.76 GHz, 2.7 times in float32; 27
// products (3x3x3) are as long as a copy in 16 bits and half as long in float32. So the 3x7x7 is bound
// by products, at most a fifth (16 bits) or a third (float32) of the speed of a copy, and 3x3x3 by
// either. Predictions: nobody measured these kernels.
#include "cuda/launch.cuh"

#include "nlk/cuda/region.h"

#include "cuda/region_correlate.cuh"
#include "cuda/region_weight.cuh"

namespace nlk::cuda {
namespace {

constexpr Error kInvalid = 1;  // cudaErrorInvalidValue
constexpr std::int64_t kMostItems = 65535;

template <int kT, int kH, int kW>
struct Tiles {
  using Channels = Fixed<kT, kH, kW, kChannelsTile.threads.across, kChannelsTile.threads.rows,
                         kChannelsTile.threads.channels, kChannelsTile.frames, true>;
  using Narrow = Fixed<kT, kH, kW, kNarrowTile.threads.across, kNarrowTile.threads.rows,
                       kNarrowTile.threads.channels, kNarrowTile.frames, false>;
  using Middle = Fixed<kT, kH, kW, kMiddleTile.threads.across, kMiddleTile.threads.rows,
                       kMiddleTile.threads.channels, kMiddleTile.frames, false>;
  using Wide = Fixed<kT, kH, kW, kWideTile.threads.across, kWideTile.threads.rows,
                     kWideTile.threads.channels, kWideTile.frames, false>;
  template <const WeightTile& kTile>
  using Weight = FixedWeight<kT, kH, kW, kTile.lanes.across, kTile.lanes.rows, kTile.lanes.channels,
                             kTile.frames, kTile.rows, kTile.lanes.last>;
};

bool is_size(const RegionArguments& a, int kt, int kh, int kw) {
  return a.kernel[0] == kt && a.kernel[1] == kh && a.kernel[2] == kw;
}

// Whether places in a tensor and its halo are counted by ints.
bool is_served(const RegionArguments& a) {
  for (int axis = 1; axis < 5; ++axis)
    if (a.sizes[axis] > 0x7fffffff - 64) return false;
  for (const std::int64_t size : a.kernel)
    if (size < 1 || size > kRegionLargest || size % 2 == 0) return false;
  return true;
}

Extents extents_of(const RegionArguments& a) {
  return {static_cast<int>(a.sizes[1]), static_cast<int>(a.sizes[2]),
          static_cast<int>(a.sizes[3]), static_cast<int>(a.sizes[4])};
}

int width_of(const RegionArguments& a) {
  const int kh = static_cast<int>(a.kernel[1]), kw = static_cast<int>(a.kernel[2]);
  return region_width(a.sizes[3], a.sizes[4], kh, kw, static_cast<int>(a.kernel[0]) * kh * kw);
}

// Calls with_type(T{}) for the dtype.
template <typename Call>
Error with_dtype(int dtype, const Call& call) {
  if (dtype == 1) return call(float{});
  if (dtype == 2) return call(Bfloat16{});
  if (dtype == 3) return call(Half{});
  return kInvalid;
}

// Launches for at most 65535 batch items each.
template <typename Kernel>
Error for_items(Kernel kernel, int threads, int shared, Correlation& a, std::int64_t batch,
                const Launch& where) {
  const std::int64_t blocks = a.tiling.groups * a.tiling.positions();
  if (blocks > 0x7fffffff) return kInvalid;
  for (a.first_item = 0; a.first_item < batch; a.first_item += kMostItems) {
    const std::int64_t left = batch - a.first_item;
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(left < kMostItems ? left : kMostItems));
    if (const Error error = launch(kernel, grid, threads, shared, where, a)) return error;
  }
  return 0;
}

template <typename T, typename F>
Error correlate_fixed(const RegionArguments& arguments, Correlation& a, const Launch& where) {
  constexpr Threads kThreads = F::threads();
  a.tiling = tiling_of(arguments.sizes, kThreads.channels, F::kTileFrames, kThreads.rows,
                       kThreads.across * kWide);
  return for_items(correlate_kernel<T, F>, F::kCount, F::kShared, a, arguments.sizes[0],
                   where);
}

template <typename T, typename Of>
Error correlate_of(const RegionArguments& arguments, Correlation& a, const Launch& where) {
  if (arguments.channels_last) return correlate_fixed<T, typename Of::Channels>(arguments, a, where);
  switch (width_of(arguments)) {
    case 0: return correlate_fixed<T, typename Of::Narrow>(arguments, a, where);
    case 1: return correlate_fixed<T, typename Of::Middle>(arguments, a, where);
    default: return correlate_fixed<T, typename Of::Wide>(arguments, a, where);
  }
}

template <typename T, bool kLast>
Error correlate_any(const RegionArguments& arguments, Correlation& a, const Launch& where) {
  constexpr Threads kThreads = kLast ? kAnyChannels : kAnyThreads;
  a.tiling = tiling_of(arguments.sizes, kThreads.channels, 1, kThreads.rows, kThreads.across * kWide);
  const Box in = box_of(kThreads, 1, kThreads.rows, 0, a.kh - 1, a.kw - 1);
  const Box out = box_of(kThreads, 1, kThreads.rows, 0, 0, 0);
  const int numbers = in.size() > out.size() ? in.size() : out.size();
  const int shared = 4 * (numbers + kThreads.channels * a.kh * a.kw);
  return for_items(correlate_any_kernel<T, kLast>, kThreads.count(), shared, a, arguments.sizes[0],
                   where);
}

template <typename T, typename F>
Error weight_fixed(const RegionArguments& arguments, WeightGradient& a, const Launch& where) {
  constexpr Threads kLanes = F::lanes();
  a.tiling = tiling_of(arguments.sizes, kLanes.channels, F::kTileFrames, F::kTileRows,
                       kLanes.across * kWide);
  const Parts parts = region_parts(a.tiling.groups, a.batch * a.tiling.positions());
  a.tiles_of_part = parts.tiles;
  const std::int64_t blocks = parts.count * a.tiling.groups;
  if (blocks > 0x7fffffff) return kInvalid;
  return launch(weight_kernel<T, F>, dim3(static_cast<unsigned>(blocks)), F::kThreads, F::kShared,
                where, a);
}

template <typename T, typename Of>
Error weight_of(const RegionArguments& arguments, WeightGradient& a, const Launch& where) {
  if (arguments.channels_last)
    return weight_fixed<T, typename Of::template Weight<kChannelsWeightTile>>(arguments, a, where);
  switch (width_of(arguments)) {
    case 0: return weight_fixed<T, typename Of::template Weight<kNarrowWeightTile>>(arguments, a, where);
    case 1: return weight_fixed<T, typename Of::template Weight<kMiddleWeightTile>>(arguments, a, where);
    default: return weight_fixed<T, typename Of::template Weight<kWideWeightTile>>(arguments, a, where);
  }
}

template <typename T>
Error weight_any(const RegionArguments& arguments, WeightGradient& a, const Launch& where) {
  a.tiling = tiling_of(arguments.sizes, 1, 1, kAnyRows, kAnyColumns);
  const Parts parts = region_parts(a.tiling.groups, a.batch * a.tiling.positions());
  a.tiles_of_part = parts.tiles;
  const std::int64_t blocks = parts.count * a.tiling.groups;
  if (blocks > 0x7fffffff) return kInvalid;
  return launch(weight_any_kernel<T>, dim3(static_cast<unsigned>(blocks)), kAnyWeightThreads,
                4 * any_weight_numbers(a.kt, a.kh, a.kw), where, a);
}

}  // namespace

Error region_correlate(const RegionArguments& arguments, const Clip& out, bool flip,
                       const Launch& where) {
  if (!is_served(arguments)) return kInvalid;
  Correlation a = {};
  a.x = arguments.x;
  a.out = out;
  a.weight = arguments.weight;
  for (int axis = 0; axis < 4; ++axis) a.weight_strides[axis] = arguments.weight_strides[axis];
  a.extents = extents_of(arguments);
  a.kt = static_cast<int>(arguments.kernel[0]);
  a.kh = static_cast<int>(arguments.kernel[1]);
  a.kw = static_cast<int>(arguments.kernel[2]);
  a.flip = flip;
  return with_dtype(arguments.dtype, [&](auto number) -> Error {
    using T = decltype(number);
    if (is_size(arguments, 3, 7, 7)) return correlate_of<T, Tiles<3, 7, 7>>(arguments, a, where);
    if (is_size(arguments, 3, 3, 3)) return correlate_of<T, Tiles<3, 3, 3>>(arguments, a, where);
    if (arguments.channels_last) return correlate_any<T, true>(arguments, a, where);
    return correlate_any<T, false>(arguments, a, where);
  });
}

std::int64_t region_weight_parts(const RegionArguments& a) {
  Tiling tiling = tiling_of(a.sizes, 1, 1, kAnyRows, kAnyColumns);
  if (is_size(a, 3, 7, 7) || is_size(a, 3, 3, 3)) {
    const WeightTile tiles[] = {kNarrowWeightTile, kMiddleWeightTile, kWideWeightTile};
    const WeightTile tile = a.channels_last ? kChannelsWeightTile : tiles[width_of(a)];
    tiling = tiling_of(a.sizes, tile.lanes.channels, tile.frames, tile.rows,
                       tile.lanes.across * kWide);
  }
  return region_parts(tiling.groups, a.sizes[0] * tiling.positions()).count;
}

Error region_weight_gradient(const RegionArguments& arguments, const Clip& grad, float* parts,
                             void* d_weight, const Launch& where) {
  if (!is_served(arguments)) return kInvalid;
  WeightGradient a = {};
  a.x = arguments.x;
  a.grad = grad;
  a.parts = parts;
  a.extents = extents_of(arguments);
  a.batch = arguments.sizes[0];
  a.kt = static_cast<int>(arguments.kernel[0]);
  a.kh = static_cast<int>(arguments.kernel[1]);
  a.kw = static_cast<int>(arguments.kernel[2]);
  return with_dtype(arguments.dtype, [&](auto number) -> Error {
    using T = decltype(number);
    Error error;
    if (is_size(arguments, 3, 7, 7)) {
      error = weight_of<T, Tiles<3, 7, 7>>(arguments, a, where);
    } else if (is_size(arguments, 3, 3, 3)) {
      error = weight_of<T, Tiles<3, 3, 3>>(arguments, a, where);
    } else {
      error = weight_any<T>(arguments, a, where);
    }
    if (error != 0) return error;
    const std::int64_t numbers = arguments.sizes[1] * a.kt * a.kh * a.kw;
    const dim3 blocks(static_cast<unsigned>(divide_up(numbers, std::int64_t{kFinishThreads})));
    return launch(weight_finish_kernel<T>, blocks, kFinishThreads, 0, where,
                  static_cast<const float*>(parts), region_weight_parts(arguments), numbers,
                  static_cast<T*>(d_weight));
  });
}

}  // namespace nlk::cuda
