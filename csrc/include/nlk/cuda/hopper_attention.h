// Softmax attention on Hopper (sm_90a): 16-bit operands through tensor copies and wgmma.
#ifndef NLK_CUDA_HOPPER_ATTENTION_H_
#define NLK_CUDA_HOPPER_ATTENTION_H_

#include <cstdint>

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

// How a problem is laid out on the GPU. `split`: 64 queries of a block and up to 512 value channels,
// else 128 and up to 256. `streamed`: chunks of queries are copied again for every tile of keys.
// `cluster`: blocks that share the copies of keys and values. Slots: of the rings of keys (64 channels
// of a tile each) and of values (256 channels).
struct HopperPlan {
  bool split, streamed, channel_first;
  int tile_keys, cluster, key_slots, value_slots;
};

// out (B,N,V) = softmax(scale query key^T) value and stats (2,B,N), both dense: each row's extreme
// product and its sum of exp2(factor (product - extreme)), factor = scale log2(e). dtype: 2 bfloat16,
// 3 float16. Operands: rows, or channels where the plan says so, are innermost; all other strides
// multiples of 16 bytes. Weights are 2^-shift of what they are, unit = 2^shift. `blocks`: at most so
// many, one for each multiprocessor.
struct HopperForward {
  HopperPlan plan;
  int dtype, blocks;
  float factor, shift, unit;
  std::int64_t batch, queries, keys, depth, value_depth;
  Operand query, key, value;
  void* out;
  float* stats;
};

// cudaErrorInvalidValue for a plan that no kernel of this build has, or that does not fit.
Error hopper_forward(const HopperForward&, const Launch&);

// Bytes of shared memory that a plan takes.
int hopper_forward_shared(const HopperPlan&, std::int64_t depth);

// Tiles of 128 queries and `tile_keys` keys; `slots`: of the ring, chunks of 64 channels of a tile's
// queries and keys. The rest as above.
struct HopperBackwardPlan {
  bool channel_first;
  int tile_keys, cluster, slots;
};

// Of `rows` queries of each of `items`, from row `first` of their `queries` on, writes P = exp2(factor
// (query key^T - top)) / total to `weights` and dS = scale P (grad value^T - delta) to `d_scores`, both
// (items x rows, keys rounded up to a multiple of 8) of the operands' type; what is beyond the keys is
// undefined. top, total, delta (items,N): the forward's statistics, and row sums of grad out; they are not
// read where one tile holds all keys. `sums`: a workspace of 3 x tiles of keys x items x rows. Where a
// row's sums of P and dS are off by more than `tolerance`, they are corrected. dtype, operands, `blocks`:
// as above.
struct HopperDScores {
  HopperBackwardPlan plan;
  int dtype, blocks;
  float factor, scale, tolerance;
  std::int64_t items, queries, first, rows, keys, depth, value_depth;
  Operand query, key, grad, value;
  const float *top, *total, *delta;
  float* sums;
  void *weights, *d_scores;
};

// cudaErrorInvalidValue as above.
Error hopper_d_scores(const HopperDScores&, const Launch&);

// Bytes of shared memory that a plan takes.
int hopper_d_scores_shared(const HopperBackwardPlan&);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_HOPPER_ATTENTION_H_
