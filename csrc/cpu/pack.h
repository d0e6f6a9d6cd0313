// Operands of any strides into the layouts of product.h, and results back.
#ifndef NLK_CPU_PACK_H_
#define NLK_CPU_PACK_H_

#include "cpu/product.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename E, typename T>
NLK_INLINE E converted(T number) {
  return narrow<E>(widen(number));
}
template <>
NLK_INLINE Bfloat16 converted<Bfloat16, Bfloat16>(Bfloat16 number) {
  return number;
}

// The first `count` numbers as bfloat16, in bits, zeros behind them; reads nothing else.
template <typename T>
NLK_INLINE HalfBits convert_bits(const T* from, int count) {
  return narrow_bits(load_some(from, count));
}
template <>
NLK_INLINE HalfBits convert_bits<Bfloat16>(const Bfloat16* from, int count) {
  if (count >= kLanes<float>) return load_bits<HalfBits>(from);
  HalfBits bits{};
  std::memcpy(&bits, from, count * sizeof(Bfloat16));
  return bits;
}

// Pairs of a number of `first` and the one of `second`.
NLK_INLINE void store_pairs(Bfloat16* to, HalfBits first, HalfBits second) {
  const UintVector pairs = __builtin_convertvector(first, UintVector) |
                           (__builtin_convertvector(second, UintVector) << 16);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// A (rows, columns) part of an operand of element type T.
template <typename T>
struct Part {
  const T* data;
  std::int64_t row, column;  // strides
  NLK_INLINE T at(std::int64_t r, std::int64_t c) const { return data[r * row + c * column]; }
};

// Rows as factors A: (rows, columns) at `to`, row after row, zeros up to padded rows and columns.
template <typename E, typename T>
void pack_rows(Part<T> from, std::int64_t rows, std::int64_t columns, E* to, std::int64_t to_row,
               std::int64_t padded_rows, std::int64_t padded_columns) {
  constexpr std::int64_t kBlock = 16;  // rows that are written side by side where columns are strided
  for (std::int64_t first = 0; first < rows; first += kBlock) {
    const std::int64_t last = smaller_of(rows, first + kBlock);
    if (from.column == 1) {
      for (std::int64_t r = first; r < last; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) {
          to[r * to_row + c] = converted<E>(from.data[r * from.row + c]);
        }
      }
    } else {
      for (std::int64_t c = 0; c < columns; ++c) {
        for (std::int64_t r = first; r < last; ++r) {
          to[r * to_row + c] = converted<E>(from.at(r, c));
        }
      }
    }
  }
  for (std::int64_t r = 0; r < padded_rows; ++r) {
    for (std::int64_t c = r < rows ? columns : 0; c < padded_columns; ++c) to[r * to_row + c] = E{};
  }
}

// Rows that lie a multiple of this apart, in bytes, push each other out of a first-level cache.
constexpr std::int64_t kWayBytes = 4096;

// Stride of rows of so many columns that are packed as factors A.
template <typename E>
NLK_INLINE std::int64_t packed_stride(std::int64_t columns) {
  constexpr std::int64_t size = sizeof(E);
  const std::int64_t stride = rounded_up(columns, kGroup<E>);
  return stride * size % kWayBytes == 0 ? stride + kLineBytes / size : stride;
}

// Rows as factors A: where they lie, or packed at `to`, padded rows at the packed stride.
template <typename E, typename T>
RowFactors row_factors(Part<T> from, std::int64_t rows, std::int64_t columns, E* to) {
  if constexpr (sizeof(E) == sizeof(T)) {
    const bool whole = rows % kRowStep == 0 && columns % kGroup<E> == 0;
    const bool apart = from.row * static_cast<std::int64_t>(sizeof(E)) % kWayBytes != 0;
    if (from.column == 1 && whole && apart) {
      return in_rows(reinterpret_cast<const E*>(from.data), from.row);
    }
  }
  const std::int64_t stride = packed_stride<E>(columns);
  pack_rows<E, T>(from, rows, columns, to, stride, rounded_up(rows, kRowStep), stride);
  return in_rows(to, stride);
}

// Width of the panel that holds so many columns, at most kPanel.
template <typename E>
NLK_INLINE std::int64_t panel_width(std::int64_t columns) {
  return columns > kPanel<E> / 2 ? kPanel<E> : kPanel<E> / 2;
}

