// Region aggregation, a depthwise 3-D correlation without bias (stride 1, zeros around x), and its
// gradients:
//   out[b,c,p]    = sum_o weight[c,o] x[b,c,p+o]       o: kt*kh*kw offsets around zero
//   d_x[b,c,p]    = sum_o weight[c,-o] grad[b,c,p+o]
//   d_weight[c,o] = sum_b,p grad[b,c,p] x[b,c,p+o]
// What lies outside of x takes no part: not even as a zero that meets an infinite weight.
#ifndef NLK_REGION_H_
#define NLK_REGION_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/isa.h"
#include "nlk/number.h"

namespace nlk {

struct RegionArguments {
  Dtype dtype;                 // of every tensor
  std::int64_t sizes[5];       // B, C, T, H, W
  std::int64_t kernel[3];      // odd
  const void* x;               // (B,C,T,H,W); the backward reads it for d_weight only
  std::int64_t x_strides[5];
  const void* weight;          // (C,kt,kh,kw); the backward reads it for d_x only
  std::int64_t weight_strides[4];
  const void* grad;            // of the output; backward only
  std::int64_t grad_strides[5];
  void* out;                   // the forward's result, the backward's d_x; null in a backward
  std::int64_t out_strides[5]; // that wants no d_x
  void* d_weight;              // contiguous, backward only; null when it is not wanted
  void* workspace;             // so many bytes as region_workspace says for these arguments
  int threads;
};

// Bytes; reads no pointer but asks which of out and d_weight are null.
NLK_PER_ISA(std::int64_t region_workspace(const RegionArguments& arguments))
std::int64_t region_workspace(Isa isa, const RegionArguments& arguments);

// False when it was interrupted.
NLK_PER_ISA(bool region_forward(const RegionArguments& arguments))
bool region_forward(Isa isa, const RegionArguments& arguments);

NLK_PER_ISA(bool region_backward(const RegionArguments& arguments))
bool region_backward(Isa isa, const RegionArguments& arguments);

}  // namespace nlk

#endif  // NLK_REGION_H_
