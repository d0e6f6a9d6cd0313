// Attention of one head: softmax, relu, and products of scores that are left as they are.
#ifndef NLK_ATTENTION_H_
#define NLK_ATTENTION_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// What becomes of the scores S = query key^T (B,N,M) before the product with the values:
//   kSoftmax  P = softmax(scale S) over the keys
//   kRelu     P = relu(scale S) / M
//   kScores   P = scale S / M
//   kLinear   the same, as query (key^T value) scale / M: other FLOPs, other rounding
enum class Affinity : int { kSoftmax = 0, kRelu = 1, kScores = 2, kLinear = 3 };

// Element (b, r, c) of a (batch, rows, channels) operand lies at data[b item + r row + c channel].
struct Operand {
  void* data;
  std::int64_t item, row, channel;
};

struct AttentionProblem {
  Affinity affinity;
  Dtype dtype;
  double scale;
  std::int64_t batch, queries, keys, depth, value_depth;
  std::int64_t workspace_limit;  // bytes that threads and phases share, as far as they get by with it
  int threads;
};

// out (B,N,V) = P value. For kSoftmax, stats (2,B,N), dense, in the type that sums have: of each row
// the extreme product (the largest S, the smallest where scale < 0) and the sum of
// exp(scale (S - extreme)). These lie `stats_plane` numbers behind those: B N in the whole.
// For kLinear, state (B,D,V), dense, in the same type: key^T value. Null where it is not wanted.
struct AttentionForward {
  AttentionProblem problem;
  Operand query, key, value, out;
  void* stats;
  std::int64_t stats_plane;
  void* state;
  void* workspace;
};

// Gradients of query, key and value for the gradient of out. Nothing of the forward is needed; for
// kLinear the state of a forward spares summing it again, to the same bits. Else it is null.
struct AttentionBackward {
  AttentionProblem problem;
  Operand grad, query, key, value, d_query, d_key, d_value;
  const void* state;
  void* workspace;
};

// Bytes of workspace, which begins at a multiple of 64.
// The entries return false when they were interrupted.
NLK_PER_ISA(std::int64_t attention_forward_workspace(const AttentionProblem&);
            std::int64_t attention_backward_workspace(const AttentionProblem&);
            bool attention_forward(const AttentionForward&);
            bool attention_backward(const AttentionBackward&))

std::int64_t attention_forward_workspace(Isa, const AttentionProblem&);
std::int64_t attention_backward_workspace(Isa, const AttentionProblem&);
bool attention_forward(Isa, const AttentionForward&);
bool attention_backward(Isa, const AttentionBackward&);

}  // namespace nlk

#endif  // NLK_ATTENTION_H_
