// What the concatenation does that no vector instruction speeds up: its workspace, and sorting.
// Compiled once for all instruction sets.
#ifndef NLK_CPU_CONCAT_PLAN_H_
#define NLK_CPU_CONCAT_PLAN_H_

#include <cstdint>

#include "nlk/concat.h"

namespace nlk {

// Channels that one task sums, and steps of the sorted scores that it takes. Neither depends on the
// batch or the threads: so no result does.
constexpr int kConcatBlock = 64;
constexpr std::int64_t kConcatChunk = 4096;

// What one batch item's scores and values have in them.
struct ConcatItem {
  double top_query, top_key;     // the largest score of either side, NaN where there is one
  double value_unit, grad_unit;   // powers of two: sums of numbers in them stay finite
  std::int64_t has_bad_score;     // whether any score is infinite or NaN
  std::int64_t padding[3];
};

struct ConcatPlan {
  std::int64_t steps;   // queries and keys of one item
  std::int64_t chunks;  // of steps
  std::int64_t blocks;  // of channels
  // Where things begin in the workspace, in bytes.
  std::int64_t items;                      // ConcatItem [batch]
  std::int64_t levels, rows;               // [batch][steps], levels as wide as they are computed
  std::int64_t spare_levels, spare_rows;   // of the sort
  std::int64_t sums, stairs;               // double [batch][blocks][chunks][64]
  std::int64_t grad_sums, grad_stairs;     // the same, of the backward
  std::int64_t dots;                       // double [batch][blocks][steps], of the backward
  std::int64_t bytes;
};

ConcatPlan concat_plan(const ConcatArguments& arguments, bool backward) noexcept;

// Sorts `levels`, and `rows` with them; equal levels keep their order. The spare arrays are as long.
void sort_levels(std::uint32_t* levels, std::uint32_t* rows, std::uint32_t* spare_levels,
                 std::uint32_t* spare_rows, std::int64_t count) noexcept;
void sort_levels(std::uint64_t* levels, std::uint32_t* rows, std::uint64_t* spare_levels,
                 std::uint32_t* spare_rows, std::int64_t count) noexcept;

}  // namespace nlk

#endif  // NLK_CPU_CONCAT_PLAN_H_
