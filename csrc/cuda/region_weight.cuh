// Kernels of region aggregation's weight gradient. A warp sums the taps of one row of the kernel over
// its tile, tile by tile, so that no chain of sums is long; its lanes' sums are added up at the end.
#ifndef NLK_CUDA_REGION_WEIGHT_CUH_
#define NLK_CUDA_REGION_WEIGHT_CUH_

#include "cuda/ptx.cuh"
#include "cuda/region_load.cuh"

namespace nlk::cuda {
namespace {

struct WeightGradient {
  Clip x, grad;
  float* parts;  // (parts, channels, kt, kh, kw)
  Extents extents;
  Tiling tiling;
  std::int64_t batch, tiles_of_part;
  int kt, kh, kw;
};

template <int kT, int kH, int kW, int kAcross, int kLaneRows, int kChannels, int kFrames, int kRows,
          bool kIsLast>
struct FixedWeight {
  static constexpr int kKt = kT, kKh = kH, kKw = kW, kTileFrames = kFrames, kTileRows = kRows;
  static constexpr bool kLast = kIsLast;
  static_assert(kAcross * kLaneRows * kChannels == kWarpLanes, "the threads of a warp");
  NLK_BOTH static constexpr Threads lanes() { return {kAcross, kLaneRows, kChannels, kIsLast}; }
  NLK_BOTH static constexpr Box in() {
    return box_of(lanes(), kFrames, kRows, kT - 1, kH - 1, kW - 1);
  }
  NLK_BOTH static constexpr Box grad() { return box_of(lanes(), kFrames, kRows, 0, 0, 0); }
  static constexpr int kThreads = kH * kWarpLanes;
  static constexpr int kShared =
      4 *
      (box_of({kAcross, kLaneRows, kChannels, kIsLast}, kFrames, kRows, kT - 1, kH - 1, kW - 1).size() +
       box_of({kAcross, kLaneRows, kChannels, kIsLast}, kFrames, kRows, 0, 0, 0).size());
  static_assert(kShared <= 64 * 1024, "the smallest part's shared memory");
};

// Tile number `tile` of an item, whose tiles are ordered w, h, t; the items follow each other.
struct ItemTile {
  std::int64_t item;
  int t, h, w;
};
__device__ __forceinline__ ItemTile item_tile(std::int64_t tile, const Tiling& tiling) {
  const std::int64_t positions = tiling.positions();
  const TileIndex of = tile_index(static_cast<unsigned>(tile % positions), tiling);
  return {tile / positions, of.t, of.h, of.w};
}

// The sum of a number over the lanes that share a channel, in every one of them.
__device__ __forceinline__ float sum_of_channel(float number, const Threads lanes) {
  const int first = lanes.last ? lanes.channels : 1;
  for (int distance = first; distance < first * lanes.lanes_of_channel(); distance *= 2)
    number += shuffle_xor(number, distance);
  return number;
}

template <typename T, typename F>
__global__ void __launch_bounds__(F::kThreads) weight_kernel(const WeightGradient a) {
  constexpr Threads kLanes = F::lanes();
  constexpr Box kIn = F::in(), kGrad = F::grad();
  float* const numbers = reinterpret_cast<float*>(shared_memory_of_block());
  float* const grads = numbers + kIn.size();
  const int channel = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.tiling.groups)) *
                      kLanes.channels;
  const std::int64_t part = blockIdx.x / static_cast<unsigned>(a.tiling.groups);
  const std::int64_t tiles = a.batch * a.tiling.positions();
  const std::int64_t first = part * a.tiles_of_part;
  const std::int64_t last = first + a.tiles_of_part < tiles ? first + a.tiles_of_part : tiles;
  const int j = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int own_channel = kLanes.channel(lane), own_column = kLanes.column(lane);

