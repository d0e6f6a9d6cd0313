// A norm by the statistics of each channel, the residual that is added to it, and its gradients.
#ifndef NLK_NORM_H_
#define NLK_NORM_H_

#include <cstdint>

#include "nlk/attention.h"
#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// standard[b,n,c] = (z[b,n,c] - mean[c]) / sqrt(variance[c] + eps)
//
// forward   out = base + gamma standard + beta
// sums      sums[0,c] = sum_b,n grad standard;  sums[1,c] = sum_b,n grad
// backward  out = gamma / sqrt(variance + eps) (grad - means[1] - means[0] standard), after `sums`
//           where there are no means
//
// Operands are (B,N,C), at any strides; base.data may be null. All else is dense and of the type
// that sums have: moments, sums and means are (2,C), gamma and beta (C).
struct NormArguments {
  Dtype dtype;
  int threads;
  std::int64_t batch, positions, channels;  // B, N, C
  double eps;
  const void* moments;  // mean and variance
  const void *gamma, *beta;
  const void* means;  // backward: of what `sums` adds up; null takes those of this call's sums
  Operand z, base, grad, out;
  void* sums;
  void* workspace;
};

// Bytes of workspace of any of the three, which begins at a multiple of 64.
// The entries return false when they were interrupted.
NLK_PER_ISA(std::int64_t norm_workspace(const NormArguments&);
            bool norm_forward(const NormArguments&); bool norm_sums(const NormArguments&);
            bool norm_backward(const NormArguments&))

std::int64_t norm_workspace(Isa, const NormArguments&);
bool norm_forward(Isa, const NormArguments&);
bool norm_sums(Isa, const NormArguments&);
bool norm_backward(Isa, const NormArguments&);

}  // namespace nlk

#endif  // NLK_NORM_H_
