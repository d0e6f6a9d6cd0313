// Forward: blocks of query rows, each against all keys.
//
//   keys and values are packed once for each batch item (for several items at once where they are
//   small); then each block of rows computes its scores with all keys, turns whole rows into
//   weights, and multiplies them with the values. A thread's scores fit in its second-level cache,
//   or spill into the next: products of 2 (D + V) operations a score hide that.
#ifndef NLK_CPU_ATTENTION_FORWARD_H_
#define NLK_CPU_ATTENTION_FORWARD_H_

#include "cpu/affinity.h"
#include "cpu/attention_plan.h"
#include "cpu/pack.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename T>
class Forward {
  typedef typename FactorOf<T>::Type E;
  typedef Computed<T> Number;

 public:
  explicit Forward(const AttentionProblem& problem) : p_(problem) {
    depth_ = rounded_up(p_.depth, kGroup<E>);
    key_columns_ = padded_columns<E>(p_.keys);
    score_row_ = packed_stride<Number>(key_columns_);
    key_depth_ = rounded_up(p_.keys, kGroup<E>);
    value_columns_ = padded_columns<E>(p_.value_depth);
    item_bytes_ = (key_columns_ * depth_ + value_columns_ * key_depth_) * std::int64_t{sizeof(E)};
    items_ = items_at_a_time(p_, item_bytes_);
    const std::int64_t row_bytes = score_row_ * sizeof(Number);
    const std::int64_t most = smaller_of(kMostRows, kScoreBytes / row_bytes);
    const std::int64_t free = (p_.workspace_limit - items_ * item_bytes_) / p_.threads;
    const std::int64_t all_bytes = row_bytes + packed_stride<E>(p_.depth) * sizeof(E) +
                                   value_columns_ * sizeof(Number);
    const std::int64_t least = least_rows(row_bytes, item_bytes_, p_.threads);
    rows_ = rows_of_block(p_.queries, larger_of(least, smaller_of(most, free / all_bytes)),
                          blocks_of(kBlocksOfThread * p_.threads, items_));
    blocks_ = blocks_of(p_.queries, rows_);
  }