  float totals[F::kKt][F::kKw] = {};
#pragma unroll 1
  for (std::int64_t number = first; number < last; ++number) {
    const ItemTile tile = item_tile(number, a.tiling);
    const int t = tile.t * F::kTileFrames, h = tile.h * F::kTileRows;
    const int w = tile.w * kLanes.across * kWide;
    __syncthreads();
    load_box<F::kLast>(place_of<const T>(a.x, tile.item, channel, t - F::kKt / 2, h - F::kKh / 2,
                                         w - F::kKw / 2),
                       kIn, a.extents, F::kThreads, numbers);
    load_box<F::kLast>(place_of<const T>(a.grad, tile.item, channel, t, h, w), kGrad, a.extents,
                       F::kThreads, grads);
    __syncthreads();
    float sums[F::kKt][F::kKw] = {};
#pragma unroll 1
    for (int own_row = kLanes.row(lane); own_row < F::kTileRows; own_row += kLanes.rows) {
      if (h + own_row >= a.extents.height) break;
      const float* const from = numbers + kIn.at(own_channel, 0, own_row + j, own_column);
      const float* const of_grad = grads + kGrad.at(own_channel, 0, own_row, own_column);
      float grad[F::kTileFrames][kWide];
#pragma unroll
      for (int frame = 0; frame < F::kTileFrames; ++frame)
#pragma unroll
        for (int i = 0; i < kWide; ++i) grad[frame][i] = of_grad[kGrad.at(0, frame, 0, i)];
#pragma unroll
      for (int frame = 0; frame < kIn.frames; ++frame) {
        float row[kWide + F::kKw - 1];
#pragma unroll
        for (int i = 0; i < kWide + F::kKw - 1; ++i) row[i] = from[kIn.at(0, frame, 0, i)];
#pragma unroll
        for (int f = 0; f < F::kKt; ++f) {
          const int own_frame = frame - f;
          if (own_frame < 0 || own_frame >= F::kTileFrames) continue;
#pragma unroll
          for (int k = 0; k < F::kKw; ++k)
#pragma unroll
            for (int i = 0; i < kWide; ++i)
              sums[f][k] = fmaf(grad[own_frame][i], row[i + k], sums[f][k]);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < F::kKt; ++f)
#pragma unroll
      for (int k = 0; k < F::kKw; ++k) totals[f][k] += sums[f][k];
  }

  const bool writes = kLanes.place(lane) == 0 && channel + own_channel < a.extents.channels;
  float* const parts = a.parts + (part * a.extents.channels + channel + own_channel) *
                                     (F::kKt * F::kKh * F::kKw);
#pragma unroll
  for (int f = 0; f < F::kKt; ++f)
#pragma unroll
    for (int k = 0; k < F::kKw; ++k) {
      const float total = sum_of_channel(totals[f][k], kLanes);
      if (writes) parts[(f * F::kKh + j) * F::kKw + k] = total;
    }
}

// Any size of the kernel, one channel. A frame's taps are shared out among the threads, and where
// there are fewer taps than threads the rows of a tile as well; sums lie in shared memory.
constexpr int kAnyRows = 16, kAnyColumns = 2 * kWide, kAnyWeightThreads = 128;
constexpr Threads kAnyShape = {kAnyColumns / kWide, kAnyRows, 1, false};

// Parts of the threads that a frame's taps leave idle.
NLK_BOTH constexpr int any_slices(int kh, int kw) {
  return kh * kw < kAnyWeightThreads ? kAnyWeightThreads / (kh * kw) : 1;
}
// Numbers of shared memory.
NLK_BOTH constexpr int any_weight_numbers(int kt, int kh, int kw) {
  return box_of(kAnyShape, 1, kAnyRows, 0, kh - 1, kw - 1).size() +
         box_of(kAnyShape, 1, kAnyRows, 0, 0, 0).size() + any_slices(kh, kw) * kt * kh * kw;
}

template <typename T>
__global__ void __launch_bounds__(kAnyWeightThreads, 4) weight_any_kernel(const WeightGradient a) {
  const Box in = box_of(kAnyShape, 1, kAnyRows, 0, a.kh - 1, a.kw - 1);
  const Box out = box_of(kAnyShape, 1, kAnyRows, 0, 0, 0);
  const int of_frame = a.kh * a.kw, taps = a.kt * of_frame;
  const int slices = any_slices(a.kh, a.kw);
  float* const numbers = reinterpret_cast<float*>(shared_memory_of_block());
  float* const grads = numbers + in.size();
  float* const totals = grads + out.size();  // (slices, kt, kh, kw)

  const int channel = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.extents.channels));
  const std::int64_t part = blockIdx.x / static_cast<unsigned>(a.extents.channels);
  const std::int64_t tiles = a.batch * a.tiling.positions();
  const std::int64_t first = part * a.tiles_of_part;
  const std::int64_t last = first + a.tiles_of_part < tiles ? first + a.tiles_of_part : tiles;
  for (int i = threadIdx.x; i < slices * taps; i += kAnyWeightThreads) totals[i] = 0.0f;

  for (std::int64_t number = first; number < last; ++number) {
    const ItemTile tile = item_tile(number, a.tiling);
    const int h = tile.h * kAnyRows, w = tile.w * kAnyColumns;
    for (int f = 0; f < a.kt; ++f) {
      const int frame = tile.t + f - a.kt / 2;
      if (frame < 0 || frame >= a.extents.frames) continue;
      __syncthreads();
      load_box<false>(place_of<const T>(a.x, tile.item, channel, frame, h - a.kh / 2, w - a.kw / 2),
                      in, a.extents, kAnyWeightThreads, numbers);
      load_box<false>(place_of<const T>(a.grad, tile.item, channel, tile.t, h, w), out, a.extents,
                      kAnyWeightThreads, grads);
      __syncthreads();
      for (int i = threadIdx.x; i < slices * of_frame; i += kAnyWeightThreads) {
        const int slice = i / of_frame, j = i % of_frame / a.kw, k = i % a.kw;
        float sum = 0.0f;
        for (int row = slice; row < kAnyRows && h + row < a.extents.height; row += slices)
          for (int column = 0; column < kAnyColumns; ++column)
            sum = fmaf(grads[out.at(0, 0, row, column)], numbers[in.at(0, 0, row + j, column + k)],
                       sum);
        totals[slice * taps + f * of_frame + i % of_frame] += sum;
      }
    }
  }
  __syncthreads();
  for (int tap = threadIdx.x; tap < taps; tap += kAnyWeightThreads) {
    float sum = 0.0f;
    for (int slice = 0; slice < slices; ++slice) sum += totals[slice * taps + tap];
    a.parts[(part * a.extents.channels + channel) * taps + tap] = sum;
  }
}

// d_weight of the sums of all parts, in their order.
constexpr int kFinishThreads = 128;
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    weight_finish_kernel(const float* parts, std::int64_t count, std::int64_t numbers, T* d_weight) {
  const std::int64_t number = std::int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (number >= numbers) return;
  double sum = 0.0;
  for (std::int64_t part = 0; part < count; ++part) sum += parts[part * numbers + number];
  d_weight[number] = to<T>(static_cast<float>(sum));
}

}  // namespace
}  // namespace nlk::cuda

#endif  // NLK_CUDA_REGION_WEIGHT_CUH_
