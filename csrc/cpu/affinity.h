// What becomes of a row of scores, in place, and of its gradient.
#ifndef NLK_CPU_AFFINITY_H_
#define NLK_CPU_AFFINITY_H_

#include "cpu/exp2.h"
#include "nlk/attention.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// A row of numbers in whole vectors; of the last one, `tail` says which lanes are the row's.
template <typename Number>
struct RowShape {
  std::int64_t columns;
  IntegerVector<Number> tail;

  explicit RowShape(std::int64_t count) : columns(count) {
    const std::int64_t last = (count - 1) % kLanes<Number>;
    for (int lane = 0; lane < kLanes<Number>; ++lane) tail[lane] = lane <= last ? -1 : 0;
  }
  NLK_INLINE bool is_last(std::int64_t at) const { return at + kLanes<Number> >= columns; }
};

// Zeros behind the row, where an infinity of the other factor times a pad left a NaN.
template <typename Number>
NLK_INLINE Vector<Number> inside(const RowShape<Number>& shape, std::int64_t at,
                                 Vector<Number> numbers) {
  return shape.is_last(at) ? (shape.tail ? numbers : Vector<Number>{}) : numbers;
}

// Adds vectors: sums of sums of few numbers round little.
template <typename Number>
class LaneSum {
 public:
  NLK_INLINE void add(Vector<Number> numbers) {
    part_ += numbers;
    if (++count_ == kMost) flush();
  }
  NLK_INLINE Number total() {
    flush();
    return sum_of_lanes<Number>(whole_);
  }

 private:
  static constexpr int kMost = 32;
  NLK_INLINE void flush() {
    whole_ += part_;
    part_ = Vector<Number>{};
    count_ = 0;
  }
  Vector<Number> part_{}, whole_{};
  int count_ = 0;
};

// The largest of a row, the smallest where `smallest`; NaN need not be found, it shows in the sum.
template <typename Number>
NLK_INLINE Number extreme(const Number* row, const RowShape<Number>& shape, bool smallest) {
  constexpr int lanes = kLanes<Number>;
  const Vector<Number> sign = splat<Number>(smallest ? Number{-1} : Number{1});
  Vector<Number> top = splat<Number>(row[0]) * sign;
  for (std::int64_t k = 0; k < shape.columns; k += lanes) {
    Vector<Number> numbers = load(row + k) * sign;
    if (shape.is_last(k)) numbers = shape.tail ? numbers : top;
    top = numbers > top ? numbers : top;
  }
  Number largest = top[0];
  for (int lane = 1; lane < lanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
  return smallest ? -largest : largest;
}

template <typename Number>
struct RowStatistics {
  Number extreme, total;
};

// exp(scale (S - extreme)), stored by `keep(column, numbers)`; zeros behind the row.
template <typename Number, typename Keep>
NLK_INLINE RowStatistics<Number> exponentials(const Number* row, const RowShape<Number>& shape,
                                              double scale, Keep keep) {
  constexpr int lanes = kLanes<Number>;
  const Number top = extreme(row, shape, scale < 0);
  const Vector<Number> tops = splat<Number>(top);
  const Vector<Number> factor = splat<Number>(static_cast<Number>(scale * 1.44269504088896340736));
  LaneSum<Number> sum;
  for (std::int64_t k = 0; k < shape.columns; k += lanes) {
    Vector<Number> weights = exp2<Number>((load(row + k) - tops) * factor);
    weights = inside(shape, k, weights);
    sum.add(weights);
    keep(k, weights);
  }
  return {top, sum.total()};
}

// factor S, or max(factor S, 0), of which NaN stays NaN; zeros behind the row.
template <typename Number, typename Keep>
NLK_INLINE void scaled(const Number* row, const RowShape<Number>& shape, Number factor,
                       bool rectify, Keep keep) {
  const Vector<Number> factors = splat<Number>(factor);
  for (std::int64_t k = 0; k < shape.columns; k += kLanes<Number>) {
    Vector<Number> weights = load(row + k) * factors;
    if (rectify) weights = weights <= Vector<Number>{} ? Vector<Number>{} : weights;
    keep(k, inside(shape, k, weights));
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_AFFINITY_H_