// So many fours of groups of the depth, of 32 bits each, of whole fours of columns, whose depth is
// contiguous. Four columns at a time give all of that: columns often lie where each pushes the
// others out of the first-level cache.
template <typename E, typename T>
NLK_INLINE void transpose_fours(const T* from, std::int64_t stride, std::int64_t columns,
                                std::int64_t fours, E* to) {
  typedef std::uint32_t Four __attribute__((vector_size(16)));
  constexpr int group = kGroup<E>;
  constexpr std::int64_t line = kLineBytes / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t c = 0; c < columns; c += 4) {
    for (int i = 0; i < 4; ++i) __builtin_prefetch(from + (c + i) * stride + line, 0, 2);
    for (std::int64_t k = 0; k < 4 * fours; k += 4) {
      Four of_column[4];
      for (int i = 0; i < 4; ++i) of_column[i] = load_bits<Four>(from + (c + i) * stride + k * group);
      const Four low[2] = {__builtin_shufflevector(of_column[0], of_column[1], 0, 4, 1, 5),
                           __builtin_shufflevector(of_column[2], of_column[3], 0, 4, 1, 5)};
      const Four high[2] = {__builtin_shufflevector(of_column[0], of_column[1], 2, 6, 3, 7),
                            __builtin_shufflevector(of_column[2], of_column[3], 2, 6, 3, 7)};
      const Four of_depth[4] = {__builtin_shufflevector(low[0], low[1], 0, 1, 4, 5),
                                __builtin_shufflevector(low[0], low[1], 2, 3, 6, 7),
                                __builtin_shufflevector(high[0], high[1], 0, 1, 4, 5),
                                __builtin_shufflevector(high[0], high[1], 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) {
        std::memcpy(to + ((k + i) * columns + c) * group, &of_depth[i], sizeof(Four));
      }
    }
  }
}

// Rows of `from` as depth of a panel of `width` columns: for every group of rows, the group's
// numbers of each column. Zeros behind the columns, and in a last group behind the depth.
template <typename E, typename T>
void pack_panel(Part<T> from, std::int64_t depth, std::int64_t columns, std::int64_t width, E* to) {
  constexpr int group = kGroup<E>;
  constexpr int lanes = kLanes<Computed<E>>;
  constexpr std::int64_t kLine = kLineBytes / static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t kRowsAhead = 16;  // rows of a map lie pages apart: each is asked for early
  for (std::int64_t k = 0; k < depth; k += group) {
    const std::int64_t present = smaller_of(group, depth - k);
    E* row = to + k * width;
    if (from.column == 1 && present == group) {
      for (int g = 0; g < group; ++g) {
        const T* ahead = from.data + (k + g + kRowsAhead) * from.row;
        for (std::int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(ahead + c);
      }
      for (std::int64_t v = 0; v < width; v += lanes) {
        const T* at = from.data + k * from.row + v;
        const int some = static_cast<int>(larger_of(0, smaller_of(lanes, columns - v)));
        if constexpr (group == 2) {
          store_pairs(row + v * 2, convert_bits<T>(at, some), convert_bits<T>(at + from.row, some));
        } else {
          store(row + v, load_some(at, some));
        }
      }
      continue;
    }
    if (from.row == 1 && k + 4 * group <= depth && columns == width && group * sizeof(T) == 4 &&
        sizeof(T) == sizeof(E)) {
      const std::int64_t fours = smaller_of(4, (depth - k) / (4 * group));
      transpose_fours<E, T>(from.data + k, from.column, columns, fours, row);
      k += (4 * fours - 1) * group;
      continue;
    }
    if (from.row == 1 && present == group && sizeof(T) == sizeof(E)) {
      for (std::int64_t c = 0; c < columns; ++c) {
        std::memcpy(row + c * group, from.data + c * from.column + k, group * sizeof(E));
      }
      if (columns < width) std::memset(row + columns * group, 0, (width - columns) * group * sizeof(E));
      continue;
    }
    for (std::int64_t c = 0; c < width; ++c) {
      for (int g = 0; g < group; ++g) {
        const bool inside = c < columns && g < present;
        row[c * group + g] = inside ? converted<E>(from.at(k + g, c)) : E{};
      }
    }
  }
}

// factor * source (rows, columns) to `to`; strides of both are free.
template <typename T>
void write(const Computed<T>* source, std::int64_t source_row, std::int64_t source_column, T* to,
           std::int64_t to_row, std::int64_t to_column, std::int64_t rows, std::int64_t columns,
           Computed<T> factor) {
  constexpr std::int64_t kBlock = 16;
  constexpr int lanes = kLanes<Computed<T>>;
  for (std::int64_t first = 0; first < rows; first += kBlock) {
    const std::int64_t last = smaller_of(rows, first + kBlock);
    if (source_column == 1 && to_column == 1) {
      for (std::int64_t r = first; r < last; ++r) {
        for (std::int64_t c = 0; c < columns; c += lanes) {
          const int count = static_cast<int>(smaller_of(lanes, columns - c));
          const auto numbers = load_some(source + r * source_row + c, count);
          store_some(to + r * to_row + c, numbers * splat<Computed<T>>(factor), count);
        }
      }
    } else {
      for (std::int64_t c = 0; c < columns; ++c) {
        for (std::int64_t r = first; r < last; ++r) {
          const Computed<T> number = source[r * source_row + c * source_column];
          to[r * to_row + c * to_column] = narrow<T>(number * factor);
        }
      }
    }
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_PACK_H_
