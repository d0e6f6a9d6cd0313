// Sums over positions of the products of all pairs of channels: chunks of positions are packed, then
// every tile of the result adds the products of one chunk after the other.
//
// An operand whose positions are neighbours in memory (a map of channels, NCDHW) is multiplied from
// where it lies, as rows; where that is the right one, the transpose is computed.
#ifndef NLK_CPU_POINTWISE_OUTER_H_
#define NLK_CPU_POINTWISE_OUTER_H_

#include "cpu/attention_plan.h"
#include "cpu/pack.h"
#include "nlk/pointwise.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// total[c] (+)= the sum of a column. Short chains, whose sums are added: less is rounded.
template <typename T>
void sum_columns(Part<T> from, std::int64_t depth, std::int64_t columns, Computed<T>* total,
                 bool add) {
  typedef Computed<T> Number;
  constexpr int lanes = kLanes<Number>;
  constexpr std::int64_t kLines = kChain<Number>;
  if (from.row == 1 && from.column != 1) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const T* column = from.data + c * from.column;
      Vector<Number> all{};
      for (std::int64_t first = 0; first < depth; first += kLines * lanes) {
        const std::int64_t end = smaller_of(depth, first + kLines * lanes);
        Vector<Number> sum{};
        for (std::int64_t k = first; k < end; k += lanes) {
          const int some = static_cast<int>(smaller_of(lanes, end - k));
          sum = sum + load_some(column + k, some);
        }
        all = all + sum;
      }
      total[c] = sum_of_lanes<Number>(all) + (add ? total[c] : Number{0});
    }
    return;
  }
  for (std::int64_t v = 0; v < columns; v += lanes) {
    const int some = static_cast<int>(smaller_of(lanes, columns - v));
    Vector<Number> all{};
    for (std::int64_t first = 0; first < depth; first += kLines) {
      const std::int64_t end = smaller_of(depth, first + kLines);
      Vector<Number> sum{};
      for (std::int64_t k = first; k < end; ++k) {
        const T* at = from.data + k * from.row + v * from.column;
        if (from.column == 1) {
          sum = sum + load_some(at, some);
        } else {
          for (int i = 0; i < some; ++i) sum[i] += widen(at[i * from.column]);
        }
      }
      all = all + sum;
    }
    store_some(total + v, add ? all + load_some(total + v, some) : all, some);
  }
}

template <typename T>
class Outer {
  typedef typename FactorOf<T>::Type E;
  typedef Computed<T> Number;
  static constexpr std::int64_t kChunkBytes = 1 << 20;  // of packed positions

  struct Side {
    Operand operand;
    std::int64_t channels;
  };

