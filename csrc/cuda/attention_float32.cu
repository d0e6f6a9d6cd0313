// Attention of float32 operands, and the choice between the types.
#include "cuda/attention_calls.cuh"

namespace nlk::cuda {

Error attention_forward_float32(const AttentionForward& call, const Launch& where) {
  return run_forward<float>(call, where);
}

Error attention_delta_float32(const AttentionBackward& call, const Launch& where) {
  return run_delta<float>(call, where);
}

Error attention_backward_float32(const AttentionBackward& call, const Launch& where) {
  return run_backward<float>(call, where);
}

Error attention_forward(const AttentionForward& call, const Launch& where) {
  switch (call.problem.dtype) {
    case Dtype::kFloat16: return attention_forward_float16(call, where);
    case Dtype::kBfloat16: return attention_forward_bfloat16(call, where);
    default: return attention_forward_float32(call, where);
  }
}

Error attention_delta(const AttentionBackward& call, const Launch& where) {
  switch (call.problem.dtype) {
    case Dtype::kFloat16: return attention_delta_float16(call, where);
    case Dtype::kBfloat16: return attention_delta_bfloat16(call, where);
    default: return attention_delta_float32(call, where);
  }
}

Error attention_backward(const AttentionBackward& call, const Launch& where) {
  switch (call.problem.dtype) {
    case Dtype::kFloat16: return attention_backward_float16(call, where);
    case Dtype::kBfloat16: return attention_backward_bfloat16(call, where);
    default: return attention_backward_float32(call, where);
  }
}

}  // namespace nlk::cuda
