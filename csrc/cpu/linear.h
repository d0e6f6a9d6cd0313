// Dot-product attention in the order that never forms scores.
//
//   state = K^T V (D x V);  out = Q state;  dQ = dO state^T
//   dstate = Q^T dO;        dK = V dstate^T;  dV = K dstate        all times scale / M
//
// A state is summed over chunks of positions that are packed together. States are kept in the type
// that sums have, and become factors of the second product, rounded as its other factor is. The first
// one is handed over to a backward that begins with it.
#ifndef NLK_CPU_LINEAR_H_
#define NLK_CPU_LINEAR_H_

#include "cpu/attention_plan.h"
#include "cpu/pack.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename T>
class Linear {
  typedef typename FactorOf<T>::Type E;
  typedef Computed<T> Number;
  static constexpr std::int64_t kChunkBytes = 512 << 10;  // of packed positions
  static constexpr std::int64_t kRows = 96;

 public:
  Linear(const AttentionProblem& problem, bool backward) : p_(problem), backward_(backward) {
    depth_ = rounded_up(p_.depth, kTallPanel);
    value_depth_ = rounded_up(p_.value_depth, kTallPanel);
    const std::int64_t row_bytes = (depth_ + value_depth_) * std::int64_t{sizeof(E)};
    const std::int64_t states = depth_ * value_depth_ * std::int64_t{sizeof(E) + sizeof(Number)};
    const std::int64_t most = larger_of(p_.queries, p_.keys);
    const std::int64_t chunk = larger_of(kDepth<E>, kChunkBytes / row_bytes);
    chunk_ = rounded_up(smaller_of(most, chunk), kGroup<E>);
    items_ = items_at_a_time(p_, states + row_bytes * chunk_);
    rows_ = rows_of_block(most, kRows, blocks_of(kBlocksOfThread * p_.threads, items_));
  }

  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    const std::int64_t area = items_ * depth_ * value_depth_;
    tall_ = pieces.take<E>(items_ * larger_of(depth_, value_depth_) * chunk_);
    wide_ = pieces.take<E>(items_ * larger_of(depth_, value_depth_) * chunk_);
    sums_ = pieces.take<Number>(area);
    state_ = pieces.take<E>(area);
    if (backward_) other_state_ = pieces.take<E>(area);
    const std::int64_t shared = pieces.bytes();
    const std::int64_t widest = larger_of(depth_, value_depth_);
    // Strides do not grow with depths everywhere: either may be the wider.
    factors_ = pieces.take<E>(rows_ * larger_of(packed_stride<E>(p_.depth),
                                                packed_stride<E>(p_.value_depth)));
    results_ = pieces.take<Number>(rows_ * widest);
    thread_bytes_ = pieces.bytes() - shared;
    return shared + p_.threads * thread_bytes_;
  }

  bool run(const AttentionForward& call) {
    lay_out(call.workspace);
    for (first_ = 0; first_ < p_.batch; first_ += items_) {
      count_ = smaller_of(items_, p_.batch - first_);
      const bool done = sum(call.key, p_.depth, call.value, p_.value_depth, p_.keys) &&
                        hand_over(static_cast<Number*>(call.state)) &&
                        pack_state(own_sums(), state_, p_.value_depth, p_.depth, false) &&
                        apply(call.query, p_.depth, state_, call.out, p_.value_depth, p_.queries);
      if (!done) return false;
    }
    return true;
  }

  bool run(const AttentionBackward& call) {
    lay_out(call.workspace);
    const std::int64_t depth = p_.depth, value_depth = p_.value_depth;
    for (first_ = 0; first_ < p_.batch; first_ += items_) {
      count_ = smaller_of(items_, p_.batch - first_);
      const auto* known = static_cast<const Number*>(call.state);
      const bool done =
          (known || sum(call.key, depth, call.value, value_depth, p_.keys)) &&
          pack_state(known ? handed_over(known) : own_sums(), state_, depth, value_depth, true) &&
          apply(call.grad, value_depth, state_, call.d_query, depth, p_.queries) &&
          sum(call.query, depth, call.grad, value_depth, p_.queries) &&
          pack_state(own_sums(), state_, depth, value_depth, true) &&
          pack_state(own_sums(), other_state_, value_depth, depth, false) &&
          apply(call.value, value_depth, state_, call.d_key, depth, p_.keys) &&
          apply(call.key, depth, other_state_, call.d_value, value_depth, p_.keys);
      if (!done) return false;
    }
    return true;
  }

 private:
  std::int64_t area() const { return depth_ * value_depth_; }

  // sums (D,V) = X^T Y for operands of so many positions, of every item.
  bool sum(const Operand& x, std::int64_t x_channels, const Operand& y, std::int64_t y_channels,
           std::int64_t positions) {
    const std::int64_t tall = blocks_of(x_channels, kTallPanel);
    const std::int64_t wide = blocks_of(y_channels, kPanel<E>);
    for (std::int64_t from = 0; from < positions; from += chunk_) {
      const std::int64_t count = smaller_of(chunk_, positions - from);
      const std::int64_t depth = rounded_up(count, kGroup<E>);
      auto pack = [&](std::int64_t task, int) {
        const std::int64_t slot = task / (tall + wide), panel = task % (tall + wide);
        if (panel < tall) {
          const std::int64_t channel = panel * kTallPanel;
          pack_panel<E, T>(part_of<T>(x, first_ + slot, from, channel), count,
                           smaller_of(kTallPanel, x_channels - channel), kTallPanel,
                           tall_ + (slot * depth_ + channel) * chunk_);
        } else {
          const std::int64_t channel = (panel - tall) * kPanel<E>;
          const std::int64_t columns = smaller_of(kPanel<E>, y_channels - channel);
          pack_panel<E, T>(part_of<T>(y, first_ + slot, from, channel), count, columns,
                           panel_width<E>(columns), wide_ + (slot * value_depth_ + channel) * chunk_);
        }
      };
      if (!parallel(p_.threads, count_ * (tall + wide), pack)) return false;
      auto product = [&](std::int64_t task, int) {
        const std::int64_t slot = task / (tall * wide), tile = task % (tall * wide);
        const std::int64_t row = tile / wide * kTallPanel, column = tile % wide * kPanel<E>;
        multiply<E>(in_tall_panel(tall_ + (slot * depth_ + row) * chunk_),
                    wide_ + (slot * value_depth_ + column) * chunk_, chunk_,
                    smaller_of(kTallPanel, rounded_up(x_channels - row, kRowStep)),
                    smaller_of(kPanel<E>, y_channels - column), depth,
                    sums_ + slot * area() + row * value_depth_ + column, value_depth_, from > 0);
      };
      if (!parallel(p_.threads, count_ * tall * wide, product)) return false;
    }
    return true;
  }

  // Where the sums (D,V) of the items at hand lie, and their strides.
  struct Sums {
    const Number* data;
    std::int64_t item, row;
  };
  Sums own_sums() const { return {sums_, area(), value_depth_}; }
  Sums handed_over(const Number* state) const {
    return {state + first_ * p_.depth * p_.value_depth, p_.depth * p_.value_depth, p_.value_depth};
  }

  // The sums to a dense (B,D,V), where there is one.
  bool hand_over(Number* state) {
    if (!state) return true;
    const std::int64_t blocks = blocks_of(p_.depth, kTallPanel);
    auto body = [&](std::int64_t task, int) {
      const std::int64_t slot = task / blocks, row = task % blocks * kTallPanel;
      write<Number>(sums_ + slot * area() + row * value_depth_, value_depth_, 1,
                    state + ((first_ + slot) * p_.depth + row) * p_.value_depth, p_.value_depth, 1,
                    smaller_of(kTallPanel, p_.depth - row), p_.value_depth, Number{1});
    };
    return parallel(p_.threads, count_ * blocks, body);
  }

  // Sums, or their transposes, as factors B of so many columns.
  bool pack_state(Sums sums, E* state, std::int64_t columns, std::int64_t depth, bool transpose) {
    const std::int64_t panels = blocks_of(columns, kPanel<E>);
    auto body = [&](std::int64_t task, int) {
      const std::int64_t slot = task / panels, column = task % panels * kPanel<E>;
      const std::int64_t width = smaller_of(kPanel<E>, columns - column);
      const std::int64_t row = transpose ? 1 : sums.row, step = transpose ? sums.row : 1;
      pack_panel<E, Number>({sums.data + slot * sums.item + column * step, row, step}, depth, width,
                            panel_width<E>(width),
                            state + slot * area() + column * factor_depth(depth));
    };
    return parallel(p_.threads, count_ * panels, body);
  }

  static std::int64_t factor_depth(std::int64_t channels) { return rounded_up(channels, kGroup<E>); }

  // Rows into the caches, all at once: the first panel would wait for one after another.
  static void fetch(Part<T> part, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t line = kLineBytes / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; c += line) {
        __builtin_prefetch(part.data + r * part.row + c);
      }
    }
  }

  // out = scale / M rows state.
  bool apply(const Operand& rows, std::int64_t depth, const E* state, const Operand& out,
             std::int64_t columns, std::int64_t positions) {
    const std::int64_t padded_depth = factor_depth(depth), stride = padded_columns<E>(columns);
    const Number factor = static_cast<Number>(p_.scale / static_cast<double>(p_.keys));
    const std::int64_t tasks = blocks_of(positions, rows_);
    auto body = [&](std::int64_t task, int thread) {
      const std::int64_t slot = task / tasks, row = task % tasks * rows_;
      const std::int64_t count = smaller_of(rows_, positions - row);
      const std::int64_t padded = rounded_up(count, kRowStep);
      E* factors = own_piece(factors_, thread, thread_bytes_);
      Number* results = own_piece(results_, thread, thread_bytes_);
      const Part<T> part = part_of<T>(rows, first_ + slot, row, 0);
      if (part.column == 1) fetch(part, count, depth);
      T* to = static_cast<T*>(out.data) + (first_ + slot) * out.item + row * out.row;
      const auto product = [&](const auto& end) {
        multiply<E>(row_factors<E, T>(part, count, depth, factors), state + slot * area(),
                    padded_depth, padded, columns, padded_depth, results, stride, false, end);
      };
      if (out.channel == 1 && depth > 0) {
        product(Written<T>{to, nullptr, out.row, 0, count, columns, nullptr, nullptr, factor});
      } else {
        product(Kept{});
        write<T>(results, stride, 1, to, out.row, out.channel, count, columns, factor);
      }
    };
    return parallel(p_.threads, count_ * tasks, body);
  }

  AttentionProblem p_;
  bool backward_;
  std::int64_t depth_, value_depth_;  // whole panels
  std::int64_t items_, chunk_, rows_, first_ = 0, count_ = 0, thread_bytes_ = 0;
  E *tall_ = nullptr, *wide_ = nullptr, *state_ = nullptr, *other_state_ = nullptr;
  Number* sums_ = nullptr;
  E* factors_ = nullptr;  // from here on each thread's own
  Number* results_ = nullptr;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_LINEAR_H_
