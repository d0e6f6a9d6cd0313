// Matrix products from packed operands: the inner loops of attention.
//
//   C (rows, columns) = A (rows, depth) B (depth, columns), or C += A B
//
// B lies in panels of kPanel<E> columns: for every group of depth, the group's numbers of each
// column; a last panel of at most half as many columns is half as wide. A group is two bfloat16
// numbers where the machine multiplies pairs of them, else one number. A lies row after row, its
// depth contiguous, or in panels of kTallPanel rows. Pads hold zeros. C is row after row in the
// type that sums are computed in, as wide as the panels.
#ifndef NLK_CPU_PRODUCT_H_
#define NLK_CPU_PRODUCT_H_

#include <type_traits>

#include "cpu/simd.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Numbers of the depth that one instruction multiplies and adds.
template <typename E>
constexpr int kGroup = sizeof(E) == 2 ? 2 : 1;
template <typename E>
constexpr int kPanel = 2 * kLanes<Computed<E>>;
// Rows of a tile of C: with two vectors each, what 32 (or 16) registers hold beside the factors.
constexpr int kTileRows = NLK_VECTOR_BYTES == 64 ? 12 : 6;
// Rows are padded to multiples of this.
constexpr int kRowStep = 3;
// Rows of a panel of factors A: whole tiles, and whole vectors.
constexpr int kTallPanel = 48;
// Depth of a part of a panel that stays in the first-level cache with the rows that pass it: at
// most 16 KiB.
template <typename E>
constexpr int kDepth = 128 * kGroup<E>;
// Products that are added one after another before their sum goes to C: the rounding of n products
// in a single chain grows with n, that of short chains with its root. Factors of 16 bits round more.
template <typename E>
constexpr int kChain = sizeof(E) == 2 ? kDepth<E> : 64;
constexpr std::int64_t kLineBytes = 64;  // what a cache fetches at once

NLK_INLINE std::int64_t rounded_up(std::int64_t number, std::int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}
NLK_INLINE std::int64_t smaller_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
NLK_INLINE std::int64_t larger_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Columns that panels of so many columns have, pads included.
template <typename E>
NLK_INLINE std::int64_t padded_columns(std::int64_t columns) {
  return rounded_up(columns, kPanel<E> / 2);
}

// acc + a b, for a group's numbers of one row in all lanes and those of a panel's columns.
template <typename E>
struct Group {
  typedef Vector<E> Factor;
  static NLK_INLINE Factor of_row(const E* a) { return splat<E>(*a); }
  static NLK_INLINE Factor of_columns(const E* b) { return load(b); }
  static NLK_INLINE Factor multiply_add(Factor a, Factor b, Factor sum) { return a * b + sum; }
};
#if NLK_BF16_DOT
template <>
struct Group<Bfloat16> {
  typedef __m512bh Factor;
  static NLK_INLINE Factor of_row(const Bfloat16* a) {
    return bit_copy<Factor>(_mm512_set1_epi32(load_bits<std::int32_t>(a)));
  }
  static NLK_INLINE Factor of_columns(const Bfloat16* b) { return load_bits<Factor>(b); }
  static NLK_INLINE FloatVector multiply_add(Factor a, Factor b, FloatVector sum) {
    return bit_copy<FloatVector>(_mm512_dpbf16_ps(bit_copy<__m512>(sum), a, b));
  }
};
#endif

// Factors A: a group of row r and groups g before it lies at data + r row + g step. Strides are in
// bytes: the compiler then needs one pointer for three rows.
struct RowFactors {
  const char* data;
  std::int64_t row, step;
};

// (rows, depth), row after row at a stride.
template <typename E>
NLK_INLINE RowFactors in_rows(const E* data, std::int64_t stride) {
  constexpr std::int64_t size = sizeof(E);
  return {reinterpret_cast<const char*>(data), stride * size, kGroup<E> * size};
}

// A panel of kTallPanel rows.
template <typename E>
NLK_INLINE RowFactors in_tall_panel(const E* data) {
  constexpr std::int64_t group = kGroup<E> * static_cast<std::int64_t>(sizeof(E));
  return {reinterpret_cast<const char*>(data), group, kTallPanel * group};
}

