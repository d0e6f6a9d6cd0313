// The inner loops of region aggregation. A column is some rows of an image, one below the other, a
// vector wide; the lanes are neighbours along a line or channels. For one frame and one column of
// the kernel, all its rows' taps are held in registers: a vector of input serves every row of the
// column whose window holds it.
#ifndef NLK_CPU_REGION_COLUMNS_H_
#define NLK_CPU_REGION_COLUMNS_H_

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Most rows of a column: they, up to 7 taps and a vector of input share 16 registers, or 32.
constexpr int kTallest = NLK_VECTOR_BYTES == 64 ? 8 : 7;

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// body(Constant<0>), ..., body(Constant<kCount - 1>), written out.
template <int kCount, typename Body>
NLK_INLINE void unrolled(const Body& body) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(body);
    body(Constant<kCount - 1>{});
  }
}
#define NLK_EACH(index) [&](auto index) __attribute__((always_inline))
#define NLK_EACH_GROUP(held, first) [&](auto held, int first) __attribute__((always_inline))

// Keeps a value in a register: compilers load a number again for every product of it, or compute
// every row's bit of `inside` beforehand, into memory.
#if defined(__x86_64__)
#define NLK_KEEP_VECTOR(vector) __asm__("" : "+v"(vector))
#define NLK_KEEP_WORD(word) __asm__("" : "+r"(word))
#else
#define NLK_KEEP_VECTOR(vector)
#define NLK_KEEP_WORD(word)
#endif

// Columns beside each other that the same frames and columns of the kernel reach.
template <typename T>
struct Window {
  const T* input;          // at the first of these taps, in the row of the first tap of the first row
  std::int64_t row, frame, step;  // distances between rows, frames and columns of the input
  unsigned inside;         // bit r: the r-th row of the input exists
  const T* taps;           // at the first of them: (frames, columns, rows), each a vector or a number
  std::int64_t taps_frame, taps_step;
  int frames, columns;     // of the kernel
  T* sums;                 // of the first row of the first column
  std::int64_t sums_row, sums_step;
  std::int64_t count;      // columns beside each other
};

// Adds to the sums of columns of kRows rows, or puts there when `fresh`.
template <typename T, int kRows, int kTaps, bool kVectorTaps>
void correlate_column(const Window<T>& at, bool fresh) {
  constexpr int lanes = kLanes<T>;
  unsigned inside = at.inside;
  const std::int64_t row_step = at.row;
  for (std::int64_t beside = 0; beside < at.count; ++beside) {
    T* sums = at.sums + beside * at.sums_step;
    Vector<T> sum[kRows];
    unrolled<kRows>(NLK_EACH(row) {
      constexpr int r = decltype(row)::value;
      sum[r] = fresh ? Vector<T>{} : load(sums + r * at.sums_row);
    });
    for (int i = 0; i < at.frames; ++i) {
      const T* column = at.input + i * at.frame + beside * lanes;
      const T* tap = at.taps + i * at.taps_frame;
      for (int k = 0; k < at.columns; ++k, column += at.step, tap += at.taps_step) {
        Vector<T> factor[kTaps];
        unrolled<kTaps>(NLK_EACH(index) {
          constexpr int j = decltype(index)::value;
          factor[j] = kVectorTaps ? load(tap + j * lanes) : splat(tap[j]);
        });
        const T* input = column;
        NLK_KEEP_WORD(inside);
        unrolled<kRows + kTaps - 1>(NLK_EACH(index) {
          constexpr int below = decltype(index)::value;
          if (inside >> below & 1) {
            Vector<T> number = load(input);
            NLK_KEEP_VECTOR(number);
            unrolled<kTaps>(NLK_EACH(other) {
              constexpr int j = decltype(other)::value;
              if constexpr (below >= j && below - j < kRows) sum[below - j] += number * factor[j];
            });
          }
          input += row_step;
        });
      }
    }
    unrolled<kRows>(NLK_EACH(row) {
      constexpr int r = decltype(row)::value;
      store(sums + r * at.sums_row, sum[r]);
    });
  }
}

// Columns beside each other, one frame and column of the kernel.
template <typename T>
struct Sweep {
  const T* input;  // in the row of the first tap of the first output
  const T* grad;
  std::int64_t input_row, grad_row;
  unsigned inside;  // as in Window
  std::int64_t count;
};

