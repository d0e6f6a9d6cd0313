// Kernels of region aggregation's output and of the gradient of x; see region_tile.h for who sums
// what. Shared memory holds a tile of x with its halo, the taps, and at the end the results.
#ifndef NLK_CUDA_REGION_CORRELATE_CUH_
#define NLK_CUDA_REGION_CORRELATE_CUH_

#include "cuda/region_load.cuh"

namespace nlk::cuda {
namespace {

struct Correlation {
  Clip x, out;
  const void* weight;
  std::int64_t weight_strides[4];
  Extents extents;
  Tiling tiling;
  std::int64_t first_item;
  int kt, kh, kw;
  bool flip;
};

// One size of the kernel and one tile.
template <int kT, int kH, int kW, int kAcross, int kRows, int kChannels, int kFrames, bool kIsLast>
struct Fixed {
  static constexpr int kKt = kT, kKh = kH, kKw = kW, kTileFrames = kFrames;
  static constexpr bool kLast = kIsLast;
  static constexpr int kCount = kAcross * kRows * kChannels;
  NLK_BOTH static constexpr Threads threads() { return {kAcross, kRows, kChannels, kIsLast}; }
  NLK_BOTH static constexpr Box in() {
    return box_of(threads(), kFrames, kRows, kT - 1, kH - 1, kW - 1);
  }
  NLK_BOTH static constexpr Box out() { return box_of(threads(), kFrames, kRows, 0, 0, 0); }
  static constexpr int kTaps = kChannels * kT * kH * kW;
  static constexpr int kShared =
      4 * (box_of({kAcross, kRows, kChannels, kIsLast}, kFrames, kRows, kT - 1, kH - 1, kW - 1).size() +
           kTaps);
  static_assert(4 * box_of({kAcross, kRows, kChannels, kIsLast}, kFrames, kRows, 0, 0, 0).size() <=
                    kShared,
                "results take the place of inputs");
  static_assert(kShared <= 64 * 1024, "the smallest part's shared memory");
};

template <typename T, typename F>
__global__ void __launch_bounds__(F::kCount) correlate_kernel(const Correlation a) {
  constexpr Threads kThreads = F::threads();
  constexpr Box kIn = F::in(), kOut = F::out();
  constexpr int kCount = F::kCount;
  float* const numbers = reinterpret_cast<float*>(shared_memory_of_block());
  float* const taps = numbers + kIn.size();
  const TileIndex tile = tile_index(blockIdx.x, a.tiling);
  const std::int64_t item = a.first_item + blockIdx.y;
  const int channel = tile.group * kThreads.channels, t = tile.t * F::kTileFrames;
  const int h = tile.h * kThreads.rows, w = tile.w * kThreads.across * kWide;

  load_taps(static_cast<const T*>(a.weight), a.weight_strides, channel, kThreads.channels,
            a.extents, F::kKt, F::kKh, F::kKw, a.flip, kCount, taps);
  load_box<F::kLast>(place_of<const T>(a.x, item, channel, t - F::kKt / 2, h - F::kKh / 2,
                                       w - F::kKw / 2),
                     kIn, a.extents, kCount, numbers);
  __syncthreads();

  const int own = threadIdx.x;
  const int own_channel = kThreads.channel(own), own_row = kThreads.row(own);
  const int own_column = kThreads.column(own);
  float sums[F::kTileFrames][kWide] = {};
  if (h + own_row < a.extents.height) {
    const float* const from = numbers + kIn.at(own_channel, 0, own_row, own_column);
    const float* const factors = taps + own_channel * (F::kKt * F::kKh * F::kKw);
#pragma unroll 1
    for (int j = 0; j < F::kKh; ++j) {
      float tap[F::kKt][F::kKw];
#pragma unroll
      for (int f = 0; f < F::kKt; ++f)
#pragma unroll
        for (int k = 0; k < F::kKw; ++k) tap[f][k] = factors[(j * F::kKt + f) * F::kKw + k];
#pragma unroll
      for (int frame = 0; frame < kIn.frames; ++frame) {
        float row[kWide + F::kKw - 1];
#pragma unroll
        for (int i = 0; i < kWide + F::kKw - 1; ++i) row[i] = from[kIn.at(0, frame, j, i)];
#pragma unroll
        for (int f = 0; f < F::kKt; ++f) {
          const int own_frame = frame - f;
          if (own_frame < 0 || own_frame >= F::kTileFrames) continue;
#pragma unroll
          for (int k = 0; k < F::kKw; ++k)
#pragma unroll
            for (int i = 0; i < kWide; ++i)
              sums[own_frame][i] = fmaf(tap[f][k], row[i + k], sums[own_frame][i]);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int frame = 0; frame < F::kTileFrames; ++frame)
#pragma unroll
    for (int i = 0; i < kWide; ++i)
      numbers[kOut.at(own_channel, frame, own_row, own_column + i)] = sums[frame][i];
  __syncthreads();
  store_box<F::kLast>(place_of<T>(a.out, item, channel, t, h, w), kOut, a.extents, kCount,
                      numbers);
}

// Any size of the kernel: a frame of x at a time, its taps beside it. A window of kWide numbers moves
// along the row.
template <typename T, bool kLast>
__global__ void __launch_bounds__(128) correlate_any_kernel(const Correlation a) {
  constexpr Threads kThreads = kLast ? kAnyChannels : kAnyThreads;
  constexpr int kCount = kThreads.count();
  const Box in = box_of(kThreads, 1, kThreads.rows, 0, a.kh - 1, a.kw - 1);
  constexpr Box kOut = box_of(kThreads, 1, kThreads.rows, 0, 0, 0);
  float* const numbers = reinterpret_cast<float*>(shared_memory_of_block());
  float* const taps = numbers + (in.size() > kOut.size() ? in.size() : kOut.size());
  const TileIndex tile = tile_index(blockIdx.x, a.tiling);
  const std::int64_t item = a.first_item + blockIdx.y;
  const int channel = tile.group * kThreads.channels, t = tile.t;
  const int h = tile.h * kThreads.rows, w = tile.w * kThreads.across * kWide;
  const int own = threadIdx.x;
  const int own_channel = kThreads.channel(own), own_row = kThreads.row(own);
  const int own_column = kThreads.column(own);
  const T* const weight = static_cast<const T*>(a.weight);

  float sums[kWide] = {};
  for (int f = 0; f < a.kt; ++f) {
    const int frame = t + f - a.kt / 2;
    if (frame < 0 || frame >= a.extents.frames) continue;
    __syncthreads();
    const T* const of_frame = weight + (a.flip ? a.kt - 1 - f : f) * a.weight_strides[1];
    load_taps(of_frame, a.weight_strides, channel, kThreads.channels, a.extents, 1, a.kh, a.kw,
              a.flip, kCount, taps);
    load_box<kLast>(place_of<const T>(a.x, item, channel, frame, h - a.kh / 2, w - a.kw / 2), in,
                    a.extents, kCount, numbers);
    __syncthreads();
    for (int j = 0; j < a.kh; ++j) {
      const float* const from = numbers + in.at(own_channel, 0, own_row + j, own_column);
      const float* const factors = taps + (own_channel * a.kh + j) * a.kw;
      float window[kWide];
#pragma unroll
      for (int i = 1; i < kWide; ++i) window[i] = from[i - 1];
      for (int k = 0; k < a.kw; ++k) {
#pragma unroll
        for (int i = 0; i < kWide - 1; ++i) window[i] = window[i + 1];
        window[kWide - 1] = from[k + kWide - 1];
        const float factor = factors[k];
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[i] = fmaf(factor, window[i], sums[i]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWide; ++i)
    numbers[kOut.at(own_channel, 0, own_row, own_column + i)] = sums[i];
  __syncthreads();
  store_box<kLast>(place_of<T>(a.out, item, channel, t, h, w), kOut, a.extents, kCount, numbers);
}

}  // namespace
}  // namespace nlk::cuda

#endif  // NLK_CUDA_REGION_CORRELATE_CUH_
