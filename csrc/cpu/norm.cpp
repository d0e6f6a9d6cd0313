// Lines of what lies together in z are read and written from end to end: positions of a channel, or
// channels of a position. Sums of few numbers are added in float64, in an order that depends on
// sizes only.
#include "nlk/norm.h"

#include <cmath>
#include <type_traits>

#include "cpu/attention_plan.h"
#include "cpu/lines.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Numbers of a task, and those of a line that are summed in the type of sums.
constexpr std::int64_t kTaskNumbers = 16 << 10, kSummed = 256;
// Tasks that positions are shared out to, and how many of them are summed in the type of sums.
constexpr std::int64_t kMostParts = 64, kRowsSummed = 32;
// Rows ahead of those that are read, from which numbers are fetched into the caches.
constexpr std::int64_t kRowsAhead = 8;
// Channels whose parts are added up by one task.
constexpr std::int64_t kChannelsOfTask = 64;

// One number in all lanes, or those of a line's channels.
template <typename Number>
struct Same {
  Vector<Number> number;
  NLK_INLINE Vector<Number> at(std::int64_t, int) const { return number; }
};
template <typename Number>
struct Along {
  const Number* numbers;
  NLK_INLINE Vector<Number> at(std::int64_t i, int some) const {
    return load_some(numbers + i, some);
  }
};

template <typename T>
class Norm {
  typedef Computed<T> Number;
  typedef Vector<Number> Numbers;
  static constexpr int kLength = kLanes<Number>;

 public:
  explicit Norm(const NormArguments& call) : a_(call) {
    maps_ = a_.z.channel != 1 && a_.z.row == 1;
    const std::int64_t all = a_.batch * a_.positions;
    rows_of_part_ = rounded_up(blocks_of(all, kMostParts), kRowsSummed);
    parts_ = blocks_of(all, rows_of_part_);
  }

  // Where what lies; returns the bytes of it all.
  std::int64_t lay_out(void* workspace) {
    Pieces pieces(workspace);
    factor_ = pieces.take<Number>(a_.channels);
    slope_ = pieces.take<Number>(a_.channels);
    level_ = pieces.take<Number>(a_.channels);
    if (maps_) return pieces.bytes();
    sums_ = pieces.take<double>(parts_ * 2 * a_.channels);
    const std::int64_t shared = pieces.bytes();
    few_ = pieces.take<Number>(2 * a_.channels);
    thread_bytes_ = pieces.bytes() - shared;
    return shared + a_.threads * thread_bytes_;
  }

  bool forward() {
    prepare();
    return over_lines([this](const Place& at) {
      const Number* const beta = static_cast<const Number*>(a_.beta) + at.channel;
      if (maps_) return normalise(at, same(mean(at)), same(factor_ + at.channel), same(beta));
      normalise(at, along(mean(at)), along(factor_ + at.channel), along(beta));
    });
  }

  bool sums() {
    prepare();
    if (!maps_) return sum_rows();
    return over_channels([this](std::int64_t channel) { sum_channel(channel); });
  }

  bool backward() {
    prepare();
    if (a_.means) {
      const Number* const means = static_cast<const Number*>(a_.means);
      for (std::int64_t channel = 0; channel < a_.channels; ++channel) {
        set_means(channel, means[channel], means[a_.channels + channel]);
      }
    } else if (maps_) {
      // The numbers of a channel are still in the cache where they are read again.
      return over_channels([this](std::int64_t channel) {
        sum_channel(channel);
        for (std::int64_t item = 0; item < a_.batch; ++item) {
          differentiate(Place{item, 0, channel, a_.positions});
        }
      });
    } else if (!sum_rows()) {
      return false;
    }
    return over_lines([this](const Place& at) { differentiate(at); });
  }

 private:
  struct Place {
    std::int64_t item, position, channel, count;
  };

  static Same<Number> same(const Number* number) { return {splat(*number)}; }
  static Along<Number> along(const Number* numbers) { return {numbers}; }
  const Number* mean(const Place& at) const {
    return static_cast<const Number*>(a_.moments) + at.channel;
  }
  Line<T> line(const Operand& operand, const Place& at) const {
    T* const data = static_cast<T*>(operand.data) + at.item * operand.item +
                    at.position * operand.row + at.channel * operand.channel;
    return {data, maps_ ? operand.row : operand.channel};
  }
  Line<const T> read(const Operand& operand, const Place& at) const {
    const Line<T> found = line(operand, at);
    return {found.data, found.step};
  }

  double inverse_of(std::int64_t channel) const {
    const Number variance = static_cast<const Number*>(a_.moments)[a_.channels + channel];
    return 1 / std::sqrt(static_cast<double>(variance) + a_.eps);
  }

  // gamma / sqrt(variance + eps) of each channel.
  void prepare() {
    lay_out(a_.workspace);
    const Number* const gamma = static_cast<const Number*>(a_.gamma);
    for (std::int64_t channel = 0; gamma && channel < a_.channels; ++channel) {
      const double factor = static_cast<double>(gamma[channel]) * inverse_of(channel);
      factor_[channel] = static_cast<Number>(factor);
    }
  }

