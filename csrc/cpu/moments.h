// Means and sums of squared deviations: of blocks of positions while these are in the caches, and
// of all blocks from these.
//
// A block is read twice. The first time gives a number near its mean, the second one what is left:
//
//   near = sum x / n;  gap = sum (x - near);  mean = near + gap / n
//   squares = sum (x - near)^2 - gap^2 / n
//
// so that nothing cancels, however large the mean is. Blocks are few numbers, whose sums round
// little; what comes of them, and is made of all blocks, is float64.
#ifndef NLK_CPU_MOMENTS_H_
#define NLK_CPU_MOMENTS_H_

#include "cpu/lines.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Of a block, for each channel.
struct Moments {
  double *mean, *squares;
};

// Squares are summed in this unit: where a variance fits the type, so do the sums.
template <typename Number>
constexpr Number kSquareUnit = Number{1} / 65536;

template <typename Number>
NLK_INLINE void set_moments(Number near, Number gap, Number squares, std::int64_t count,
                            Moments to) {
  const double of_gap = static_cast<double>(gap), step = of_gap / static_cast<double>(count);
  constexpr double unit = kSquareUnit<double>;
  // An infinite mean stays one, as no gap of it is a number.
  *to.mean = near - near == 0 ? static_cast<double>(near) + step : static_cast<double>(near);
  const double found = static_cast<double>(squares) / (unit * unit) - step * of_gap;
  *to.squares = found < 0 ? 0 : found;
}

// Of one channel, whose numbers are a line.
template <typename Number>
NLK_INLINE void line_moments(const Number* line, std::int64_t count, Moments to) {
  constexpr int lanes = kLanes<Number>;
  const Vector<Number> share = splat(Number{1} / static_cast<Number>(count));
  Vector<Number> parts = {}, gaps = {}, squares = {};
  for (std::int64_t i = 0; i < count; i += lanes) {
    parts += load_some(line + i, lanes_from<Number>(i, count)) * share;
  }
  const Number near = sum_of_lanes<Number>(parts);
  for (std::int64_t i = 0; i < count; i += lanes) {
    const int some = lanes_from<Number>(i, count);
    const Vector<Number> gap = first_lanes<Number>(load_some(line + i, some) - splat(near), some);
    const Vector<Number> in_unit = gap * splat(kSquareUnit<Number>);
    gaps += gap, squares += in_unit * in_unit;
  }
  set_moments<Number>(near, sum_of_lanes<Number>(gaps), sum_of_lanes<Number>(squares), count, to);
}

// Of channels that are the columns of `count` rows, which are `apart` from each other. `scratch`
// has 3 times `columns` numbers.
template <typename Number>
void column_moments(const Number* rows, std::int64_t apart, std::int64_t count,
                    std::int64_t columns, Number* scratch, Moments to) {
  Number *const near = scratch, *const gaps = near + columns, *const squares = gaps + columns;
  std::memset(scratch, 0, 3 * columns * sizeof(Number));
  const Vector<Number> share = splat(Number{1} / static_cast<Number>(count));
  add_columns<Number, 1>(count, columns, near, [&](auto row, auto i, int some, auto* sums) {
    sums[0] += load_some(rows + row * apart + i, some) * share;
  });
  add_columns<Number, 2>(count, columns, gaps, [&](auto row, auto i, int some, auto* sums) {
    const Vector<Number> gap = load_some(rows + row * apart + i, some) - load_some(near + i, some);
    const Vector<Number> in_unit = gap * splat(kSquareUnit<Number>);
    sums[0] += gap, sums[1] += in_unit * in_unit;
  });
  for (std::int64_t i = 0; i < columns; ++i) {
    set_moments(near[i], gaps[i], squares[i], count, {to.mean + i, to.squares + i});
  }
}

// Channels whose blocks are added up together.
constexpr std::int64_t kTogether = 64;

// Mean and variance of channels [first, end), at most kTogether, of all blocks: `parts` holds the
// means and then the squares of all `channels` for each block, count(block) says of how many
// positions.
template <typename Number, typename Count>
void combine_moments(const double* parts, std::int64_t blocks, std::int64_t channels,
                     std::int64_t first, std::int64_t end, Count count, Number* mean,
                     Number* variance) {
  double total = 0, means[kTogether] = {}, squares[kTogether] = {};
  for (std::int64_t block = 0; block < blocks; ++block) total += static_cast<double>(count(block));
  for (std::int64_t block = 0; block < blocks; ++block) {
    const double share = static_cast<double>(count(block)) / total;
    const double* const own = parts + block * 2 * channels + first;
    for (std::int64_t i = 0; i < end - first; ++i) means[i] += own[i] * share;
  }
  for (std::int64_t block = 0; block < blocks; ++block) {
    const double weight = static_cast<double>(count(block));
    const double* const own = parts + block * 2 * channels + first;
    for (std::int64_t i = 0; i < end - first; ++i) {
      const double gap = own[i] - means[i];
      squares[i] += own[channels + i] + weight * gap * gap;
    }
  }
  for (std::int64_t i = 0; i < end - first; ++i) {
    mean[first + i] = static_cast<Number>(means[i]);
    variance[first + i] = static_cast<Number>(squares[i] / total);
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_MOMENTS_H_
