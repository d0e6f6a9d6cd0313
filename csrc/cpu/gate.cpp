// Context pooling; see include/nlk/gate.h. With the largest logit so far subtracted, in a unit that
// keeps the sum of all shares below 1,
//
//   forward   l_p = weight . x_p;  a_p = exp(l_p - top);  context = sum a_p x_p / sum a_p
//   backward  u_p = grad . x_p - grad . context;  e = sum a_p u_p / sum a_p, zero but for rounding;
//             d_weight = sum a_p u_p x_p / sum a_p - e context;
//             d_x_p = a_p / sum a_p (grad + (u_p - e) weight)
//
// x is read from memory once: a tile of positions for l and u, and from the cache again for the sums.
// A task reads a split, several tiles; splits are added in their order. d_x is written without x.
#include "nlk/gate.h"

#include "cpu/gate_plan.h"
#include "cpu/gate_read.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Positions that one task writes: a page of float32 in each channel.
constexpr std::int64_t kWritten = 1024;

template <typename T>
class Pool {
 public:
  typedef Summed<T> Number;
  static constexpr int kLength = kLanes<Number>;

  Pool(const GateArguments& arguments, bool backward)
      : a_(arguments),
        backward_(backward),
        plan_(gate_plan(arguments, backward)),
        memory_(static_cast<char*>(arguments.workspace)) {}

  bool forward() {
    return run<&Pool::read>(a_.batch * plan_.splits) && run<&Pool::combine>(a_.batch);
  }

  bool backward() {
    written_per_item_ = (plan_.positions + kWritten - 1) / kWritten;
    return run<&Pool::read>(a_.batch * plan_.splits) && run<&Pool::combine>(a_.batch) &&
           run<&Pool::write>(a_.batch * written_per_item_ + 1);
  }

 private:
  template <void (Pool::*kRun)(std::int64_t, int)>
  bool run(std::int64_t tasks) {
    return parallel_for(
        a_.threads, tasks,
        [](void* pool, std::int64_t task, int thread) {
          (static_cast<Pool*>(pool)->*kRun)(task, thread);
        },
        this);
  }

  // ---- memory ----------------------------------------------------------------------------------

  template <typename U>
  U* at(std::int64_t offset) const {
    return reinterpret_cast<U*>(memory_ + offset);
  }
  template <typename U>
  U* scratch(int thread, std::int64_t offset) const {
    return at<U>(plan_.scratch + thread * plan_.scratch_bytes + offset);
  }
  const T* x(std::int64_t item) const {
    return static_cast<const T*>(a_.x) + item * a_.x_strides[0];
  }
  Number weight(std::int64_t channel) const {
    return widen(static_cast<const T*>(a_.weight)[channel * a_.weight_stride]);
  }
  Number grad(std::int64_t item, std::int64_t channel) const {
    const T* const rows = static_cast<const T*>(a_.grad);
    return widen(rows[item * a_.grad_strides[0] + channel * a_.grad_strides[1]]);
  }
  Number context(std::int64_t item, std::int64_t channel) const {
    const T* const rows = static_cast<const T*>(a_.context);
    return widen(rows[item * a_.context_strides[0] + channel * a_.context_strides[1]]);
  }
  Number* logits(std::int64_t item) const {
    return at<Number>(plan_.scores) + 2 * item * plan_.positions;
  }
  Number* above(std::int64_t item) const { return logits(item) + plan_.positions; }

  // weight, and of the backward grad: contiguous, in the numbers that are summed.
  Number* factors(int thread, std::int64_t item) const {
    Number* const factors = scratch<Number>(thread, plan_.factors);
    for (std::int64_t channel = 0; channel < a_.channels; ++channel) {
      factors[channel] = weight(channel);
      if (backward_) factors[a_.channels + channel] = grad(item, channel);
    }
    return factors;
  }

  // ---- reading ---------------------------------------------------------------------------------

