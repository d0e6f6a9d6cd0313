// Attention of bfloat16 operands.
#include "cuda/attention_calls.cuh"

namespace nlk::cuda {

Error attention_forward_bfloat16(const AttentionForward& call, const Launch& where) {
  return run_forward<Bfloat16>(call, where);
}

Error attention_delta_bfloat16(const AttentionBackward& call, const Launch& where) {
  return run_delta<Bfloat16>(call, where);
}

Error attention_backward_bfloat16(const AttentionBackward& call, const Launch& where) {
  return run_backward<Bfloat16>(call, where);
}

}  // namespace nlk::cuda
