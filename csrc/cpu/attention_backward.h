// Backward: superblocks of query rows, each in two phases.
//
//   1. Blocks of rows, against all keys:  P, dP = dO V^T,  dS,  dQ = dS K.  P and dS stay in the
//      workspace as factors, beside dO and Q of the superblock.
//   2. Panels of keys, over all rows of the superblock:  dV += P^T dO,  dK += dS^T Q.
//
// Every number is summed by one task, in the order of the rows: threads change nothing. The softmax
// takes nothing from the forward: with P and the row sums of P dP computed here, their rounding
// cancels in dS = P (dP - sum P dP).
#ifndef NLK_CPU_ATTENTION_BACKWARD_H_
#define NLK_CPU_ATTENTION_BACKWARD_H_

#include "cpu/affinity.h"
#include "cpu/attention_plan.h"
#include "cpu/pack.h"

namespace nlk {
namespace NLK_ISA {
namespace {

template <typename T>
class Backward {
  typedef typename FactorOf<T>::Type E;
  typedef Computed<T> Number;
  static constexpr std::int64_t kFactorBytes = 8 << 20;  // of P and dS of a superblock

 public:
  explicit Backward(const AttentionProblem& problem) : p_(problem) {
    depth_ = rounded_up(p_.depth, kGroup<E>);
    value_depth_ = rounded_up(p_.value_depth, kGroup<E>);
    key_depth_ = rounded_up(p_.keys, kGroup<E>);
    key_columns_ = padded_columns<E>(p_.keys);
    score_row_ = packed_stride<Number>(key_columns_);
    depth_columns_ = padded_columns<E>(p_.depth);
    value_columns_ = padded_columns<E>(p_.value_depth);
    key_rows_ = rounded_up(p_.keys, kTallPanel);
    const std::int64_t factor = sizeof(E), number = sizeof(Number);
    const std::int64_t packed = key_columns_ * (depth_ + value_depth_) + depth_columns_ * key_depth_;
    const std::int64_t sums = key_rows_ * (depth_columns_ + value_columns_);
    const std::int64_t score_bytes = score_row_ * 2 * number;
    const std::int64_t most = larger_of(least_rows(score_bytes, packed * factor, p_.threads),
                                        smaller_of(kMostRows, kScoreBytes / score_bytes));
    const std::int64_t row_bytes = (2 * key_rows_ + depth_columns_ + value_columns_) * factor;
    const std::int64_t least = smaller_of(rounded_up(larger_of(most, 1), kDepth<E>),
                                          rounded_up(p_.queries, kTileRows));
    const std::int64_t item_bytes = packed * factor + sums * number;
    items_ = items_at_a_time(p_, item_bytes + row_bytes * least);

    rows_ = rows_of_block(p_.queries, most,
                          blocks_of(kBlocksOfThread * p_.threads, items_));
    const std::int64_t limit = larger_of(0, p_.workspace_limit - items_ * item_bytes);
    const std::int64_t blocks = smaller_of(kFactorBytes, limit) / (row_bytes * items_ * rows_);
    // Whole parts of the second phase's depth: sums then do not depend on where superblocks end.
    superblock_ = rounded_up(larger_of(blocks, blocks_of(p_.threads, items_)) * rows_,
                             kDepth<E>);
    const std::int64_t even = blocks_of(p_.queries, blocks_of(p_.queries, superblock_));
    superblock_ = smaller_of(rounded_up(even, kDepth<E>), rounded_up(p_.queries, rows_));
  }

  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    key_panels_ = pieces.take<E>(items_ * key_columns_ * depth_);
    value_panels_ = pieces.take<E>(items_ * key_columns_ * value_depth_);
    key_factors_ = pieces.take<E>(items_ * depth_columns_ * key_depth_);
    weights_ = pieces.take<E>(items_ * key_rows_ * superblock_);
    d_scores_ = pieces.take<E>(items_ * key_rows_ * superblock_);
    grad_panels_ = pieces.take<E>(items_ * value_columns_ * superblock_);
    query_panels_ = pieces.take<E>(items_ * depth_columns_ * superblock_);
    d_value_sums_ = pieces.take<Number>(items_ * key_rows_ * value_columns_);
    d_key_sums_ = pieces.take<Number>(items_ * key_rows_ * depth_columns_);
    const std::int64_t shared = pieces.bytes();
    query_ = pieces.take<E>(rows_ * packed_stride<E>(p_.depth));
    grad_ = pieces.take<E>(rows_ * packed_stride<E>(p_.value_depth));
    scores_ = pieces.take<Number>(rows_ * score_row_);
    d_weights_ = pieces.take<Number>(rows_ * score_row_);
    d_query_ = pieces.take<Number>(rows_ * depth_columns_);
    thread_bytes_ = pieces.bytes() - shared;
    return shared + p_.threads * thread_bytes_;
  }

