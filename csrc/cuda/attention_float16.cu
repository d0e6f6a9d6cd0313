// Attention of float16 operands.
#include "cuda/attention_calls.cuh"

namespace nlk::cuda {

Error attention_forward_float16(const AttentionForward& call, const Launch& where) {
  return run_forward<Half>(call, where);
}

Error attention_delta_float16(const AttentionBackward& call, const Launch& where) {
  return run_delta<Half>(call, where);
}

Error attention_backward_float16(const AttentionBackward& call, const Launch& where) {
  return run_backward<Half>(call, where);
}

}  // namespace nlk::cuda
