// The concatenation on GPUs: out[i] = sum_j relu(query_score[i] + key_score[j]) value[j] / M.
//
// Readers take from sources: queries from keys, and for the keys' gradients keys from queries. Both
// are sorted together by level, a reader's score and a source's negated one, and where levels are
// equal readers come first: a reader sees the sources before it, whose sums with its score are
// positive. Walking up,
//   G  the sum of the sources' rows passed,    S  the sum of (level - source's level) row,
// no factor is negative, so nothing cancels. A reader's row is S / M, and the gradient of its score
// is the product of its other operand with G / M.
//
// Levels are finite: scores that are NaN or infinite come clipped to the largest numbers, NaN as
// positive, and `scores` has them as they were. A reader whose highest sum is NaN or infinite gets
// G times that.
#ifndef NLK_CUDA_CONCAT_H_
#define NLK_CUDA_CONCAT_H_

#include <cstdint>

#include "nlk/cuda/launch.h"

namespace nlk::cuda {

// Steps of the sorted scores that a warp takes.
constexpr int kConcatChunk = 64;

struct ConcatArguments {
  int dtype;                              // of rows and results: 1 float32, 2 bfloat16, 3 float16
  std::int64_t batch, sources, readers, channels;  // each at least 1
  // Per item and step, sources + readers of them. The order says whose step it is: of the items'
  // scores in one row, where `first_reader` to `first_reader + readers` are the readers.
  const float* levels;
  const std::int64_t* order;
  const float* scores;
  const float* tops;                      // per item: the largest score of the sources, or NaN
  std::int64_t first_reader;              // 0, or the number of sources
  bool falls;                             // levels are negated, and steps taken from the last
  std::int64_t divisor;                   // M
  Operand source;                         // (batch, sources, channels)
  void* out;                              // (batch, readers, channels), contiguous; or null
  Operand other;                          // (batch, readers, channels); of dots
  void* dots;                             // (batch, readers), contiguous; or null
  float* sums;                            // of concat_sums numbers
};

// Numbers of float32 that a walk needs; 2 B ceil((N + M) / 64) V, and with dots B rows ceil(V / 64).
std::int64_t concat_sums(const ConcatArguments& arguments);

Error concat_walk(const ConcatArguments& arguments, const Launch& where);

}  // namespace nlk::cuda

#endif  // NLK_CUDA_CONCAT_H_