  bool run(const AttentionBackward& call) {
    lay_out(call.workspace);
    for (std::int64_t first = 0; first < p_.batch; first += items_) {
      const std::int64_t items = smaller_of(items_, p_.batch - first);
      if (!pack(call, first, items)) return false;
      for (std::int64_t row = 0; row < p_.queries; row += superblock_) {
        const std::int64_t rows = smaller_of(superblock_, p_.queries - row);
        if (!over_rows(call, first, items, row, rows)) return false;
        if (!over_keys(items, row, rows)) return false;
      }
      if (!write_sums(call, first, items)) return false;
    }
    return true;
  }

 private:
  static constexpr std::int64_t kPanelColumns = kPanel<E>;
  bool pack(const AttentionBackward& call, std::int64_t first, std::int64_t items) {
    const std::int64_t keys = blocks_of(p_.keys, kPanelColumns);
    const std::int64_t channels = blocks_of(p_.depth, kPanelColumns);
    const std::int64_t tasks = 2 * keys + channels;
    auto body = [&](std::int64_t task, int) {
      const std::int64_t slot = task / tasks, item = first + slot;
      const std::int64_t panel = task % tasks;
      if (panel >= 2 * keys) {
        const std::int64_t channel = (panel - 2 * keys) * kPanelColumns;
        const std::int64_t columns = smaller_of(kPanelColumns, p_.depth - channel);
        pack_panel<E, T>(part_of<T>(call.key, item, 0, channel), p_.keys, columns,
                         panel_width<E>(columns),
                         key_factors_ + (slot * depth_columns_ + channel) * key_depth_);
        return;
      }
      const std::int64_t key = panel % keys * kPanelColumns;
      const std::int64_t columns = smaller_of(kPanelColumns, p_.keys - key);
      const std::int64_t at = slot * key_columns_ + key;
      const bool of_keys = panel < keys;
      pack_panel<E, T>(transposed(part_of<T>(of_keys ? call.key : call.value, item, key, 0)),
                       of_keys ? p_.depth : p_.value_depth, columns, panel_width<E>(columns),
                       of_keys ? key_panels_ + at * depth_ : value_panels_ + at * value_depth_);
    };
    return parallel(p_.threads, items * tasks, body);
  }

  bool over_rows(const AttentionBackward& call, std::int64_t first, std::int64_t items,
                 std::int64_t row, std::int64_t rows) {
    const std::int64_t size = even_rows(rows, rows_, items, p_.threads, kGroup<E>);
    const std::int64_t blocks = blocks_of(rows, size);
    auto body = [&](std::int64_t task, int thread) {
      const std::int64_t slot = task / blocks, start = task % blocks * size;
      differentiate(call, first + slot, slot, row + start, start,
                    smaller_of(size, rows - start), thread);
    };
    return parallel(p_.threads, items * blocks, body);
  }

