// The kernels that read x of context pooling; see include/nlk/cuda/gate.h and gate_tile.h.
#ifndef NLK_CUDA_GATE_READ_CUH_
#define NLK_CUDA_GATE_READ_CUH_

#include "cuda/gate_tile.h"
#include "cuda/lanes.cuh"
#include "nlk/cuda/gate.h"

namespace nlk::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

// Positions in (T, H, W) order; `is_flat` where each lies `step` from the next.
struct Positions {
  std::int64_t strides[3], step;
  unsigned count, height, width;
  bool is_flat;

  __device__ __forceinline__ std::int64_t offset(unsigned position) const {
    if (is_flat) return position * step;
    const unsigned row = position / width;
    return row / height * strides[0] + row % height * strides[1] + position % width * strides[2];
  }
};

struct Reading {
  const void* x;
  std::int64_t item, channel;  // strides
  Positions positions;
  const void* weight;
  const void* grad;
  const void* context;
  float* scores;
  float* parts;
  float* part_stats;
  std::int64_t splits, tiles_of_split, tiles;
  int channels;
  float unit;
};

// Of the positions so far: the largest logit, and this lane's share of the sums.
struct Softmax {
  float top, total, error;
};

__device__ __forceinline__ float negative_infinity() { return -__builtin_huge_valf(); }

// Takes in a tile: `shared_by` lanes beside each other have its logits. Returns by what the position's
// row is multiplied; `fade` is what sums so far are multiplied by.
template <bool kBackward>
__device__ __forceinline__ float take(Softmax& softmax, float logit, float above, bool is_inside,
                                      int shared_by, float unit, float& fade) {
  float largest = is_inside ? logit : negative_infinity();
  for (int distance = shared_by / 2; distance > 0; distance /= 2)
    largest = fmaxf(largest, shuffle_xor(largest, distance));
  largest = fmaxf(largest, softmax.top);
  // Where every logit so far is -inf nothing may be subtracted: -inf - -inf is NaN.
  const float origin = largest == negative_infinity() ? 0.0f : largest;
  fade = exp2f((softmax.top - origin) * kLog2E);
  float share = is_inside ? exp2f((logit - origin) * kLog2E) * unit : 0.0f;
  softmax.total = softmax.total * fade + share;
  if (kBackward) {
    share = is_inside ? share * above : 0.0f;
    softmax.error = softmax.error * fade + share;
  }
  softmax.top = largest;
  return share;
}

// Sums each of kCount numbers over lanes that differ in the bits up to kDistance: every exchange
// halves what a lane holds, until the bits or the numbers end. The lane whose bits are 0 keeps the
// first ones.
template <int kCount, int kDistance, int kHeld>
__device__ __forceinline__ void sum_and_halve(float (&numbers)[kHeld]) {
  if constexpr (kDistance > 0 && kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool is_upper = (threadIdx.x & kDistance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = is_upper ? numbers[i + kHalf] : numbers[i];
      const float given = is_upper ? numbers[i] : numbers[i + kHalf];
      numbers[i] = kept + shuffle_xor(given, kDistance);
    }
    sum_and_halve<kHalf, kDistance / 2>(numbers);
  }
}

// Sums each of kGateTogether numbers over a warp: lanes 4 i to 4 i + 3 get number i.
__device__ __forceinline__ float sum_of_warp(float (&numbers)[kGateTogether]) {
  sum_and_halve<kGateTogether, 16>(numbers);
  numbers[0] += shuffle_xor(numbers[0], 2);
  return numbers[0] + shuffle_xor(numbers[0], 1);
}

// The factors of a block's item: weight, and with kBackward grad behind it. Returns grad . context,
// the same in every thread; `sums` has room for a number a warp.
template <typename T, bool kBackward>
__device__ __forceinline__ float load_factors(const Reading& a, std::int64_t item, float* factors,
                                              float* sums) {
  const int threads = blockDim.x;
  const T* const grad = static_cast<const T*>(a.grad) + item * a.channels;
  const T* const context = static_cast<const T*>(a.context) + item * a.channels;
  float expected = 0.0f;
  for (int channel = threadIdx.x; channel < a.channels; channel += threads) {
    factors[channel] = to_float(static_cast<const T*>(a.weight)[channel]);
    if (kBackward) {
      const float number = to_float(grad[channel]);
      factors[a.channels + channel] = number;
      expected = fmaf(number, to_float(context[channel]), expected);
    }
  }
  if constexpr (kBackward) {
    for (int distance = 16; distance > 0; distance /= 2) expected += shuffle_xor(expected, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = expected;
    __syncthreads();
    expected = 0.0f;
    for (int warp = 0; warp < threads / 32; ++warp) expected += sums[warp];
  }
  __syncthreads();
  return expected;
}

// The numbers of `stride` lanes of every warp, added up in the order of the warps. A warp's lane
// writes where `writes`, at `place`; two buffers take turns, so that one barrier is enough.
__device__ __forceinline__ float sum_of_warps(float number, bool writes, int place, int stride,
                                              float* buffer) {
  if (writes) buffer[threadIdx.x / 32 * stride + place] = number;
  __syncthreads();
  float sum = 0.0f;
  const int warps = blockDim.x / 32, own = threadIdx.x % stride;
  for (int warp = 0; warp < warps; ++warp) sum += buffer[warp * stride + own];
  return sum;
}

// The two numbers of a position after the barrier of the first.
template <bool kBackward>
__device__ __forceinline__ void sum_both(float& logit, float& above, bool writes, int place,
                                         int stride, float* buffer) {
  const int size = blockDim.x / 32 * stride;
  if (kBackward && writes) buffer[size + threadIdx.x / 32 * stride + place] = above;
  logit = sum_of_warps(logit, writes, place, stride, buffer);
  if constexpr (kBackward) {
    above = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp)
      above += buffer[size + warp * stride + threadIdx.x % stride];
  }
}

