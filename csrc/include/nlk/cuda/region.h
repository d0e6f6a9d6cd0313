// Region aggregation on GPUs, a depthwise 3-D correlation without bias (stride 1, zeros around x),
// and its gradients:
//   out[b,c,p]    = sum_o weight[c,o] x[b,c,p+o]       o: kt*kh*kw offsets around zero
//   d_x[b,c,p]    = sum_o weight[c,-o] grad[b,c,p+o]   the same kernels, `flip`
//   d_weight[c,o] = sum_b,p grad[b,c,p] x[b,c,p+o]
#ifndef NLK_CUDA_REGION_H_
#define NLK_CUDA_REGION_H_

#include <cstdint>

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

// The largest kt, kh and kw that the kernels serve.
constexpr int kRegionLargest = 15;

// Address and element strides of a (B,C,T,H,W) tensor.
struct Clip {
  void* data;
  std::int64_t strides[5];
};

struct RegionArguments {
  int dtype;                       // of every tensor: 1 float32, 2 bfloat16, 3 float16
  std::int64_t sizes[5];           // B, C, T, H, W; C, T, H and W below 2^31 - 64
  std::int64_t kernel[3];          // odd
  bool channels_last;              // whether neighbours in memory are channels, or columns
  Clip x;                          // of a d_x: the gradient of the output
  void* weight;                    // (C,kt,kh,kw)
  std::int64_t weight_strides[4];
};

// Fills `out`; with `flip` by the mirrored kernel.
Error region_correlate(const RegionArguments& arguments, const Clip& out, bool flip,
                       const Launch& where);

// Sums of parts, each for some of the tiles of all positions, float (parts,C,kt,kh,kw), and d_weight
// from them, contiguous; `weight` is not read. How many parts there are depends on the sizes only.
std::int64_t region_weight_parts(const RegionArguments& arguments);
Error region_weight_gradient(const RegionArguments& arguments, const Clip& grad, float* parts,
                             void* d_weight, const Launch& where);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_REGION_H_