  // Rows [row, row + rows) of a batch item, which begin at `start` in the superblock.
  void differentiate(const AttentionBackward& call, std::int64_t item, std::int64_t slot,
                     std::int64_t row, std::int64_t start, std::int64_t rows, int thread) {
    E* query = own_piece(query_, thread, thread_bytes_);
    E* grad = own_piece(grad_, thread, thread_bytes_);
    Number* scores = own_piece(scores_, thread, thread_bytes_);
    Number* d_weights = own_piece(d_weights_, thread, thread_bytes_);
    Number* d_query = own_piece(d_query_, thread, thread_bytes_);
    const std::int64_t padded = rounded_up(rows, kRowStep);
    const Part<T> queries = part_of<T>(call.query, item, row, 0);
    const Part<T> grads = part_of<T>(call.grad, item, row, 0);
    pack_channels(queries, rows, p_.depth, query_panels_ + slot * depth_columns_ * superblock_,
                  start);
    pack_channels(grads, rows, p_.value_depth, grad_panels_ + slot * value_columns_ * superblock_,
                  start);
    multiply<E>(row_factors<E, T>(queries, rows, p_.depth, query),
                key_panels_ + slot * key_columns_ * depth_, depth_, padded, p_.keys, depth_, scores,
                score_row_, false);
    multiply<E>(row_factors<E, T>(grads, rows, p_.value_depth, grad),
                value_panels_ + slot * key_columns_ * value_depth_,
                value_depth_, padded, p_.keys, value_depth_, d_weights, score_row_, false);
    const RowShape<Number> shape(p_.keys);
    for (std::int64_t r = 0; r < padded; ++r) {
      differentiate_row(scores + r * score_row_, d_weights + r * score_row_, shape);
    }
    const std::int64_t at = slot * key_rows_ * superblock_;
    to_panels(scores, rows, start, weights_ + at);
    to_panels(d_weights, rows, start, d_scores_ + at);
    // The gradient's rows as factors, in place.
    E* d_scores = reinterpret_cast<E*>(d_weights);
    const std::int64_t stride = score_row_ * std::int64_t{sizeof(Number) / sizeof(E)};
    if (sizeof(E) != sizeof(Number)) {
      for (std::int64_t r = 0; r < padded; ++r) {
        for (std::int64_t k = 0; k < key_columns_; k += kLanes<Number>) {
          store(d_scores + r * stride + k, load(d_weights + r * score_row_ + k));
        }
      }
    }
    multiply<E>(in_rows(d_scores, stride), key_factors_ + slot * depth_columns_ * key_depth_,
                key_depth_, padded, p_.depth, key_depth_, d_query, depth_columns_, false);
    T* to = static_cast<T*>(call.d_query.data) + item * call.d_query.item + row * call.d_query.row;
    write<T>(d_query, depth_columns_, 1, to, call.d_query.row, call.d_query.channel, rows,
             p_.depth, d_product());
  }

  // Channels of rows that begin at `start` in the superblock, as panels of factors B. A few rows at
  // a time: each is read from end to end.
  void pack_channels(Part<T> from, std::int64_t rows, std::int64_t channels, E* to,
                     std::int64_t start) {
    constexpr std::int64_t kRows = 8;
    for (std::int64_t r = 0; r < rows; r += kRows) {
      for (std::int64_t c = 0; c < channels; c += kPanelColumns) {
        const std::int64_t columns = smaller_of(kPanelColumns, channels - c);
        const std::int64_t width = panel_width<E>(columns);
        const T* data = from.data + r * from.row + c * from.column;
        pack_panel<E, T>({data, from.row, from.column}, smaller_of(kRows, rows - r), columns, width,
                         to + c * superblock_ + (start + r) * width);
      }
    }
  }

  // What remains to be multiplied with dS K and dS^T Q.
  Number d_product() const {
    return p_.affinity == Affinity::kSoftmax ? static_cast<Number>(p_.scale) : Number{1};
  }

  // Scores become weights, the weights' gradients those of the scores.
  void differentiate_row(Number* scores, Number* gradients, const RowShape<Number>& shape) {
    constexpr int lanes = kLanes<Number>;
    auto keep = [&](std::int64_t k, Vector<Number> numbers) { store(scores + k, numbers); };
    if (p_.affinity == Affinity::kSoftmax) {
      const auto statistics = exponentials<Number>(scores, shape, p_.scale, keep);
      const Vector<Number> inverse = splat<Number>(Number{1} / statistics.total);
      LaneSum<Number> sum;
      for (std::int64_t k = 0; k < key_columns_; k += lanes) {
        const Vector<Number> weights = load(scores + k) * inverse;
        store(scores + k, weights);
        sum.add(weights * load(gradients + k));
      }
      const Vector<Number> delta = splat<Number>(sum.total());
      for (std::int64_t k = 0; k < key_columns_; k += lanes) {
        const Vector<Number> gradient = load(scores + k) * (load(gradients + k) - delta);
        store(gradients + k, inside(shape, k, gradient));
      }
      return;
    }
    const Number factor = static_cast<Number>(p_.scale / static_cast<double>(p_.keys));
    const bool rectify = p_.affinity == Affinity::kRelu;
    scaled(scores, shape, factor, rectify, keep);
    for (std::int64_t k = 0; k < key_columns_; k += lanes) {
      const Vector<Number> gradient = load(gradients + k) * splat<Number>(factor);
      const bool all = !rectify;
      const Vector<Number> kept =
          all ? gradient : load(scores + k) <= Vector<Number>{} ? Vector<Number>{} : gradient;
      store(gradients + k, inside(shape, k, kept));
    }
  }