  // Where what lies; returns the bytes of it all.
  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    key_panels_ = pieces.take<E>(items_ * key_columns_ * depth_);
    value_panels_ = pieces.take<E>(items_ * value_columns_ * key_depth_);
    const std::int64_t shared = pieces.bytes();
    query_ = pieces.take<E>(rows_ * packed_stride<E>(p_.depth));
    scores_ = pieces.take<Number>(rows_ * score_row_);
    results_ = pieces.take<Number>(rows_ * value_columns_);
    thread_bytes_ = pieces.bytes() - shared;
    return shared + p_.threads * thread_bytes_;
  }

  bool run(const AttentionForward& call) {
    lay_out(call.workspace);
    for (std::int64_t first = 0; first < p_.batch; first += items_) {
      const std::int64_t items = smaller_of(items_, p_.batch - first);
      const std::int64_t key_panels = blocks_of(p_.keys, kPanel<E>);
      const std::int64_t value_panels = blocks_of(p_.value_depth, kPanel<E>);
      auto pack = [&](std::int64_t task, int) {
        const std::int64_t item = task / (key_panels + value_panels);
        const std::int64_t panel = task % (key_panels + value_panels);
        if (panel < key_panels) {
          pack_keys(call.key, first + item, item, panel * kPanel<E>);
        } else {
          pack_values(call.value, first + item, item, (panel - key_panels) * kPanel<E>);
        }
      };
      if (!parallel(p_.threads, items * (key_panels + value_panels), pack)) return false;
      auto block = [&](std::int64_t task, int thread) {
        const std::int64_t row = task % blocks_ * rows_;
        attend(call, first + task / blocks_, task / blocks_, row, thread);
      };
      if (!parallel(p_.threads, items * blocks_, block)) return false;
    }
    return true;
  }

 private:
  void pack_keys(const Operand& key, std::int64_t item, std::int64_t slot, std::int64_t first) {
    const Part<T> part = transposed(part_of<T>(key, item, first, 0));
    E* to = key_panels_ + (slot * key_columns_ + first) * depth_;
    const std::int64_t columns = smaller_of(kPanel<E>, p_.keys - first);
    pack_panel<E, T>(part, p_.depth, columns, panel_width<E>(columns), to);
  }

  void pack_values(const Operand& value, std::int64_t item, std::int64_t slot,
                   std::int64_t first) {
    const Part<T> part = part_of<T>(value, item, 0, first);
    E* to = value_panels_ + (slot * value_columns_ + first) * key_depth_;
    const std::int64_t columns = smaller_of(kPanel<E>, p_.value_depth - first);
    pack_panel<E, T>(part, p_.keys, columns, panel_width<E>(columns), to);
  }

  void attend(const AttentionForward& call, std::int64_t item, std::int64_t slot,
              std::int64_t first, int thread) {
    E* query = own_piece(query_, thread, thread_bytes_);
    Number* scores = own_piece(scores_, thread, thread_bytes_);
    Number* results = own_piece(results_, thread, thread_bytes_);
    const std::int64_t rows = smaller_of(rows_, p_.queries - first);
    const std::int64_t padded = rounded_up(rows, kRowStep);
    const Part<T> part = part_of<T>(call.query, item, first, 0);
    multiply<E>(row_factors<E, T>(part, rows, p_.depth, query),
                key_panels_ + slot * key_columns_ * depth_, depth_, padded, p_.keys, depth_, scores,
                score_row_, false);
    // Weights take the place of their scores; narrower ones leave the rest of a row unused.
    E* weights = reinterpret_cast<E*>(scores);
    const std::int64_t stride = score_row_ * std::int64_t{sizeof(Number) / sizeof(E)};
    const RowShape<Number> shape(p_.keys);
    for (std::int64_t r = 0; r < padded; ++r) {
      const auto statistics = weigh(scores + r * score_row_, weights + r * stride, shape);
      if (r >= rows || p_.affinity != Affinity::kSoftmax) continue;
      Number* stats = static_cast<Number*>(call.stats) + item * p_.queries + first + r;
      stats[0] = statistics.extreme;
      stats[call.stats_plane] = statistics.total;
    }
    multiply<E>(in_rows(weights, stride), value_panels_ + slot * value_columns_ * key_depth_,
                key_depth_, padded, p_.value_depth, key_depth_, results, value_columns_, false);
    T* out = static_cast<T*>(call.out.data) + item * call.out.item + first * call.out.row;
    if (p_.affinity == Affinity::kSoftmax) {
      const Number* totals = static_cast<const Number*>(call.stats) + call.stats_plane +
                             item * p_.queries + first;
      for (std::int64_t r = 0; r < rows; ++r) divide(results + r * value_columns_, totals[r]);
    }
    write<T>(results, value_columns_, 1, out, call.out.row, call.out.channel, rows,
             p_.value_depth, Number{1});
  }

  RowStatistics<Number> weigh(const Number* scores, E* weights, const RowShape<Number>& shape) {
    auto keep = [&](std::int64_t k, Vector<Number> numbers) { store(weights + k, numbers); };
    if (p_.affinity == Affinity::kSoftmax) return exponentials(scores, shape, p_.scale, keep);
    const Number factor = static_cast<Number>(p_.scale / static_cast<double>(p_.keys));
    scaled(scores, shape, factor, p_.affinity == Affinity::kRelu, keep);
    return {};
  }

  void divide(Number* row, Number divisor) {
    for (std::int64_t c = 0; c < value_columns_; c += kLanes<Number>) {
      store(row + c, load(row + c) / splat<Number>(divisor));
    }
  }

  AttentionProblem p_;
  std::int64_t depth_, key_columns_, score_row_, key_depth_, value_columns_;
  std::int64_t item_bytes_, items_, rows_, blocks_, thread_bytes_ = 0;
  E *key_panels_ = nullptr, *value_panels_ = nullptr, *query_ = nullptr;
  Number *scores_ = nullptr, *results_ = nullptr;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_ATTENTION_FORWARD_H_