  void read(std::int64_t task, int thread) {
    const std::int64_t item = task / plan_.splits, split = task % plan_.splits;
    const bool by_channels = plan_.layout == GateLayout::kChannels;
    const Number* const factors = this->factors(thread, item);
    Number* const sums = scratch<Number>(thread, plan_.lanes);
    const std::int64_t lanes = by_channels ? 1 : kLength;
    for (std::int64_t i = 0; i < a_.channels * lanes; ++i) sums[i] = 0;
    double expected = 0;
    for (std::int64_t channel = 0; backward_ && channel < a_.channels; ++channel) {
      expected += static_cast<double>(grad(item, channel)) * context(item, channel);
    }
    GateStats stats = {-__builtin_inf(), 0, 0};
    const std::int64_t first = split * plan_.tiles_per_split;
    const std::int64_t last = least(plan_.tiles, first + plan_.tiles_per_split);
    for (std::int64_t tile = first; tile < last; ++tile) {
      by_channels ? read_channels(item, tile, factors, static_cast<Number>(expected), stats, sums)
                  : read_positions(item, tile, thread, factors, static_cast<Number>(expected),
                                   stats, sums);
    }
    Number* const parts = at<Number>(plan_.parts) + task * a_.channels;
    for (std::int64_t channel = 0; channel < a_.channels; ++channel) {
      parts[channel] =
          by_channels ? sums[channel] : sum_of_lanes<Number>(load(sums + channel * kLength));
    }
    at<GateStats>(plan_.part_stats)[task] = stats;
  }

  // The first position of a tile, and how many it has.
  std::int64_t place(std::int64_t tile, std::int64_t& count) const {
    const bool in_runs = plan_.layout == GateLayout::kPositions;
    const std::int64_t run = in_runs ? plan_.x.run : plan_.positions;
    const std::int64_t first = tile % plan_.tiles_per_run * plan_.tile;
    count = least(plan_.tile, run - first);
    return tile / plan_.tiles_per_run * run + first;
  }

  void read_positions(std::int64_t item, std::int64_t tile, int thread, const Number* factors,
                      Number expected, GateStats& stats, Number* sums) {
    Slots<Number> slots;
    const std::int64_t position = place(tile, slots.count);
    const T* from = x(item) + offset_of(plan_.x, position);
    std::int64_t channel_step = a_.x_strides[1];
    if (plan_.layout == GateLayout::kPacked) {
      std::int64_t offsets[kGateTile];
      for (std::int64_t i = 0; i < slots.count; ++i) offsets[i] = offset_of(plan_.x, position + i);
      T* const packed = scratch<T>(thread, plan_.packed);
      const std::int64_t length = plan_.tile + kGatePadding;
      pack(x(item), offsets, channel_step, a_.channels, slots.count, length, packed);
      from = packed + kGatePadding;
      channel_step = length;
    }
    if (backward_) {
      score_positions<true>(from, channel_step, a_.channels, factors, slots);
    } else {
      score_positions<false>(from, channel_step, a_.channels, factors, slots);
    }
    if (backward_) {
      for (std::int64_t i = 0; i < slots.vectors() * kLength; ++i) slots.shares[i] -= expected;
      slots.save(logits(item) + position, slots.logits);
      slots.save(above(item) + position, slots.shares);
    }
    slots.silence((slots.vectors() - 1) * kLength, slots.repeated());
    const Number fade = share_out(slots, stats);
    add_positions(from, channel_step, a_.channels, slots, fade, sums);
  }

  void read_channels(std::int64_t item, std::int64_t tile, const Number* factors, Number expected,
                     GateStats& stats, Number* sums) {
    Slots<Number> slots;
    const std::int64_t position = place(tile, slots.count);
    std::int64_t offsets[kGateTile];
    for (std::int64_t i = 0; i < slots.count; ++i) {
      offsets[i] = offset_of(plan_.x, position + i);
      const T* const row = x(item) + offsets[i];
      if (backward_) {
        score_channels<true>(row, a_.channels, factors, slots.logits[i], slots.shares[i]);
        slots.shares[i] -= expected;
        logits(item)[position + i] = slots.logits[i];
        above(item)[position + i] = slots.shares[i];
      } else {
        score_channels<false>(row, a_.channels, factors, slots.logits[i], slots.shares[i]);
      }
    }
    slots.silence(slots.count, slots.repeated());
    const Number fade = share_out(slots, stats);
    add_channels(x(item), offsets, a_.channels, slots, fade, sums);
  }