// The split's statistics: sums over the lanes that share a tile. Written by the block's first thread.
__device__ __forceinline__ void write_stats(const Reading& a, Softmax softmax, int shared_by) {
  for (int distance = shared_by / 2; distance > 0; distance /= 2) {
    softmax.total += shuffle_xor(softmax.total, distance);
    softmax.error += shuffle_xor(softmax.error, distance);
  }
  if (threadIdx.x != 0) return;
  float* const stats = a.part_stats + std::int64_t{blockIdx.x} * 3;
  stats[0] = softmax.top;
  stats[1] = softmax.total;
  stats[2] = softmax.error;
}

// The products of the first `present` of a thread's numbers with factors `step` apart: in several
// chains of sums, which round less than a long one.
__device__ __forceinline__ float product_of(const float (&numbers)[kGateHeld], const float* factor,
                                            int step, int present) {
  constexpr int kChains = 4;
  float sums[kChains] = {};
#pragma unroll
  for (int slot = 0; slot < kGateHeld; ++slot) {
    if (slot < present) sums[slot % kChains] = fmaf(*factor, numbers[slot], sums[slot % kChains]);
    factor += step;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Positions are neighbours in memory, or nothing is. One block at least: where nothing is said, ptxas
// spills a few registers for the sake of more.
template <typename T, int kPositions, bool kBackward>
__global__ void __launch_bounds__(kGateThreads, 1) read_positions_kernel(const Reading a) {
  float* const factors = reinterpret_cast<float*>(shared_memory_of_block());
  const int groups = blockDim.x / kPositions, warps = blockDim.x / 32;
  constexpr int kBuffers = kBackward ? 2 : 1;
  float* const buffers = factors + kBuffers * a.channels;
  const std::int64_t item = blockIdx.x / static_cast<unsigned>(a.splits);
  const std::int64_t split = blockIdx.x % static_cast<unsigned>(a.splits);
  const float expected = load_factors<T, kBackward>(a, item, factors, buffers);
  const int own = threadIdx.x % kPositions, group = threadIdx.x / kPositions;
  const T* const x = static_cast<const T*>(a.x) + item * a.item + group * a.channel;
  // Of the thread's channels, group + slot * groups, so many exist.
  const int present = (a.channels - group + groups - 1) / groups;
  const std::int64_t step = groups * a.channel;
  float* const scores = a.scores + item * 2 * a.positions.count;

  Softmax softmax = {negative_infinity(), 0.0f, 0.0f};
  constexpr int kSums = kGateHeld / kPositions;
  float sums[kSums] = {};
  const std::int64_t first = split * a.tiles_of_split;
  const std::int64_t last = first + a.tiles_of_split < a.tiles ? first + a.tiles_of_split : a.tiles;
  for (std::int64_t tile = first; tile < last; ++tile) {
    const unsigned position = static_cast<unsigned>(tile * kPositions) + own;
    const bool is_inside = position < a.positions.count;
    const T* from = x + a.positions.offset(is_inside ? position : 0);
    const int reads = is_inside ? present : 0;
    float numbers[kGateHeld];
#pragma unroll
    for (int slot = 0; slot < kGateHeld; ++slot) {
      numbers[slot] = slot < reads ? to_float(*from) : 0.0f;
      from += step;
    }
    const float* const factor = factors + group;
    float logit = product_of(numbers, factor, groups, present);
    float above = kBackward ? product_of(numbers, factor + a.channels, groups, present) : 0.0f;
#pragma unroll
    for (int distance = kPositions; distance < 32; distance *= 2) {
      logit += shuffle_xor(logit, distance);
      if (kBackward) above += shuffle_xor(above, distance);
    }
    float* const buffer = buffers + (tile - first) % 2 * kBuffers * warps * kPositions;
    sum_both<kBackward>(logit, above, threadIdx.x % 32 < kPositions, own, kPositions, buffer);
    above -= expected;
    if (kBackward && group == 0 && is_inside) {
      scores[position] = logit;
      scores[a.positions.count + position] = above;
    }
    float fade;
    const float share = take<kBackward>(softmax, logit, above, is_inside, kPositions, a.unit, fade);
#pragma unroll
    for (int slot = 0; slot < kGateHeld; ++slot) numbers[slot] *= share;
    sum_and_halve<kGateHeld, kPositions / 2>(numbers);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = fmaf(sums[i], fade, numbers[i]);
  }
  float* const parts = a.parts + std::int64_t{blockIdx.x} * a.channels;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int channel = (gate_slot(own, kPositions) + i) * groups + group;
    if (channel < a.channels) parts[channel] = sums[i];
  }
  write_stats(a, softmax, kPositions);
}

// Channels are neighbours in memory.
template <typename T, bool kBackward>
__global__ void __launch_bounds__(kGateThreads, 1) read_channels_kernel(const Reading a) {
  float* const factors = reinterpret_cast<float*>(shared_memory_of_block());
  const int threads = blockDim.x, warps = threads / 32, lane = threadIdx.x % 32;
  constexpr int kBuffers = kBackward ? 2 : 1;
  float* const buffers = factors + kBuffers * a.channels;
  const std::int64_t item = blockIdx.x / static_cast<unsigned>(a.splits);
  const std::int64_t split = blockIdx.x % static_cast<unsigned>(a.splits);
  const float expected = load_factors<T, kBackward>(a, item, factors, buffers);
  const T* const x = static_cast<const T*>(a.x) + item * a.item + threadIdx.x * a.channel;
  float* const scores = a.scores + item * 2 * a.positions.count;
  const int own = lane % kGateTogether;

  Softmax softmax = {negative_infinity(), 0.0f, 0.0f};
  float sums[kGateSlots] = {};
  const std::int64_t first = split * a.tiles_of_split;
  const std::int64_t last = first + a.tiles_of_split < a.tiles ? first + a.tiles_of_split : a.tiles;
  for (std::int64_t tile = first; tile < last; ++tile) {
    const unsigned start = static_cast<unsigned>(tile * kGateTogether);
    float numbers[kGateTogether][kGateSlots];
#pragma unroll
    for (int i = 0; i < kGateTogether; ++i) {
      const bool is_inside = start + i < a.positions.count;
      const T* const from = x + a.positions.offset(is_inside ? start + i : 0);
#pragma unroll
      for (int slot = 0; slot < kGateSlots; ++slot) {
        const bool reads = is_inside && slot * threads + static_cast<int>(threadIdx.x) < a.channels;
        numbers[i][slot] = reads ? to_float(from[slot * threads * a.channel]) : 0.0f;
      }
    }
    float logits[kGateTogether] = {}, products[kGateTogether] = {};
#pragma unroll
    for (int slot = 0; slot < kGateSlots; ++slot) {
      const int channel = slot * threads + threadIdx.x;
      if (channel >= a.channels) continue;
      const float factor = factors[channel];
      const float grad = kBackward ? factors[a.channels + channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < kGateTogether; ++i) {
        logits[i] = fmaf(factor, numbers[i][slot], logits[i]);
        if (kBackward) products[i] = fmaf(grad, numbers[i][slot], products[i]);
      }
    }
    float logit = sum_of_warp(logits), above = kBackward ? sum_of_warp(products) : 0.0f;
    float* const buffer = buffers + (tile - first) % 2 * kBuffers * warps * kGateTogether;
    sum_both<kBackward>(logit, above, lane % 4 == 0, lane / 4, kGateTogether, buffer);
    above -= expected;
    const bool is_inside = start + own < a.positions.count;
    if (kBackward && threadIdx.x < kGateTogether && is_inside) {
      scores[start + own] = logit;
      scores[a.positions.count + start + own] = above;
    }
    float fade;
    const float share =
        take<kBackward>(softmax, logit, above, is_inside, kGateTogether, a.unit, fade);
#pragma unroll
    for (int slot = 0; slot < kGateSlots; ++slot) sums[slot] *= fade;
#pragma unroll
    for (int i = 0; i < kGateTogether; ++i) {
      const float factor = shuffle(share, i);
#pragma unroll
      for (int slot = 0; slot < kGateSlots; ++slot)
        sums[slot] = fmaf(factor, numbers[i][slot], sums[slot]);
    }
  }
  float* const parts = a.parts + std::int64_t{blockIdx.x} * a.channels;
#pragma unroll
  for (int slot = 0; slot < kGateSlots; ++slot) {
    const int channel = slot * threads + threadIdx.x;
    if (channel < a.channels) parts[channel] = sums[slot];
  }
  write_stats(a, softmax, kGateTogether);
}

}  // namespace
}  // namespace nlk::cuda

#endif  // NLK_CUDA_GATE_READ_CUH_
