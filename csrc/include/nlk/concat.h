// The concatenation on CPUs: out[i] = sum_j relu(query_score[i] + key_score[j]) value[j] / M.
#ifndef NLK_CONCAT_H_
#define NLK_CONCAT_H_

#include <cstdint>

#include "nlk/dispatch.h"
#include "nlk/number.h"

namespace nlk {

// Strides are in elements, any sign. Results are contiguous. Every size is at least 1, and
// queries + keys below 2^32.
struct ConcatArguments {
  Dtype dtype;
  int threads;
  std::int64_t batch, queries, keys, channels;
  const void* query_score;  // (batch, queries)
  std::int64_t query_score_strides[2];
  const void* key_score;  // (batch, keys)
  std::int64_t key_score_strides[2];
  const void* value;  // (batch, keys, channels)
  std::int64_t value_strides[3];
  const void* grad;  // (batch, queries, channels); of the backward
  std::int64_t grad_strides[3];
  void* out;            // (batch, queries, channels); of the forward
  void* d_query_score;  // the others of the backward
  void* d_key_score;
  void* d_value;
  void* workspace;  // of concat_workspace bytes, aligned to 64
};

// Bytes of workspace of a pass; reads sizes and dtype only.
std::int64_t concat_workspace(const ConcatArguments& arguments, bool backward) noexcept;

// False when an interrupt stopped the work; results are unfinished then.
NLK_PER_ISA(bool concat_forward(const ConcatArguments& arguments))
NLK_PER_ISA(bool concat_backward(const ConcatArguments& arguments))
bool concat_forward(Isa isa, const ConcatArguments& arguments);
bool concat_backward(Isa isa, const ConcatArguments& arguments);

}  // namespace nlk

#endif  // NLK_CONCAT_H_