  // Keys as tall panels of factors A, from depth `start` of the superblock on.
  void to_panels(const Number* rows, std::int64_t count, std::int64_t start, E* panels) {
    constexpr int lanes = kLanes<Number>;
    for (std::int64_t first = 0; first < key_columns_; first += kTallPanel) {
      const std::int64_t end = smaller_of(first + kTallPanel, key_columns_);
      E* to = panels + first * superblock_ + start * kTallPanel;
      for (std::int64_t r = 0; r < count; r += kGroup<E>, to += kGroup<E> * kTallPanel) {
        const Number* row = rows + r * score_row_;
        for (std::int64_t k = first; k < end; k += lanes) {
          E* at = to + (k - first) * kGroup<E>;
          if constexpr (kGroup<E> == 2) {
            const Vector<Number> next =
                r + 1 < count ? load(row + score_row_ + k) : Vector<Number>{};
            store_pairs(at, narrow_bits(load(row + k)), narrow_bits(next));
          } else {
            store(at, load(row + k));
          }
        }
      }
    }
  }

  bool over_keys(std::int64_t items, std::int64_t row, std::int64_t rows) {
    const std::int64_t keys = tall_panels(), depth = rounded_up(rows, kGroup<E>);
    auto body = [&](std::int64_t task, int) {
      const std::int64_t slot = task / (2 * keys), panel = task % (2 * keys);
      const bool of_values = panel < keys;
      const std::int64_t key = slot * key_rows_ + panel % keys * kTallPanel;
      const std::int64_t channels = of_values ? p_.value_depth : p_.depth;
      const std::int64_t columns = of_values ? value_columns_ : depth_columns_;
      multiply<E>(in_tall_panel((of_values ? weights_ : d_scores_) + key * superblock_),
                  (of_values ? grad_panels_ : query_panels_) + slot * columns * superblock_,
                  superblock_, rounded_up(keys_of(panel % keys), kRowStep), channels, depth,
                  (of_values ? d_value_sums_ : d_key_sums_) + key * columns, columns, row > 0);
    };
    return parallel(p_.threads, items * 2 * keys, body);
  }

  bool write_sums(const AttentionBackward& call, std::int64_t first, std::int64_t items) {
    const std::int64_t keys = tall_panels();
    auto body = [&](std::int64_t task, int) {
      const std::int64_t slot = task / keys, panel = task % keys, key = panel * kTallPanel;
      const auto to = [&](const Operand& operand) {
        return static_cast<T*>(operand.data) + (first + slot) * operand.item + key * operand.row;
      };
      const std::int64_t at = slot * key_rows_ + key;
      write<T>(d_value_sums_ + at * value_columns_, value_columns_, 1, to(call.d_value),
               call.d_value.row, call.d_value.channel, keys_of(panel), p_.value_depth, Number{1});
      write<T>(d_key_sums_ + at * depth_columns_, depth_columns_, 1, to(call.d_key),
               call.d_key.row, call.d_key.channel, keys_of(panel), p_.depth, d_product());
    };
    return parallel(p_.threads, items * keys, body);
  }

  std::int64_t tall_panels() const { return blocks_of(p_.keys, kTallPanel); }
  std::int64_t keys_of(std::int64_t panel) const {
    return smaller_of(kTallPanel, p_.keys - panel * kTallPanel);
  }

  AttentionProblem p_;
  std::int64_t depth_, value_depth_, key_depth_;            // padded to groups,
  std::int64_t key_columns_, depth_columns_, value_columns_;  // to panels,
  std::int64_t key_rows_;                                     // to tall panels
  std::int64_t score_row_;  // stride of a row of scores
  std::int64_t items_, rows_, superblock_, thread_bytes_ = 0;
  E *key_panels_ = nullptr, *value_panels_ = nullptr, *key_factors_ = nullptr;
  E *weights_ = nullptr, *d_scores_ = nullptr;          // factors A of the superblock
  E *grad_panels_ = nullptr, *query_panels_ = nullptr;  // factors B of the superblock
  Number *d_value_sums_ = nullptr, *d_key_sums_ = nullptr;
  E *query_ = nullptr, *grad_ = nullptr;  // from here on each thread's own
  Number *scores_ = nullptr, *d_weights_ = nullptr, *d_query_ = nullptr;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_ATTENTION_BACKWARD_H_
