// Lines of numbers at one distance from each other, read and written a vector at a time.
#ifndef NLK_CPU_LINES_H_
#define NLK_CPU_LINES_H_

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename T>
struct Line {
  T* data;
  std::int64_t step;

  NLK_INLINE Line from(std::int64_t i) const { return {data + i * step, step}; }
};

// The first `count` numbers of a line, zeros behind them.
template <typename T>
NLK_INLINE Vector<Computed<T>> load_line(Line<const T> line, int count) {
  if (line.step == 1) return load_some(line.data, count);
  Computed<T> numbers[kLanes<Computed<T>>] = {};
  for (int lane = 0; lane < count; ++lane) numbers[lane] = widen(line.data[lane * line.step]);
  return load(numbers);
}

template <typename T>
NLK_INLINE void store_line(Line<T> line, Vector<Computed<T>> vector, int count) {
  if (line.step == 1) return store_some(line.data, vector, count);
  Computed<T> numbers[kLanes<Computed<T>>];
  store(numbers, vector);
  for (int lane = 0; lane < count; ++lane) line.data[lane * line.step] = narrow<T>(numbers[lane]);
}

// The first `count` lanes, zeros behind them.
template <typename Number>
NLK_INLINE Vector<Number> first_lanes(Vector<Number> vector, int count) {
  if (count == kLanes<Number>) return vector;
  Number numbers[kLanes<Number>];
  store(numbers, vector);
  return load_some(numbers, count);
}

// How many numbers the vector from number i on has, of `count`.
template <typename Number>
NLK_INLINE int lanes_from(std::int64_t i, std::int64_t count) {
  const std::int64_t left = count - i;
  return left < kLanes<Number> ? static_cast<int>(left) : kLanes<Number>;
}

// Adds what comes of some rows to (kSums, columns) sums: add(row, i, some, sums) adds that of
// columns from i on to as many vectors. Few rows are added to each other first, then to the sums.
template <typename Number, int kSums, typename Add>
NLK_INLINE void add_columns(std::int64_t rows, std::int64_t columns, Number* sums, Add add) {
  constexpr std::int64_t at_once = 4;
  for (std::int64_t row = 0; row < rows; row += at_once) {
    for (std::int64_t i = 0; i < columns; i += kLanes<Number>) {
      const int some = lanes_from<Number>(i, columns);
      Vector<Number> parts[kSums] = {};
      if (row + at_once <= rows) {
#pragma GCC unroll 4
        for (std::int64_t own = 0; own < at_once; ++own) add(row + own, i, some, parts);
      } else {
        for (std::int64_t own = row; own < rows; ++own) add(own, i, some, parts);
      }
#pragma GCC unroll 2
      for (int sum = 0; sum < kSums; ++sum) {
        Number* const to = sums + sum * columns + i;
        store_some(to, load_some(to, some) + parts[sum], some);
      }
    }
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_LINES_H_