// Adds, for each of kTaps taps below each other, the lanes' sums of grad * input to `totals`.
template <typename T, int kRows, int kTaps>
void correlate_gradient(const Sweep<T>& at, double* totals) {
  constexpr int lanes = kLanes<T>;
  Vector<T> sum[kTaps] = {};
  const T* columns = at.input;
  const T* grads = at.grad;
  unsigned inside = at.inside;
  for (std::int64_t column = 0; column < at.count; ++column, columns += lanes, grads += lanes) {
    Vector<T> above[kRows];
    const T* grad = grads;
    unrolled<kRows>(NLK_EACH(row) {
      constexpr int r = decltype(row)::value;
      above[r] = load(grad);
      grad += at.grad_row;
    });
    const T* input = columns;
    NLK_KEEP_WORD(inside);
    unrolled<kRows + kTaps - 1>(NLK_EACH(index) {
      constexpr int below = decltype(index)::value;
      if (inside >> below & 1) {
        Vector<T> number = load(input);
        NLK_KEEP_VECTOR(number);
        unrolled<kTaps>(NLK_EACH(other) {
          constexpr int j = decltype(other)::value;
          if constexpr (below >= j && below - j < kRows) sum[j] += number * above[below - j];
        });
      }
      input += at.input_row;
    });
  }
  T numbers[kTaps * lanes];
  unrolled<kTaps>(NLK_EACH(index) {
    constexpr int j = decltype(index)::value;
    store(numbers + j * lanes, sum[j]);
  });
  for (int lane = 0; lane < kTaps * lanes; ++lane) totals[lane] += numbers[lane];
}

// ---- every height ------------------------------------------------------------------------------

template <typename T, int kTaps, bool kVectorTaps>
constexpr void (*kCorrelate[])(const Window<T>&, bool) = {
    &correlate_column<T, 1, kTaps, kVectorTaps>, &correlate_column<T, 2, kTaps, kVectorTaps>,
    &correlate_column<T, 3, kTaps, kVectorTaps>, &correlate_column<T, 4, kTaps, kVectorTaps>,
    &correlate_column<T, 5, kTaps, kVectorTaps>, &correlate_column<T, 6, kTaps, kVectorTaps>,
    &correlate_column<T, 7, kTaps, kVectorTaps>,
    &correlate_column<T, kTallest, kTaps, kVectorTaps>};

template <typename T, int kTaps>
constexpr void (*kCorrelateGradient[])(const Sweep<T>&, double*) = {
    &correlate_gradient<T, 1, kTaps>, &correlate_gradient<T, 2, kTaps>,
    &correlate_gradient<T, 3, kTaps>, &correlate_gradient<T, 4, kTaps>,
    &correlate_gradient<T, 5, kTaps>, &correlate_gradient<T, 6, kTaps>,
    &correlate_gradient<T, 7, kTaps>, &correlate_gradient<T, kTallest, kTaps>};

// Calls body(Constant<taps held>, first tap) until all rows of a kernel are served.
template <typename Body>
NLK_INLINE void in_groups_of_taps(int taps, const Body& body) {
  for (int first = 0; first < taps;) {
    const int left = taps - first;
    if (left >= 7) {
      body(Constant<7>{}, first), first += 7;
    } else if (left >= 5) {
      body(Constant<5>{}, first), first += 5;
    } else if (left >= 3) {
      body(Constant<3>{}, first), first += 3;
    } else {
      body(Constant<1>{}, first), first += 1;
    }
  }
}

// Rows [first, last) in as few columns as there can be, as even as they can be:
// body(first row, rows) for each.
template <typename Body>
NLK_INLINE void in_columns(std::int64_t first, std::int64_t last, const Body& body) {
  const std::int64_t rows = last - first;
  const std::int64_t columns = (rows + kTallest - 1) / kTallest;
  for (std::int64_t column = 0; column < columns; ++column) {
    const std::int64_t top = first + rows * column / columns;
    body(top, static_cast<int>(first + rows * (column + 1) / columns - top));
  }
}

// Which of `count` rows from `first` on lie in [0, height), as bits.
NLK_INLINE unsigned rows_inside(std::int64_t first, int count, std::int64_t height) {
  unsigned inside = 0;
  for (int row = 0; row < count; ++row) {
    inside |= static_cast<unsigned>(first + row >= 0 && first + row < height) << row;
  }
  return inside;
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_COLUMNS_H_