 public:
  explicit Outer(const OuterArguments& call) : a_(call) {
    rows_ = {a_.left, a_.left_channels};
    columns_ = {a_.right, a_.right_channels};
    swapped_ = is_map(columns_) && !is_map(rows_);
    if (swapped_) {
      const Side side = rows_;
      rows_ = columns_;
      columns_ = side;
    }
    const bool in_place =
        is_map(rows_) && sizeof(E) == sizeof(T) && a_.positions % kGroup<E> == 0 &&
        rows_.operand.channel * static_cast<std::int64_t>(sizeof(E)) % kWayBytes != 0;
    tall_ = blocks_of(rows_.channels, kTallPanel);
    wide_ = blocks_of(columns_.channels, kPanel<E>);
    row_ = padded_columns<E>(columns_.channels);
    // A last panel whose rows are no whole steps is packed in any case.
    const std::int64_t whole = tall_ - (rows_.channels % kRowStep != 0);
    packed_from_ = in_place ? whole * kTallPanel : 0;
    const std::int64_t packed = tall_ * kTallPanel - packed_from_ + row_;
    const std::int64_t bytes = packed * std::int64_t{sizeof(E)};
    const std::int64_t most = larger_of(kDepth<E>, kChunkBytes / bytes);
    const std::int64_t even = blocks_of(a_.positions, blocks_of(a_.positions, most));
    chunk_ = rounded_up(even, kGroup<E>);
    tall_row_ = packed_stride<E>(chunk_);
  }

  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    tall_panels_ = pieces.take<E>((tall_ * kTallPanel - packed_from_) * tall_row_);
    wide_panels_ = pieces.take<E>(row_ * chunk_);
    sums_ = pieces.take<Number>(rounded_up(rows_.channels, kRowStep) * row_);
    return pieces.bytes();
  }

  bool run() {
    lay_out(a_.workspace);
    for (std::int64_t item = 0; item < a_.batch; ++item) {
      for (std::int64_t from = 0; from < a_.positions; from += chunk_) {
        const Chunk chunk{item, from, smaller_of(chunk_, a_.positions - from), item + from > 0};
        auto pack = [&](std::int64_t task, int) {
          if (task < tall_) {
            pack_rows_of(chunk, task * kTallPanel);
          } else {
            pack_columns_of(chunk, (task - tall_) * kPanel<E>);
          }
        };
        if (!parallel(a_.threads, tall_ + wide_, pack)) return false;
        auto product = [&](std::int64_t task, int) {
          multiply_tile_of(chunk, task / wide_ * kTallPanel, task % wide_ * kPanel<E>);
        };
        if (!parallel(a_.threads, tall_ * wide_, product)) return false;
      }
    }
    auto finish = [&](std::int64_t task, int) {
      const std::int64_t row = task * kTallPanel;
      const std::int64_t rows = smaller_of(kTallPanel, rows_.channels - row);
      const std::int64_t to_row = swapped_ ? 1 : a_.right_channels;
      write<Number>(sums_ + row * row_, row_, 1, static_cast<Number*>(a_.outer) + row * to_row,
                    to_row, swapped_ ? a_.right_channels : 1, rows, columns_.channels, Number{1});
    };
    return parallel(a_.threads, tall_, finish);
  }

 private:
  struct Chunk {
    std::int64_t item, from, count;
    bool add;
  };

  bool is_map(const Side& side) const { return side.operand.row == 1; }

  Part<T> part(const Side& side, const Chunk& chunk, std::int64_t channel) const {
    return part_of<T>(side.operand, chunk.item, chunk.from, channel);
  }

  // Where the rows from a channel on are packed, of those that are not multiplied where they lie.
  E* packed_rows(std::int64_t channel) const {
    return tall_panels_ + (channel - packed_from_) * tall_row_;
  }

  void pack_rows_of(const Chunk& chunk, std::int64_t channel) {
    const std::int64_t channels = smaller_of(kTallPanel, rows_.channels - channel);
    const Part<T> from = part(rows_, chunk, channel);
    if (channel >= packed_from_) {
      E* to = packed_rows(channel);
      if (is_map(rows_)) {
        pack_rows<E, T>(transposed(from), channels, chunk.count, to, tall_row_,
                        rounded_up(channels, kRowStep), rounded_up(chunk.count, kGroup<E>));
      } else {
        pack_panel<E, T>(from, chunk.count, channels, kTallPanel, to);
      }
    }
    if (!swapped_) sum(from, channel, channels, chunk);
  }

  void pack_columns_of(const Chunk& chunk, std::int64_t channel) {
    const std::int64_t channels = smaller_of(kPanel<E>, columns_.channels - channel);
    const Part<T> from = part(columns_, chunk, channel);
    pack_panel<E, T>(from, chunk.count, channels, panel_width<E>(channels),
                     wide_panels_ + channel * chunk_);
    if (swapped_) sum(from, channel, channels, chunk);
  }

  // The sums of the left operand's channels, whichever side of the product it is.
  void sum(Part<T> from, std::int64_t channel, std::int64_t channels, const Chunk& chunk) {
    Number* sums = static_cast<Number*>(a_.sums) + channel;
    sum_columns<T>(from, chunk.count, channels, sums, chunk.add);
  }

  void multiply_tile_of(const Chunk& chunk, std::int64_t row, std::int64_t column) {
    const std::int64_t rows = smaller_of(kTallPanel, rows_.channels - row);
    RowFactors factors;
    if (row < packed_from_) {
      const T* lies = part(rows_, chunk, row).data;
      factors = in_rows(reinterpret_cast<const E*>(lies), rows_.operand.channel);
    } else if (is_map(rows_)) {
      factors = in_rows<E>(packed_rows(row), tall_row_);
    } else {
      factors = in_tall_panel<E>(packed_rows(row));
    }
    multiply<E>(factors, wide_panels_ + column * chunk_, chunk_, rounded_up(rows, kRowStep),
                smaller_of(kPanel<E>, columns_.channels - column),
                rounded_up(chunk.count, kGroup<E>), sums_ + row * row_ + column, row_, chunk.add);
  }

  OuterArguments a_;
  Side rows_{}, columns_{};
  bool swapped_ = false;
  std::int64_t tall_, wide_, row_, chunk_, tall_row_;
  std::int64_t packed_from_ = 0;  // rows before it are multiplied from where they lie
  E *tall_panels_ = nullptr, *wide_panels_ = nullptr;
  Number* sums_ = nullptr;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_POINTWISE_OUTER_H_
