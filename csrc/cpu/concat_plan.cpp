#include "cpu/concat_plan.h"

#include <cstring>
#include <utility>

namespace nlk {
namespace {

constexpr std::int64_t kAlignment = 64;
// Fewer are sorted by insertion: counting 256 digits takes longer.
constexpr std::int64_t kFew = 48;
constexpr int kDigits = 256;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Takes so many bytes of the workspace and returns where they begin.
std::int64_t take(std::int64_t& bytes, std::int64_t size) {
  const std::int64_t begin = bytes;
  bytes += ceil_div(size, kAlignment) * kAlignment;
  return begin;
}

template <typename Level>
void sort_few(Level* levels, std::uint32_t* rows, std::int64_t count) {
  for (std::int64_t i = 1; i < count; ++i) {
    const Level level = levels[i];
    const std::uint32_t row = rows[i];
    std::int64_t place = i;
    for (; place > 0 && levels[place - 1] > level; --place) {
      levels[place] = levels[place - 1];
      rows[place] = rows[place - 1];
    }
    levels[place] = level;
    rows[place] = row;
  }
}

// By one byte after the other, from the last on. Bytes in which all levels agree are left out: two
// of four where the scores were 16-bit numbers.
template <typename Level>
void sort_by_digits(Level* levels, std::uint32_t* rows, Level* spare_levels,
                    std::uint32_t* spare_rows, std::int64_t count) {
  if (count < kFew) return sort_few(levels, rows, count);
  constexpr int passes = sizeof(Level);
  std::uint32_t counts[passes][kDigits];
  std::memset(counts, 0, sizeof(counts));
  for (std::int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < passes; ++pass) ++counts[pass][(levels[i] >> (8 * pass)) & 0xff];
  }
  Level* const first_levels = levels;
  std::uint32_t* const first_rows = rows;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 8 * pass;
    std::uint32_t* const places = counts[pass];
    if (places[(levels[0] >> shift) & 0xff] == count) continue;
    std::uint32_t before = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      const std::uint32_t own = places[digit];
      places[digit] = before;
      before += own;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint32_t place = places[(levels[i] >> shift) & 0xff]++;
      spare_levels[place] = levels[i];
      spare_rows[place] = rows[i];
    }
    std::swap(levels, spare_levels);
    std::swap(rows, spare_rows);
  }
  if (levels == first_levels) return;
  std::memcpy(first_levels, levels, count * sizeof(Level));
  std::memcpy(first_rows, rows, count * sizeof(std::uint32_t));
}

}  // namespace

ConcatPlan concat_plan(const ConcatArguments& arguments, bool backward) noexcept {
  ConcatPlan plan = {};
  plan.steps = arguments.queries + arguments.keys;
  plan.chunks = ceil_div(plan.steps, kConcatChunk);
  plan.blocks = ceil_div(arguments.channels, kConcatBlock);
  const std::int64_t level = arguments.dtype == Dtype::kFloat64 ? 8 : 4;
  const std::int64_t ranks = arguments.batch * plan.steps;
  const std::int64_t carries =
      plan.chunks > 1 ? arguments.batch * plan.blocks * plan.chunks * kConcatBlock * 8 : 0;
  std::int64_t bytes = 0;
  plan.items = take(bytes, arguments.batch * static_cast<std::int64_t>(sizeof(ConcatItem)));
  plan.levels = take(bytes, ranks * level);
  plan.rows = take(bytes, ranks * 4);
  plan.spare_levels = take(bytes, ranks * level);
  plan.spare_rows = take(bytes, ranks * 4);
  plan.sums = take(bytes, carries);
  plan.stairs = take(bytes, backward ? 0 : carries);
  plan.grad_sums = take(bytes, backward ? carries : 0);
  plan.grad_stairs = take(bytes, backward ? carries : 0);
  plan.dots = take(bytes, backward ? ranks * plan.blocks * 8 : 0);
  plan.bytes = bytes;
  return plan;
}

std::int64_t concat_workspace(const ConcatArguments& arguments, bool backward) noexcept {
  return concat_plan(arguments, backward).bytes;
}

void sort_levels(std::uint32_t* levels, std::uint32_t* rows, std::uint32_t* spare_levels,
                 std::uint32_t* spare_rows, std::int64_t count) noexcept {
  sort_by_digits(levels, rows, spare_levels, spare_rows, count);
}

void sort_levels(std::uint64_t* levels, std::uint32_t* rows, std::uint64_t* spare_levels,
                 std::uint32_t* spare_rows, std::int64_t count) noexcept {
  sort_by_digits(levels, rows, spare_levels, spare_rows, count);
}

}  // namespace nlk