// What is fetched into the caches while a tile is computed, a line for each group of the depth: the
// part of a panel that comes next. The processor's own prefetching ends at every page.
struct Ahead {
  const char* next;
  std::int64_t step;
};

// Where the sums of a product go at its end: they stay in C.
struct Kept {
  static constexpr bool kStays = true;
  NLK_INLINE Kept from(std::int64_t, std::int64_t) const { return {}; }
};

// Or they are written to a result of type T whose columns are neighbours in memory:
//   to = base + (factor sum + row_shift + column_shift)
template <typename T>
struct Written {
  typedef Computed<T> Number;
  static constexpr bool kStays = false;
  T* to;
  const T* base;  // this and the shifts may be null
  std::int64_t to_row, base_row;  // strides
  std::int64_t rows, columns;     // those that are no pads
  const Number *row_shift, *column_shift;
  Number factor;

  // What lies behind so many rows and columns.
  NLK_INLINE Written from(std::int64_t row, std::int64_t column) const {
    return {to + row * to_row + column,
            base ? base + row * base_row + column : nullptr,
            to_row,
            base_row,
            rows - row,
            columns - column,
            row_shift ? row_shift + row : nullptr,
            column_shift ? column_shift + column : nullptr,
            factor};
  }

  // Into the second-level cache: the first holds what is multiplied, and no more.
  NLK_INLINE void fetch(int row, int column) const {
    __builtin_prefetch(to + row * to_row + column, 1, 2);
    if (base) __builtin_prefetch(base + row * base_row + column, 0, 2);
  }

  NLK_INLINE void write(int row, int column, Vector<Number> sum) const {
    const int count = static_cast<int>(columns) - column;
    if (row >= rows || count <= 0) return;
    sum = sum * splat<Number>(factor);
    if (row_shift) sum = sum + splat<Number>(row_shift[row]);
    if (column_shift) sum = sum + load_some(column_shift + column, count);
    if (base) sum = sum + load_some(base + row * base_row + column, count);
    store_some(to + row * to_row + column, sum, count);
  }
};

// One tile of C: ROWS rows of VECTORS vectors.
template <typename E, int ROWS, int VECTORS, typename End>
void multiply_tile(RowFactors a, const E* b, std::int64_t depth, Computed<E>* c,
                   std::int64_t c_stride, bool add, Ahead ahead, const End& end) {
  typedef Computed<E> Number;
  constexpr int lanes = kLanes<Number>;
#pragma GCC unroll 12
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      if (End::kStays || add) __builtin_prefetch(c + row * c_stride + v * lanes, 1, 2);
      if constexpr (!End::kStays) end.fetch(row, v * lanes);
    }
  }
  const char* rows[ROWS / kRowStep];
#pragma GCC unroll 4
  for (int triple = 0; triple < ROWS / kRowStep; ++triple) {
    rows[triple] = a.data + triple * kRowStep * a.row;
  }
  for (; depth > 0; depth -= kChain<E>, add = true) {
    Vector<Number> sums[ROWS][VECTORS] = {};
    const std::int64_t chain = smaller_of(kChain<E>, depth);
    for (std::int64_t k = 0; k < chain; k += kGroup<E>) {
      typename Group<E>::Factor columns[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        columns[v] = Group<E>::of_columns(b + v * lanes * kGroup<E>);
      }
      b += VECTORS * lanes * kGroup<E>;
      __builtin_prefetch(ahead.next);
      ahead.next += ahead.step;
#pragma GCC unroll 12
      for (int row = 0; row < ROWS; ++row) {
        const char* at = rows[row / kRowStep] + row % kRowStep * a.row;
        const auto factor = Group<E>::of_row(reinterpret_cast<const E*>(at));
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
          sums[row][v] = Group<E>::multiply_add(factor, columns[v], sums[row][v]);
        }
      }
#pragma GCC unroll 4
      for (int triple = 0; triple < ROWS / kRowStep; ++triple) rows[triple] += a.step;
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        Number* to = c + row * c_stride + v * lanes;
        const Vector<Number> sum = add ? sums[row][v] + load(to) : sums[row][v];
        if constexpr (End::kStays) {
          store(to, sum);
        } else if (depth > kChain<E>) {
          store(to, sum);
        } else {
          end.write(row, v * lanes, sum);
        }
      }
    }
  }
}

