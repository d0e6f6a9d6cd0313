// Attention by kernels that run on every GPU from compute capability 7.5 on; see
// csrc/cuda/attention_pass.cuh. Operands and results have any strides; nothing is allocated.
#ifndef NLK_CUDA_ATTENTION_H_
#define NLK_CUDA_ATTENTION_H_

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

enum class Affinity : int { kSoftmax = 0, kRelu = 1, kScores = 2 };

// As `nlkernels._ext.DTYPES` numbers them.
enum class Dtype : int { kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3 };

// Query (B,N,D), key (B,M,D), value (B,M,V), all sizes at least 1. Weights are
//   softmax   exp2(log2(e) scale (S - top)) / sum, with the row's extreme product top
//   relu      max(scale S, 0)
//   scores    scale S
// For the last two `scale` includes what they are divided by, M.
struct AttentionProblem {
  Affinity affinity;
  Dtype dtype;
  float scale;
  std::int64_t batch, queries, keys, depth, value_depth;
};

// `stats` (2,B,N), of a softmax: tops and sums. `units` (B), or null: powers of two in which the
// weights of an item are rounded, so that float16 neither overflows nor fades.
struct AttentionForward {
  AttentionProblem problem;
  Operand query, key, value, out;
  float* stats;
  const float* units;
};

// `delta` (B,N), of a softmax: row sums of grad out, a workspace. Units of the weights, and of
// their gradients, as above.
struct AttentionBackward {
  AttentionProblem problem;
  Operand grad, query, key, value, out;
  Operand d_query, d_key, d_value;
  const float* stats;
  float* delta;
  const float* weight_units;
  const float* gradient_units;
};

Error attention_forward(const AttentionForward& call, const Launch& where);

// `delta` alone; reads grad and out.
Error attention_delta(const AttentionBackward& call, const Launch& where);

// Three passes over the scores, for the gradients of query, key and value, without atomics.
Error attention_backward(const AttentionBackward& call, const Launch& where);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_ATTENTION_H_