  // Calls body(place) for lines that are together all numbers.
  template <typename Body>
  bool over_lines(Body body) {
    const std::int64_t length = maps_ ? a_.positions : a_.channels;
    const std::int64_t others = maps_ ? a_.channels : a_.positions;
    const std::int64_t pieces = blocks_of(length, kTaskNumbers);
    const std::int64_t at_once = larger_of(1, kTaskNumbers / length);
    const std::int64_t lines = a_.batch * others * pieces;
    auto some = [&](std::int64_t task, int) {
      const std::int64_t end = smaller_of(lines, (task + 1) * at_once);
      for (std::int64_t number = task * at_once; number < end; ++number) {
        const std::int64_t first = number % pieces * kTaskNumbers;
        const std::int64_t other = number / pieces % others;
        const std::int64_t count = smaller_of(kTaskNumbers, length - first);
        body(Place{number / pieces / others, maps_ ? first : other, maps_ ? other : first, count});
      }
    };
    return parallel(a_.threads, blocks_of(lines, at_once), some);
  }

  // Calls body(channel) for all channels.
  template <typename Body>
  bool over_channels(Body body) {
    const std::int64_t at_once = larger_of(1, kTaskNumbers / (a_.batch * a_.positions));
    auto some = [&](std::int64_t task, int) {
      const std::int64_t end = smaller_of(a_.channels, (task + 1) * at_once);
      for (std::int64_t channel = task * at_once; channel < end; ++channel) body(channel);
    };
    return parallel(a_.threads, blocks_of(a_.channels, at_once), some);
  }

  template <typename Constant>
  void normalise(const Place& at, Constant mean, Constant factor, Constant beta) const {
    const bool based = a_.base.data != nullptr;
    const Line<const T> z = read(a_.z, at), base = based ? read(a_.base, at) : z;
    const Line<T> out = line(a_.out, at);
    for (std::int64_t i = 0; i < at.count; i += kLength) {
      const int some = lanes_from<Number>(i, at.count);
      const Numbers gap = load_line(z.from(i), some) - mean.at(i, some);
      Numbers result = gap * factor.at(i, some) + beta.at(i, some);
      if (based) result = result + load_line(base.from(i), some);
      store_line(out.from(i), result, some);
    }
  }

  void differentiate(const Place& at) const {
    const Number *const factor = factor_ + at.channel, *const slope = slope_ + at.channel;
    const Number* const level = level_ + at.channel;
    if (maps_) {
      differentiate(at, same(mean(at)), same(factor), same(slope), same(level));
    } else {
      differentiate(at, along(mean(at)), along(factor), along(slope), along(level));
    }
  }

  template <typename Constant>
  void differentiate(const Place& at, Constant mean, Constant factor, Constant slope,
                     Constant level) const {
    const Line<const T> z = read(a_.z, at), grad = read(a_.grad, at);
    const Line<T> out = line(a_.out, at);
    for (std::int64_t i = 0; i < at.count; i += kLength) {
      const int some = lanes_from<Number>(i, at.count);
      const Numbers gap = load_line(z.from(i), some) - mean.at(i, some);
      const Numbers centred = load_line(grad.from(i), some) - level.at(i, some);
      const Numbers result = factor.at(i, some) * (centred - gap * slope.at(i, some));
      store_line(out.from(i), result, some);
    }
  }

  // Of grad (z - mean), and of grad.
  void set_sums(std::int64_t channel, double of_products, double of_grad) const {
    const double of_standard = of_products * inverse_of(channel);
    const double count = static_cast<double>(a_.batch * a_.positions);
    Number* const sums = static_cast<Number*>(a_.sums);
    sums[channel] = static_cast<Number>(of_standard);
    sums[a_.channels + channel] = static_cast<Number>(of_grad);
    set_means(channel, of_standard / count, of_grad / count);
  }

  void set_means(std::int64_t channel, double of_standard, double of_grad) const {
    slope_[channel] = static_cast<Number>(of_standard * inverse_of(channel));
    level_[channel] = static_cast<Number>(of_grad);
  }

  // ---- positions lie together ------------------------------------------------------------------

  void sum_channel(std::int64_t channel) const {
    double of_products = 0, of_grad = 0;
    for (std::int64_t item = 0; item < a_.batch; ++item) {
      for (std::int64_t first = 0; first < a_.positions; first += kSummed) {
        const Place at{item, first, channel, smaller_of(kSummed, a_.positions - first)};
        const Line<const T> z = read(a_.z, at), grad = read(a_.grad, at);
        const Numbers means = splat(*mean(at));
        Numbers products = {}, grads = {};
        for (std::int64_t i = 0; i < at.count; i += kLength) {
          const int some = lanes_from<Number>(i, at.count);
          const Numbers own = load_line(grad.from(i), some);
          // Where there is no number the gradient is zero, which times an infinite mean is NaN.
          const Numbers gap = load_line(z.from(i), some) - means;
          products += first_lanes<Number>(own * gap, some);
          grads += own;
        }
        of_products += static_cast<double>(sum_of_lanes<Number>(products));
        of_grad += static_cast<double>(sum_of_lanes<Number>(grads));
      }
    }
    set_sums(channel, of_products, of_grad);
  }