  // Replaces u by what rows are multiplied by, updates the split's statistics, and returns by what
  // its sums so far are multiplied.
  Number share_out(Slots<Number>& slots, GateStats& stats) const {
    const std::int64_t end = slots.vectors() * kLength;
    Vector<Number> tops = load(slots.logits);
    for (std::int64_t slot = kLength; slot < end; slot += kLength) {
      tops = larger(load(slots.logits + slot), tops);
    }
    double top = stats.top;
    for (int lane = 0; lane < kLength; ++lane) top = tops[lane] > top ? tops[lane] : top;
    const double origin = origin_of(top);
    const double fade = exp_of(stats.top - origin);
    Vector<Number> totals = {}, errors = {};
    for (std::int64_t slot = 0; slot < end; slot += kLength) {
      const Vector<Number> below = load(slots.logits + slot) - splat(static_cast<Number>(origin));
      Vector<Number> shares = exp_of<Number>(below) * splat(static_cast<Number>(plan_.unit));
      totals += shares;
      if (backward_) {
        shares *= load(slots.shares + slot);
        errors += shares;
      }
      store(slots.shares + slot, shares);
    }
    stats.top = top;
    stats.total = stats.total * fade + sum_of_lanes<Number>(totals);
    stats.error = stats.error * fade + sum_of_lanes<Number>(errors);
    return static_cast<Number>(fade);
  }

  // ---- adding up -------------------------------------------------------------------------------

  void combine(std::int64_t item, int) {
    const GateStats* const splits = at<GateStats>(plan_.part_stats) + item * plan_.splits;
    GateStats all = {-__builtin_inf(), 0, 0};
    for (std::int64_t split = 0; split < plan_.splits; ++split) {
      all.top = splits[split].top > all.top ? splits[split].top : all.top;
    }
    for (std::int64_t split = 0; split < plan_.splits; ++split) {
      const double fade = exp_of(splits[split].top - origin_of(all.top));
      all.total += fade * splits[split].total;
      all.error += fade * splits[split].error;
    }
    all.error /= all.total;
    const Number* const parts = at<Number>(plan_.parts) + item * plan_.splits * a_.channels;
    for (std::int64_t first = 0; first < a_.channels; first += kChannelsAtOnce) {
      const std::int64_t count = least(kChannelsAtOnce, a_.channels - first);
      double sums[kChannelsAtOnce] = {};
      for (std::int64_t split = 0; split < plan_.splits; ++split) {
        const double fade = exp_of(splits[split].top - origin_of(all.top));
        const Number* const own = parts + split * a_.channels + first;
        for (std::int64_t i = 0; i < count; ++i) sums[i] += fade * own[i];
      }
      for (std::int64_t i = 0; i < count; ++i) finish(item, first + i, sums[i] / all.total, all);
    }
    if (backward_) at<GateStats>(plan_.stats)[item] = all;
  }

  void finish(std::int64_t item, std::int64_t channel, double mean, const GateStats& all) {
    const std::int64_t place = item * a_.channels + channel;
    if (backward_) {
      at<double>(plan_.d_weights)[place] = mean - all.error * context(item, channel);
    } else {
      static_cast<T*>(a_.out)[place] = narrow<T>(static_cast<Computed<T>>(mean));
    }
  }

  // ---- writing ---------------------------------------------------------------------------------

