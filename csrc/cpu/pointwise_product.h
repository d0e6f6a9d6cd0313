// Pointwise products: weights are packed once, then blocks of positions, each by one thread.
//
//   channels of the result are neighbours in memory   positions are rows of C, weights its panels
//   positions are (maps of channels, NCDHW)           weights are rows of C, in tall panels, positions its panels
//
// so that results are written from end to end in both.
#ifndef NLK_CPU_POINTWISE_PRODUCT_H_
#define NLK_CPU_POINTWISE_PRODUCT_H_

#include "cpu/attention_plan.h"
#include "cpu/moments.h"
#include "cpu/pack.h"
#include "nlk/pointwise.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename T>
class PointwiseProduct {
  typedef typename FactorOf<T>::Type E;
  typedef Computed<T> Number;
  // Positions of a block, and results that are written at once: these and the packed positions stay
  // in the second-level cache.
  static constexpr std::int64_t kRowsOfBlock = 2 * kTallPanel, kColumnsOfResults = 512;
  static constexpr std::int64_t kColumnsOfBlock = 4 * kPanel<E>, kRowsOfResults = 192;

 public:
  explicit PointwiseProduct(const PointwiseArguments& call) : a_(call) {
    maps_ = a_.out.channel != 1 && a_.out.row == 1;
    const bool along = maps_ ? a_.base.row == 1 : a_.out.channel == 1 && a_.base.channel == 1;
    is_direct_ = !a_.moments && a_.source[a_.sources - 1].depth > 0 &&
                 (along || (!a_.base.data && (maps_ || a_.out.channel == 1)));
    unit_ = maps_ ? kPanel<E> / 2 : 4 * kRowStep;
    units_ = blocks_of(a_.positions, unit_);
    const std::int64_t most = maps_ ? kColumnsOfBlock : kRowsOfBlock;
    // As many blocks for each thread, of almost equal size.
    blocks_ = smaller_of(units_, rounded_up(blocks_of(a_.positions, most), a_.threads));
  }