// Tiles of all rows, which pass one part of a panel. `next` is the part that comes after it.
template <typename E, int VECTORS, typename End>
NLK_INLINE void multiply_rows(RowFactors a, const E* b, std::int64_t rows, std::int64_t depth,
                              Computed<E>* c, std::int64_t c_stride, bool add, const E* next,
                              End end) {
  constexpr std::int64_t part = VECTORS * kLanes<Computed<E>> * kDepth<E> * std::int64_t{sizeof(E)};
  constexpr std::int64_t of_tile = kDepth<E> / kGroup<E> * kLineBytes;
  const Ahead nothing{reinterpret_cast<const char*>(b), 0};
  Ahead ahead = next ? Ahead{reinterpret_cast<const char*>(next), kLineBytes} : nothing;
  const char* part_end = ahead.next + part;
  std::int64_t left = rows;
  for (; left >= kTileRows; left -= kTileRows) {
    multiply_tile<E, kTileRows, VECTORS>(a, b, depth, c, c_stride, add, ahead, end);
    a.data += kTileRows * a.row;
    c += kTileRows * c_stride;
    end = end.from(kTileRows, 0);
    ahead.next += of_tile;
    if (ahead.next >= part_end) ahead = nothing;
  }
  if constexpr (kTileRows > 2 * kRowStep) {
    if (left == 3 * kRowStep) {
      multiply_tile<E, 3 * kRowStep, VECTORS>(a, b, depth, c, c_stride, add, ahead, end);
    }
    if (left == 2 * kRowStep) {
      multiply_tile<E, 2 * kRowStep, VECTORS>(a, b, depth, c, c_stride, add, ahead, end);
    }
  }
  if (left == kRowStep) {
    multiply_tile<E, kRowStep, VECTORS>(a, b, depth, c, c_stride, add, ahead, end);
  }
}

// Columns [0, columns) of C. Rows are a multiple of kRowStep, the depth of kGroup. The panels of B
// hold `panel_depth` of the depth, of which the first `depth` are multiplied: some, where sums do
// not stay in C.
template <typename E, typename End = Kept>
void multiply(RowFactors a, const E* b, std::int64_t panel_depth, std::int64_t rows,
              std::int64_t columns, std::int64_t depth, Computed<E>* c, std::int64_t c_stride,
              bool add, const End& end = {}) {
  if (depth == 0 && !add) {
    const std::int64_t bytes = padded_columns<E>(columns) * std::int64_t{sizeof(Computed<E>)};
    for (std::int64_t row = 0; row < rows; ++row) std::memset(c + row * c_stride, 0, bytes);
  }
  for (std::int64_t from = 0; from < depth; from += kDepth<E>) {
    const std::int64_t part = smaller_of(kDepth<E>, depth - from);
    const RowFactors factors{a.data + from / kGroup<E> * a.step, a.row, a.step};
    const bool ends = from + part == depth;
    for (std::int64_t column = 0; column < columns; column += kPanel<E>) {
      const E* panel = b + column * panel_depth;
      const bool wide = columns - column > kPanel<E> / 2;
      const bool last = columns - column <= kPanel<E>;
      const E* next = last ? b + (from + kDepth<E>) * kPanel<E>
                           : panel + (panel_depth + from) * kPanel<E>;
      if (last && ends) next = nullptr;
      auto pass = [&](auto vectors, const auto& to) {
        constexpr int count = decltype(vectors)::value;
        multiply_rows<E, count>(factors, panel + from * count * (kPanel<E> / 2), rows, part,
                                c + column, c_stride, add || from > 0, next, to);
      };
      auto pass_to = [&](const auto& to) {
        if (wide) {
          pass(std::integral_constant<int, 2>{}, to);
        } else {
          pass(std::integral_constant<int, 1>{}, to);
        }
      };
      if (ends) {
        pass_to(end.from(0, column));
      } else {
        pass_to(Kept{});
      }
    }
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_PRODUCT_H_