  void write(std::int64_t task, int thread) {
    if (task == 0) return sum_weights();
    const std::int64_t item = (task - 1) / written_per_item_;
    const std::int64_t first = (task - 1) % written_per_item_ * kWritten;
    const std::int64_t last = least(plan_.positions, first + kWritten);
    const GateStats stats = at<GateStats>(plan_.stats)[item];
    // In place: what grad is multiplied by at a position, and weight.
    Number* const of_grad = logits(item);
    Number* const of_weight = above(item);
    const Vector<Number> origin = splat(static_cast<Number>(origin_of(stats.top)));
    const Vector<Number> total = splat(static_cast<Number>(stats.total / plan_.unit));
    const Vector<Number> error = splat(static_cast<Number>(stats.error));
    for (std::int64_t position = first; position < last; position += kLength) {
      const int count = static_cast<int>(least(kLength, last - position));
      const Vector<Number> logit = load_some(of_grad + position, count);
      const Vector<Number> above = load_some(of_weight + position, count);
      const Vector<Number> shares = exp_of<Number>(logit - origin) / total;
      store_some(of_grad + position, shares, count);
      store_some(of_weight + position, shares * (above - error), count);
    }
    const Number* const factors = this->factors(thread, item);
    T* const d_x = static_cast<T*>(a_.d_x) + item * a_.d_x_strides[0];
    if (plan_.d_x.step == 1) {
      write_positions(d_x, first, last, factors, of_grad, of_weight);
    } else {
      write_channels(d_x, first, last, factors, of_grad, of_weight);
    }
  }

  void write_positions(T* d_x, std::int64_t first, std::int64_t last, const Number* factors,
                       const Number* of_grad, const Number* of_weight) const {
    for (std::int64_t position = first; position < last;) {
      const std::int64_t left_of_run = plan_.d_x.run - position % plan_.d_x.run;
      const std::int64_t end = least(last, position + left_of_run);
      T* const run = d_x + offset_of(plan_.d_x, position);
      for (std::int64_t channel = 0; channel < a_.channels; ++channel) {
        T* const row = run + channel * a_.d_x_strides[1];
        const Vector<Number> weight = splat(factors[channel]);
        const Vector<Number> grad = splat(factors[a_.channels + channel]);
        std::int64_t at = position;
        for (; at + kLength <= end; at += kLength) {
          store_summed(row + (at - position),
                       load(of_grad + at) * grad + load(of_weight + at) * weight);
        }
        if (at == end) continue;
        const int count = static_cast<int>(end - at);
        store_summed(row + (at - position),
                     load_some(of_grad + at, count) * grad +
                         load_some(of_weight + at, count) * weight,
                     count);
      }
      position = end;
    }
  }

  void write_channels(T* d_x, std::int64_t first, std::int64_t last, const Number* factors,
                      const Number* of_grad, const Number* of_weight) const {
    for (std::int64_t position = first; position < last; ++position) {
      T* const row = d_x + offset_of(plan_.d_x, position);
      const Vector<Number> share = splat(of_grad[position]);
      const Vector<Number> slope = splat(of_weight[position]);
      std::int64_t channel = 0;
      for (; channel + kLength <= a_.channels; channel += kLength) {
        store_summed(row + channel, share * load(factors + a_.channels + channel) +
                                        slope * load(factors + channel));
      }
      if (channel == a_.channels) continue;
      const int count = static_cast<int>(a_.channels - channel);
      store_summed(row + channel,
                   share * load_some(factors + a_.channels + channel, count) +
                       slope * load_some(factors + channel, count),
                   count);
    }
  }

  void sum_weights() {
    const double* const parts = at<double>(plan_.d_weights);
    for (std::int64_t channel = 0; channel < a_.channels; ++channel) {
      double sum = 0;
      for (std::int64_t item = 0; item < a_.batch; ++item) {
        sum += parts[item * a_.channels + channel];
      }
      static_cast<T*>(a_.d_weight)[channel] = narrow<T>(static_cast<Computed<T>>(sum));
    }
  }

  static constexpr std::int64_t kChannelsAtOnce = 64;

  const GateArguments& a_;
  const bool backward_;
  const GatePlan plan_;
  char* const memory_;
  std::int64_t written_per_item_ = 0;
};

}  // namespace

bool gate_forward(const GateArguments& arguments) {
  return with_dtype(arguments.dtype, [&](auto number) {
    return Pool<decltype(number)>(arguments, false).forward();
  });
}

bool gate_backward(const GateArguments& arguments) {
  return with_dtype(arguments.dtype, [&](auto number) {
    return Pool<decltype(number)>(arguments, true).backward();
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