  // ---- channels lie together -------------------------------------------------------------------

  bool sum_rows() {
    auto part = [&](std::int64_t task, int thread) { sum_part(task, thread); };
    if (!parallel(a_.threads, parts_, part)) return false;
    auto channels = [&](std::int64_t task, int) { add_parts(task * kChannelsOfTask); };
    return parallel(a_.threads, blocks_of(a_.channels, kChannelsOfTask), channels);
  }

  void sum_part(std::int64_t part, int thread) const {
    double* const sums = sums_ + part * 2 * a_.channels;
    Number* const few = own_piece(few_, thread, thread_bytes_);
    const std::int64_t first = part * rows_of_part_;
    const std::int64_t end = smaller_of(a_.batch * a_.positions, first + rows_of_part_);
    std::memset(sums, 0, 2 * a_.channels * sizeof(double));
    for (std::int64_t from = first; from < end; from += kRowsSummed) {
      const std::int64_t rows = smaller_of(kRowsSummed, end - from);
      std::memset(few, 0, 2 * a_.channels * sizeof(Number));
      add_rows(from, rows, few);
      for (std::int64_t i = 0; i < 2 * a_.channels; ++i) sums[i] += static_cast<double>(few[i]);
    }
  }

  // Adds products and gradients of rows [from, from + rows) of all items.
  void add_rows(std::int64_t from, std::int64_t rows, Number* sums) const {
    const std::integral_constant<std::int64_t, 1> one;
    if (a_.z.channel == 1 && a_.grad.channel == 1) return add_rows(from, rows, sums, one, one);
    add_rows(from, rows, sums, a_.z.channel, a_.grad.channel);
  }

  template <typename Step>
  void add_rows(std::int64_t from, std::int64_t rows, Number* sums, Step z_step,
                Step grad_step) const {
    const T *z[kRowsSummed], *grad[kRowsSummed];
    for (std::int64_t row = 0; row < rows; ++row) {
      const Place at{(from + row) / a_.positions, (from + row) % a_.positions, 0, a_.channels};
      z[row] = read(a_.z, at).data, grad[row] = read(a_.grad, at).data;
    }
    const Number* const means = static_cast<const Number*>(a_.moments);
    add_columns<Number, 2>(rows, a_.channels, sums, [&](auto row, auto i, int some, auto* parts) {
      const Line<const T> own_z{z[row] + i * z_step, z_step};
      const Line<const T> own_grad{grad[row] + i * grad_step, grad_step};
      // The processor's own prefetching begins anew in every row.
      __builtin_prefetch(own_z.data + kRowsAhead * a_.z.row);
      __builtin_prefetch(own_grad.data + kRowsAhead * a_.grad.row);
      const Numbers own = load_line(own_grad, some);
      parts[0] += own * (load_line(own_z, some) - load_some(means + i, some));
      parts[1] += own;
    });
  }

  void add_parts(std::int64_t first) const {
    const std::int64_t count = smaller_of(kChannelsOfTask, a_.channels - first);
    double of_products[kChannelsOfTask] = {}, of_grad[kChannelsOfTask] = {};
    for (std::int64_t part = 0; part < parts_; ++part) {
      const double* const sums = sums_ + part * 2 * a_.channels + first;
      for (std::int64_t i = 0; i < count; ++i) of_products[i] += sums[i];
      for (std::int64_t i = 0; i < count; ++i) of_grad[i] += sums[a_.channels + i];
    }
    for (std::int64_t i = 0; i < count; ++i) set_sums(first + i, of_products[i], of_grad[i]);
  }

  const NormArguments& a_;
  bool maps_;
  std::int64_t rows_of_part_, parts_, thread_bytes_ = 0;
  Number *factor_ = nullptr, *slope_ = nullptr, *level_ = nullptr;
  double* sums_ = nullptr;
  Number* few_ = nullptr;  // each thread's own
};

}  // namespace

std::int64_t norm_workspace(const NormArguments& call) {
  return with_dtype(call.dtype,
                    [&](auto number) { return Norm<decltype(number)>(call).lay_out(nullptr); });
}

bool norm_forward(const NormArguments& call) {
  return with_dtype(call.dtype,
                    [&](auto number) { return Norm<decltype(number)>(call).forward(); });
}

bool norm_sums(const NormArguments& call) {
  return with_dtype(call.dtype, [&](auto number) { return Norm<decltype(number)>(call).sums(); });
}

bool norm_backward(const NormArguments& call) {
  return with_dtype(call.dtype,
                    [&](auto number) { return Norm<decltype(number)>(call).backward(); });
}

}  // namespace NLK_ISA
}  // namespace nlk
