// How attention is cut into tasks, and where what lies in the workspace.
#ifndef NLK_CPU_ATTENTION_PLAN_H_
#define NLK_CPU_ATTENTION_PLAN_H_

#include "cpu/pack.h"
#include "nlk/attention.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// What products multiply: pairs of bfloat16 where the machine does, else what sums are computed in.
template <typename T>
struct FactorOf {
  typedef Computed<T> Type;
};
#if NLK_BF16_DOT
template <>
struct FactorOf<Bfloat16> {
  typedef Bfloat16 Type;
};
#endif

// Scores of a thread: what stays in the second-level cache beside the panels that pass.
constexpr std::int64_t kScoreBytes = 1 << 20;
constexpr std::int64_t kMostRows = 192;
// Fewer rows need their panels faster than memory gives them where these exceed all caches: scores
// that spill cost less. As long as all threads' scores take no more than what is packed.
constexpr std::int64_t kLeastRows = 36;

// What packed operands of several batch items may take together.
constexpr std::int64_t kItemsBytes = 4 << 20;
// Blocks that a thread gets at least, where there are so many rows: the last ones end together.
constexpr std::int64_t kBlocksOfThread = 4;

// Rows that a block may have in any case.
NLK_INLINE std::int64_t least_rows(std::int64_t score_bytes, std::int64_t packed_bytes,
                                   int threads) {
  return smaller_of(kLeastRows, packed_bytes / (score_bytes * threads));
}

NLK_INLINE std::int64_t items_at_a_time(const AttentionProblem& problem, std::int64_t item_bytes) {
  if (problem.threads == 1) return 1;
  const std::int64_t bytes = smaller_of(kItemsBytes, problem.workspace_limit / 2);
  return larger_of(1, smaller_of(problem.batch, bytes / item_bytes));
}

template <typename Body>
bool parallel(int threads, std::int64_t tasks, Body& body) {
  return parallel_for(
      threads, tasks,
      [](void* context, std::int64_t task, int thread) {
        (*static_cast<Body*>(context))(task, thread);
      },
      &body);
}

// Hands out pieces of a workspace, each at a multiple of 64 bytes.
class Pieces {
 public:
  explicit Pieces(void* workspace) : next_(static_cast<char*>(workspace)), first_(next_) {}
  template <typename N>
  N* take(std::int64_t numbers) {
    N* piece = reinterpret_cast<N*>(next_);
    next_ += rounded_up(numbers * static_cast<std::int64_t>(sizeof(N)), 64);
    return piece;
  }
  std::int64_t bytes() const { return next_ - first_; }

 private:
  char* next_;
  char* first_;
};

// A thread's own copy of a piece, of which the workspace holds one every `bytes`.
template <typename N>
NLK_INLINE N* own_piece(N* piece, int thread, std::int64_t bytes) {
  return reinterpret_cast<N*>(reinterpret_cast<char*>(piece) + thread * bytes);
}

// Rows and channels of a batch item from a row and a channel on.
template <typename T>
NLK_INLINE Part<T> part_of(const Operand& operand, std::int64_t item, std::int64_t row,
                           std::int64_t channel) {
  return {static_cast<const T*>(operand.data) + item * operand.item + row * operand.row +
              channel * operand.channel,
          operand.row, operand.channel};
}
template <typename T>
NLK_INLINE Part<T> transposed(Part<T> rows) {
  return {rows.data, rows.column, rows.row};
}

NLK_INLINE std::int64_t blocks_of(std::int64_t number, std::int64_t size) {
  return (number + size - 1) / size;
}

// Rows of a block so that there are at least so many blocks. Few blocks are of equal size, so that
// threads end together, in whole groups and steps; many are of whole tiles.
NLK_INLINE std::int64_t rows_of_block(std::int64_t rows, std::int64_t most, std::int64_t blocks) {
  most = larger_of(kTileRows, most / kTileRows * kTileRows);
  const std::int64_t needed = blocks_of(rows, most);
  const std::int64_t even = blocks_of(rows, larger_of(blocks, needed));
  return smaller_of(most, rounded_up(even, needed < 2 * blocks ? 2 * kRowStep : kTileRows));
}

// Rows of each block that some rows of every item are cut into, at most `most`: as many blocks for
// each thread, of equal size. In whole groups; where that adds little, in whole steps.
NLK_INLINE std::int64_t even_rows(std::int64_t rows, std::int64_t most, std::int64_t items,
                                  std::int64_t threads, std::int64_t group) {
  const std::int64_t blocks = rounded_up(items * blocks_of(rows, most), threads);
  const std::int64_t even = blocks_of(rows, blocks_of(blocks, items));
  return rounded_up(even, even >= 8 * kTileRows ? 2 * kRowStep : group);
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_ATTENTION_PLAN_H_
