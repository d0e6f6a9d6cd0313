// Convolutions of kernel size 1, whose positions and channels lie anyhow, and their weight gradients.
#ifndef NLK_POINTWISE_H_
#define NLK_POINTWISE_H_

#include <cstdint>

#include "nlk/attention.h"
#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// One summand of a pointwise product: features (B,N,depth), weight (P,depth) of the same dtype.
struct PointwiseSource {
  Operand features;
  const void* weight;
  std::int64_t weight_row, weight_channel;  // strides
  std::int64_t depth;
};

// out[b,n,p] = base[b,n,p] + shift[p] + sum_s sum_c features_s[b,n,c] weight_s[p,c]
//
// base.data, shift and moments may be null. shift has the type of sums, as have moments (2,P): mean and
// variance of every channel of out, of what is written there.
struct PointwiseArguments {
  Dtype dtype;
  int threads;
  std::int64_t batch, positions, channels;  // B, N, P
  int sources;
  PointwiseSource source[3];
  Operand base, out;
  const void* shift;
  void* moments;
  void* workspace;
};

// outer[p,q] = sum_b,n left[b,n,p] right[b,n,q];  sums[p] = sum_b,n left[b,n,p]
//
// outer (P,Q) and sums are dense, of the type that sums have.
struct OuterArguments {
  Dtype dtype;
  int threads;
  std::int64_t batch, positions, left_channels, right_channels;  // B, N, P, Q
  Operand left, right;
  void *outer, *sums;
  void* workspace;
};

// Bytes of workspace, which begins at a multiple of 64.
// The entries return false when they were interrupted.
NLK_PER_ISA(std::int64_t pointwise_workspace(const PointwiseArguments&);
            bool pointwise(const PointwiseArguments&);
            std::int64_t outer_workspace(const OuterArguments&); bool outer(const OuterArguments&))

std::int64_t pointwise_workspace(Isa, const PointwiseArguments&);
bool pointwise(Isa, const PointwiseArguments&);
std::int64_t outer_workspace(Isa, const OuterArguments&);
bool outer(Isa, const OuterArguments&);

}  // namespace nlk

#endif  // NLK_POINTWISE_H_