  // Where what lies; returns the bytes of it all.
  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    const std::int64_t channels =
        maps_ ? rounded_up(a_.channels, kTallPanel) : padded_columns<E>(a_.channels);
    for (int s = 0; s < a_.sources; ++s) {
      weights_[s] = pieces.take<E>(channels * whole_groups(a_.source[s].depth));
    }
    moments_ = pieces.take<double>(a_.moments ? a_.batch * blocks_ * 2 * a_.channels : 0);
    const std::int64_t shared = pieces.bytes();
    const std::int64_t count = blocks_of(units_, blocks_) * unit_;
    const std::int64_t columns = padded_columns<E>(count), rows = rounded_up(count, kTallPanel);
    for (int s = 0; s < a_.sources; ++s) {
      const std::int64_t depth = a_.source[s].depth;
      positions_[s] = pieces.take<E>(maps_ ? columns * whole_groups(depth)
                                           : rows * packed_stride<E>(depth));
    }
    results_row_ =
        maps_ ? columns : padded_columns<E>(smaller_of(a_.channels, kColumnsOfResults));
    const std::int64_t of_channels = rounded_up(smaller_of(a_.channels, kRowsOfResults), kRowStep);
    results_ = pieces.take<Number>((maps_ ? of_channels : rows) * results_row_);
    columns_ = pieces.take<Number>(a_.moments && !maps_ ? 3 * results_row_ : 0);
    thread_bytes_ = pieces.bytes() - shared;
    return shared + a_.threads * thread_bytes_;
  }

  bool run() {
    lay_out(a_.workspace);
    const std::int64_t piece = maps_ ? kTallPanel : kPanel<E>;
    const std::int64_t pieces = blocks_of(a_.channels, piece);
    auto pack = [&](std::int64_t task, int) {
      pack_weight(static_cast<int>(task / pieces), task % pieces * piece, piece);
    };
    if (!parallel(a_.threads, a_.sources * pieces, pack)) return false;
    auto block = [&](std::int64_t task, int thread) {
      const Block at = block_at(task, thread);
      if (maps_) {
        compute_maps(at);
      } else {
        compute_rows(at);
      }
    };
    if (!parallel(a_.threads, a_.batch * blocks_, block)) return false;
    auto combine = [&](std::int64_t task, int) { combine_blocks(task * kTogether); };
    return !a_.moments || parallel(a_.threads, blocks_of(a_.channels, kTogether), combine);
  }

 private:
  struct Block {
    std::int64_t number, item, first, count;
    int thread;
  };

  Block block_at(std::int64_t number, int thread) const {
    const std::int64_t own = number % blocks_, first = own * units_ / blocks_ * unit_;
    const std::int64_t end = smaller_of(a_.positions, (own + 1) * units_ / blocks_ * unit_);
    return {number, number / blocks_, first, end - first, thread};
  }

  static std::int64_t whole_groups(std::int64_t depth) { return rounded_up(depth, kGroup<E>); }

  void pack_weight(int s, std::int64_t first, std::int64_t piece) {
    const PointwiseSource& source = a_.source[s];
    const std::int64_t count = smaller_of(piece, a_.channels - first);
    const Part<T> part{static_cast<const T*>(source.weight) + first * source.weight_row,
                       source.weight_row, source.weight_channel};
    pack_panel<E, T>(transposed(part), source.depth, count, maps_ ? piece : panel_width<E>(count),
                     weights_[s] + first * whole_groups(source.depth));
  }

  // ---- positions are rows ----------------------------------------------------------------------

  void compute_rows(const Block& at) {
    Number* results = own_piece(results_, at.thread, thread_bytes_);
    RowFactors factors[3];
    for (int s = 0; s < a_.sources; ++s) factors[s] = position_rows(s, at);
    for (std::int64_t column = 0; column < a_.channels; column += kColumnsOfResults) {
      const std::int64_t columns = smaller_of(kColumnsOfResults, a_.channels - column);
      for (int s = 0; s < a_.sources; ++s) {
        const std::int64_t depth = whole_groups(a_.source[s].depth);
        const std::int64_t at_once = a_.source[s].features.channel == 1 ? at.count : kTallPanel;
        RowFactors rows = factors[s];
        for (std::int64_t row = 0; row < at.count; row += at_once) {
          const std::int64_t count = smaller_of(at_once, at.count - row);
          const auto product = [&](const auto& end) {
            multiply<E>(rows, weights_[s] + column * depth, depth, rounded_up(count, kRowStep),
                        columns, depth, results + row * results_row_, results_row_, s > 0, end);
          };
          if (is_direct_ && s == a_.sources - 1) {
            product(written(at, row, count, column, columns));
          } else {
            product(Kept{});
          }
          rows.data += kTallPanel * depth * static_cast<std::int64_t>(sizeof(E));
        }
      }
      if (is_direct_) continue;
      const Number* shift = static_cast<const Number*>(a_.shift);
      for (std::int64_t r = 0; r < at.count; ++r) {
        write_line(at.item, at.first + r, column, a_.out.channel, a_.base.channel,
                   results + r * results_row_, columns, shift ? shift + column : nullptr, Number{0});
      }
      if (!a_.moments) continue;
      column_moments(results, results_row_, at.count, columns,
                     own_piece(columns_, at.thread, thread_bytes_), moments_of(at, column));
    }
  }

  // The rows of a block, or its first tall panel where channels are apart.
  RowFactors position_rows(int s, const Block& at) {
    const PointwiseSource& source = a_.source[s];
    E* to = own_piece(positions_[s], at.thread, thread_bytes_);
    const Part<T> part = part_of<T>(source.features, at.item, at.first, 0);
    if (part.column == 1) return row_factors<E, T>(part, at.count, source.depth, to);
    for (std::int64_t row = 0; row < at.count; row += kTallPanel) {
      const Part<T> from{part.data + row * part.row, part.column, part.row};
      pack_panel<E, T>(from, source.depth, smaller_of(kTallPanel, at.count - row), kTallPanel,
                       to + row * whole_groups(source.depth));
    }
    return in_tall_panel(to);
  }

  // ---- positions are columns -------------------------------------------------------------------

  void compute_maps(const Block& at) {
    Number* results = own_piece(results_, at.thread, thread_bytes_);
    for (int s = 0; s < a_.sources; ++s) pack_columns(s, at);
    for (std::int64_t row = 0; row < a_.channels; row += kRowsOfResults) {
      const std::int64_t rows = smaller_of(kRowsOfResults, a_.channels - row);
      for (int s = 0; s < a_.sources; ++s) {
        const std::int64_t depth = whole_groups(a_.source[s].depth);
        const E* const columns = own_piece(positions_[s], at.thread, thread_bytes_);
        for (std::int64_t r = 0; r < rows; r += kTallPanel) {
          const std::int64_t count = smaller_of(kTallPanel, rows - r);
          const auto product = [&](const auto& end) {
            multiply<E>(in_tall_panel(weights_[s] + (row + r) * depth), columns, depth,
                        rounded_up(count, kRowStep), at.count, depth, results + r * results_row_,
                        results_row_, s > 0, end);
          };
          if (is_direct_ && s == a_.sources - 1) {
            product(written(at, 0, at.count, row + r, count));
          } else {
            product(Kept{});
          }
        }
      }
      if (is_direct_) continue;
      const Number* shift = static_cast<const Number*>(a_.shift);
      for (std::int64_t r = 0; r < rows; ++r) {
        write_line(at.item, at.first, row + r, a_.out.row, a_.base.row, results + r * results_row_,
                   at.count, nullptr, shift ? shift[row + r] : Number{0});
        if (!a_.moments) continue;
        line_moments(results + r * results_row_, at.count, moments_of(at, row + r));
      }
    }
  }

  void pack_columns(int s, const Block& at) {
    const PointwiseSource& source = a_.source[s];
    E* to = own_piece(positions_[s], at.thread, thread_bytes_);
    for (std::int64_t column = 0; column < at.count; column += kPanel<E>) {
      const std::int64_t columns = smaller_of(kPanel<E>, at.count - column);
      const Part<T> part = part_of<T>(source.features, at.item, at.first + column, 0);
      pack_panel<E, T>(transposed(part), source.depth, columns, panel_width<E>(columns),
                       to + column * whole_groups(source.depth));
    }
  }

  // ---- results ---------------------------------------------------------------------------------

  // Results of so many positions of a block and so many channels, as tiles write them.
  Written<T> written(const Block& at, std::int64_t first, std::int64_t count, std::int64_t channel,
                     std::int64_t channels) const {
    const auto of = [&](const Operand& all) {
      return static_cast<T*>(all.data) + all.item * at.item + all.row * (at.first + first) +
             all.channel * channel;
    };
    const T* base = a_.base.data ? of(a_.base) : nullptr;
    const Number* shift = a_.shift ? static_cast<const Number*>(a_.shift) + channel : nullptr;
    if (maps_) {
      return {of(a_.out), base,  a_.out.channel, a_.base.channel, channels,
              count,      shift, nullptr,        Number{1}};
    }
    return {of(a_.out), base,    a_.out.row, a_.base.row, count,
            channels,   nullptr, shift,      Number{1}};
  }

  // Results that follow each other by the strides of out and base, from a position and channel on.
  // For moments they become what was written, which out itself may not have in the cache yet.
  void write_line(std::int64_t item, std::int64_t position, std::int64_t channel,
                  std::int64_t out_step, std::int64_t base_step, Number* results,
                  std::int64_t count, const Number* shifts, Number shift) {
    T* to = static_cast<T*>(a_.out.data) + item * a_.out.item + position * a_.out.row +
            channel * a_.out.channel;
    const T* base = static_cast<const T*>(a_.base.data);
    if (base) base += item * a_.base.item + position * a_.base.row + channel * a_.base.channel;
    if (out_step == 1 && (!base || base_step == 1)) {
      constexpr int lanes = kLanes<Number>;
      for (std::int64_t i = 0; i < count; i += lanes) {
        const int some = static_cast<int>(smaller_of(lanes, count - i));
        Vector<Number> sum = load(results + i) + splat<Number>(shift);
        if (shifts) sum = sum + load_some(shifts + i, some);
        if (base) sum = sum + load_some(base + i, some);
        store_some(to + i, sum, some);
        if (a_.moments) store(results + i, load_some(to + i, some));
      }
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      Number sum = results[i] + shift;
      if (shifts) sum += shifts[i];
      if (base) sum += widen(base[i * base_step]);
      to[i * out_step] = narrow<T>(sum);
      if (a_.moments) results[i] = widen(to[i * out_step]);
    }
  }

  // ---- moments ---------------------------------------------------------------------------------

  Moments moments_of(const Block& at, std::int64_t channel) const {
    double* const means = moments_ + at.number * 2 * a_.channels + channel;
    return {means, means + a_.channels};
  }

  void combine_blocks(std::int64_t first) const {
    Number* const means = static_cast<Number*>(a_.moments);
    combine_moments(
        moments_, a_.batch * blocks_, a_.channels, first,
        smaller_of(a_.channels, first + kTogether),
        [this](std::int64_t block) { return block_at(block, 0).count; }, means,
        means + a_.channels);
  }

  PointwiseArguments a_;
  bool maps_;
  bool is_direct_;  // tiles write their results: these lie side by side, and nothing is asked of them
  std::int64_t unit_, units_, blocks_, results_row_ = 0, thread_bytes_ = 0;
  E* weights_[3] = {};
  double* moments_ = nullptr;  // of each block
  E* positions_[3] = {};  // from here on each thread's own
  Number *results_ = nullptr, *columns_ = nullptr;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_POINTWISE_PRODUCT_H_
