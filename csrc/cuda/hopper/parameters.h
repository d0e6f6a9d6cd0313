// What the Hopper kernels of softmax attention are told, and how they divide their shared memory.
// Needs no CUDA: the tests of the formulas include it.
#ifndef NLK_CUDA_HOPPER_PARAMETERS_H_
#define NLK_CUDA_HOPPER_PARAMETERS_H_

#include <cstdint>

#include "nlk/cuda/hopper/layout.h"

namespace nlk::cuda::hopper {

// Value channels of a warpgroup: an accumulator of 64 x 256 takes half of its registers.
constexpr int kValues = 256;
constexpr int kValueChunks = kValues / kLineNumbers;
// Three warpgroups: one copies, two compute.
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kCopyRegisters = 24;
constexpr int kProductRegisters = 240;
static_assert(kCopyRegisters + 2 * kProductRegisters <= 3 * 168, "a block begins with 168 per thread");
constexpr int kSharedLimit = 232448;
constexpr int kBarrierBytes = 8;

struct ForwardParameters {
  int batch, queries, keys, value_depth;
  int depth_chunks;             // of query and key, 64 channels each
  int key_slots, value_slots;   // of the rings
  // factor = scale log2(e). Weights are exp2(factor (s - top) - shift): sums of `keys` weighted values
  // then stay below the largest value. unit = 2^shift.
  float factor, shift, unit;
  void* out;     // (B,N,V), dense
  float* stats;  // (2,B,N), dense: top, total
};

// A chunk: `rows` queries of each of `items`, from row `first` of their `queries` on.
struct DScoresParameters {
  int items, first, rows, queries, keys;
  int depth_chunks, value_chunks;  // of query and key, of grad and value, 64 channels each
  int slots;                       // of the ring
  float factor, scale;             // factor = scale log2(e)
  const float *top, *total;        // (items,N), dense
  const float* delta;              // likewise
  float* sums;                     // (3, tiles of keys, items x rows): of dS / scale, of its size, of P
  void *weights, *d_scores;        // (items x rows, `line`): P and dS
  std::int64_t line;               // `keys`, rounded up to a multiple of 8
  float tolerance;                 // of the correction
};

// Bytes from the first swizzle atom on. Rows of the two kernels' query tiles: 128, or 64 of which
// both warpgroups compute; a streamed query shares the slots of the keys. Of d_scores.cuh the slots of
// streamed queries and keys are all there is.
struct SharedPlan {
  std::uint32_t query, key, value, weights, fades, barriers, end;
  int key_slot_bytes, value_slab_bytes;

  constexpr static SharedPlan of(int query_rows, int keys, int depth_chunks, int key_slots,
                                 int value_slots, bool split, bool streamed) {
    SharedPlan plan{};
    const int key_chunk = keys * kLineBytes, query_chunk = query_rows * kLineBytes;
    plan.key_slot_bytes = key_chunk + (streamed ? query_chunk : 0);
    plan.value_slab_bytes = kValueChunks * key_chunk;
    std::uint32_t end = 0;
    const auto take = [&end](int bytes) {
      const std::uint32_t start = end;
      end += static_cast<std::uint32_t>(bytes);
      return start;
    };
    plan.query = take(streamed ? 0 : depth_chunks * query_chunk);
    plan.key = take(key_slots * plan.key_slot_bytes);
    plan.value = take((split ? 2 : 1) * value_slots * plan.value_slab_bytes);
    plan.weights = take(split ? 2 * query_rows * kLineBytes : 0);
    plan.fades = take(split ? 2 * query_rows * static_cast<int>(sizeof(float)) : 0);
    const int barriers = 2 + 2 * key_slots + (split ? 4 * value_slots + 4 : 2 * value_slots);
    plan.barriers = take(barriers * kBarrierBytes);
    plan.end = end;
    return plan;
  }

  // With what it takes to begin at an atom.
  constexpr int bytes() const { return static_cast<int>(end) + kAtomBytes; }
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_PARAMETERS_H_
