// Bringing boxes of a clip to shared memory as float32, and taking results back.
#ifndef NLK_CUDA_REGION_LOAD_CUH_
#define NLK_CUDA_REGION_LOAD_CUH_

#include "cuda/launch.cuh"
#include "cuda/number.cuh"
#include "cuda/region_tile.h"
#include "nlk/cuda/region.h"

namespace nlk::cuda {
namespace {

// Sizes C, T, H, W of every clip of a call.
struct Extents {
  int channels, frames, height, width;
};

// A box of one batch item, and what lies where in it: zeros outside of the clip.
template <typename T>
struct Place {
  T* item;                // of the batch
  const std::int64_t* strides;
  int channel, t, h, w;   // of the box's first number; may lie before the clip
};

template <typename T>
__device__ Place<T> place_of(const Clip& clip, std::int64_t item, int channel, int t, int h, int w) {
  return {static_cast<T*>(clip.data) + item * clip.strides[0], clip.strides, channel, t, h, w};
}

// Rows of a box are shared out among eights of lanes, or its positions among groups of lanes that
// hold its channels. `visit(address, index)` of every number of the box that lies in the clip, and
// `outside(index)` of the others; index is that of Box::at.
template <bool kLast, typename T, typename Visit, typename Outside>
__device__ __forceinline__ void for_each(const Place<T>& place, const Box box, const Extents& extents,
                                         int threads, const Visit& visit, const Outside& outside) {
  const int thread = threadIdx.x;
  const int rows = box.frames * box.rows;
  if constexpr (kLast) {
    const int channel = thread % box.channels;
    const bool present = place.channel + channel < extents.channels;
    T* const from = place.item + (place.channel + channel) * place.strides[1];
    for (int i = thread / box.channels; i < rows * box.columns; i += threads / box.channels) {
      const int column = i % box.columns, row = i / box.columns % box.rows;
      const int frame = i / box.columns / box.rows;
      const int t = place.t + frame, h = place.h + row, w = place.w + column;
      const int index = box.at(channel, frame, row, column);
      if (present && t >= 0 && t < extents.frames && h >= 0 && h < extents.height && w >= 0 &&
          w < extents.width) {
        visit(from + (t * place.strides[2] + h * place.strides[3] + w * place.strides[4]), index);
      } else {
        outside(index);
      }
    }
  } else {
    constexpr int kLanes = 8;
    for (int i = thread / kLanes; i < box.channels * rows; i += threads / kLanes) {
      const int row = i % box.rows, frame = i / box.rows % box.frames, channel = i / rows;
      const int t = place.t + frame, h = place.h + row;
      const bool present = place.channel + channel < extents.channels && t >= 0 &&
                           t < extents.frames && h >= 0 && h < extents.height;
      T* const from = place.item + ((place.channel + channel) * place.strides[1] +
                                    t * place.strides[2] + h * place.strides[3]);
      const int index = box.at(channel, frame, row, 0);
#pragma unroll 2
      for (int column = thread % kLanes; column < box.columns; column += kLanes) {
        const int w = place.w + column;
        if (present && w >= 0 && w < extents.width) {
          visit(from + w * place.strides[4], index + column);
        } else {
          outside(index + column);
        }
      }
    }
  }
}

template <bool kLast, typename T>
__device__ __forceinline__ void load_box(const Place<const T>& place, const Box box,
                                         const Extents& extents, int threads, float* shared) {
  for_each<kLast>(
      place, box, extents, threads,
      [&](const T* address, int index) { shared[index] = to_float(*address); },
      [&](int index) { shared[index] = 0.0f; });
}

template <bool kLast, typename T>
__device__ __forceinline__ void store_box(const Place<T>& place, const Box box,
                                          const Extents& extents, int threads, const float* shared) {
  for_each<kLast>(
      place, box, extents, threads,
      [&](T* address, int index) { *address = to<T>(shared[index]); }, [](int) {});
}

// The tile of a block: its channels and positions. blockIdx.x counts tiles, blockIdx.y items.
struct TileIndex {
  int group, t, h, w;
};
__device__ __forceinline__ TileIndex tile_index(unsigned number, const Tiling& tiling) {
  const unsigned w = static_cast<unsigned>(tiling.w), h = static_cast<unsigned>(tiling.h);
  const unsigned t = static_cast<unsigned>(tiling.t);
  return {static_cast<int>(number / w / h / t), static_cast<int>(number / w / h % t),
          static_cast<int>(number / w % h), static_cast<int>(number % w)};
}

// The taps of a group of channels, (channel, row, frame, column): those of one row of the kernel
// together. Mirrored with `flip`; zeros for channels that do not exist.
template <typename T>
__device__ __forceinline__ void load_taps(const T* weight, const std::int64_t* strides, int first,
                                          int channels, const Extents& extents, int kt, int kh,
                                          int kw, bool flip, int threads, float* shared) {
  for (int i = threadIdx.x; i < channels * kt * kh * kw; i += threads) {
    const int k = i % kw, j = i / (kw * kt) % kh, f = i / kw % kt;
    const int channel = i / (kw * kt * kh);
    const int tap_t = flip ? kt - 1 - f : f, tap_h = flip ? kh - 1 - j : j;
    const int tap_w = flip ? kw - 1 - k : k;
    const bool present = first + channel < extents.channels;
    shared[i] = present ? to_float(weight[(first + channel) * strides[0] + tap_t * strides[1] +
                                       tap_h * strides[2] + tap_w * strides[3]])
                        : 0.0f;
  }
}

}  // namespace
}  // namespace nlk::cuda

#endif  // NLK_CUDA_REGION_LOAD_CUH_
