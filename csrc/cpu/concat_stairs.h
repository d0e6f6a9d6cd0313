// The stairs of one call: scores in order, the sums beside them, and who walks where. Only for units
// that are compiled once for each instruction set; see simd.h.
#ifndef NLK_CPU_CONCAT_STAIRS_H_
#define NLK_CPU_CONCAT_STAIRS_H_

#include "cpu/concat_plan.h"
#include "cpu/doubles.h"
#include "nlk/parallel.h"

namespace nlk {
namespace NLK_ISA {
namespace {

constexpr int kNarrow = 16;

template <typename T>
struct Limits;
template <>
struct Limits<float> {
  typedef std::uint32_t Bits;
  static constexpr float kMost = __FLT_MAX__;
};
template <>
struct Limits<double> {
  typedef std::uint64_t Bits;
  static constexpr double kMost = __DBL_MAX__;
};

NLK_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
// NaN where either is.
NLK_INLINE double most(double a, double b) { return a > b || a != a ? a : b; }
NLK_INLINE double magnitude(double number) { return number < 0 ? -number : number; }
NLK_INLINE bool is_finite(double number) { return magnitude(number) <= __DBL_MAX__; }

// Integers in the order of the numbers, and back.
template <typename Number, typename Bits = typename Limits<Number>::Bits>
NLK_INLINE Bits ordered(Number number) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  const Bits bits = bit_copy<Bits>(number + Number{0});  // -0 becomes 0: a tie
  return bits & sign ? ~bits : bits | sign;
}
template <typename Number, typename Bits>
NLK_INLINE Number of_ordered(Bits bits) {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  return bit_copy<Number>(bits & sign ? bits & ~sign : ~bits);
}

template <typename Number>
NLK_INLINE Number clipped(Number number) {
  constexpr Number most = Limits<Number>::kMost;
  if (!(number <= most)) return most;
  return number < -most ? -most : number;
}

// The largest magnitude of (rows, channels) numbers but for NaN, which shows in the results.
template <typename T>
double largest(const T* numbers, const std::int64_t* strides, std::int64_t rows,
               std::int64_t channels) {
  DoubleVector found = {};
  for (std::int64_t row = 0; row < rows; ++row) {
    const T* const from = numbers + row * strides[1];
    std::int64_t channel = 0;
    for (; strides[2] == 1 && channel + kLanes<double> <= channels; channel += kLanes<double>) {
      const DoubleVector read = load_doubles(from + channel);
      found = larger(read < 0 ? -read : read, found);
    }
    for (; channel < channels; ++channel) {
      found[0] = most(magnitude(widen(from[channel * strides[2]])), found[0]);
    }
  }
  double result = found[0];
  for (int lane = 1; lane < kLanes<double>; ++lane) result = most(result, found[lane]);
  return result;
}

// 1 where sums of so many numbers of at most that size stay finite, else a power of two in which they
// stay below the largest. Only float64 needs it: sums of other dtypes cannot fill a double.
double unit_of(std::int64_t terms, double size) {
  if (size <= __DBL_MAX__ / 2 / static_cast<double>(terms)) return 1.0;
  double unit = 1.0;
  for (; terms > 0; terms >>= 1) unit /= 2;
  return unit;
}

// What a task works on.
struct Task {
  std::int64_t item, chunk, block;
};

template <typename T>
class Stairs {
 public:
  typedef Computed<T> Level;
  typedef typename Limits<Level>::Bits Bits;

  Stairs(const ConcatArguments& arguments, bool backward)
      : a_(arguments),
        backward_(backward),
        plan_(concat_plan(arguments, backward)),
        memory_(static_cast<char*>(arguments.workspace)) {}

  bool forward() {
    const std::int64_t tasks = a_.batch * plan_.chunks * plan_.blocks;
    return run<&Stairs::rank>(a_.batch) && sum_below() && run<&Stairs::climb>(tasks);
  }

  bool backward() {
    const std::int64_t tasks = a_.batch * plan_.chunks * plan_.blocks;
    return run<&Stairs::rank>(a_.batch) && sum_below() && run<&Stairs::climb_again>(tasks) &&
           (plan_.chunks == 1 || run<&Stairs::carry_down>(a_.batch * plan_.blocks)) &&
           run<&Stairs::descend>(tasks) && run<&Stairs::finish>(a_.batch);
  }

 private:
  template <void (Stairs::*kRun)(std::int64_t)>
  bool run(std::int64_t tasks) {
    return parallel_for(
        a_.threads, tasks,
        [](void* stairs, std::int64_t task, int) { (static_cast<Stairs*>(stairs)->*kRun)(task); },
        this);
  }

  bool sum_below() {
    if (plan_.chunks == 1) return true;
    return run<&Stairs::total>(a_.batch * plan_.chunks * plan_.blocks) &&
           run<&Stairs::carry_up>(a_.batch * plan_.blocks);
  }

  // ---- memory ----------------------------------------------------------------------------------

  template <typename U>
  U* at(std::int64_t offset) const {
    return reinterpret_cast<U*>(memory_ + offset);
  }
  ConcatItem& item(std::int64_t number) const { return at<ConcatItem>(plan_.items)[number]; }
  Level* levels(std::int64_t item) const { return at<Level>(plan_.levels) + item * plan_.steps; }
  std::uint32_t* rows(std::int64_t item) const {
    return at<std::uint32_t>(plan_.rows) + item * plan_.steps;
  }
  // The sums of a chunk, of 64 channels.
  double* carried(std::int64_t offset, std::int64_t item, std::int64_t block,
                  std::int64_t chunk) const {
    const std::int64_t place = (item * plan_.blocks + block) * plan_.chunks + chunk;
    return at<double>(offset) + place * kConcatBlock;
  }
  double* dots(std::int64_t item, std::int64_t block) const {
    return at<double>(plan_.dots) + (item * plan_.blocks + block) * plan_.steps;
  }
  Level query_score(std::int64_t item, std::int64_t row) const {
    const T* from = static_cast<const T*>(a_.query_score);
    return widen(from[item * a_.query_score_strides[0] + row * a_.query_score_strides[1]]);
  }
  Level key_score(std::int64_t item, std::int64_t row) const {
    const T* from = static_cast<const T*>(a_.key_score);
    return widen(from[item * a_.key_score_strides[0] + row * a_.key_score_strides[1]]);
  }

  Task task_of(std::int64_t number) const {
    Task task;
    task.block = number % plan_.blocks;
    task.chunk = number / plan_.blocks % plan_.chunks;
    task.item = number / plan_.blocks / plan_.chunks;
    return task;
  }
  std::int64_t first_step(std::int64_t chunk) const {
    return least(plan_.steps, chunk * kConcatChunk);
  }
  int width(std::int64_t block) const {
    return static_cast<int>(least(kConcatBlock, a_.channels - block * kConcatBlock));
  }
  bool is_narrow(std::int64_t block) const { return width(block) <= kNarrow; }
  Rows<T> values(const Task& task) const { return part_of(a_.value, a_.value_strides, task); }
  Rows<T> grads(const Task& task) const { return part_of(a_.grad, a_.grad_strides, task); }
  Rows<T> part_of(const void* operand, const std::int64_t* strides, const Task& task) const {
    const T* first = static_cast<const T*>(operand) + task.item * strides[0] +
                     task.block * kConcatBlock * strides[2];
    return Rows<T>{first, strides[1], strides[2], width(task.block)};
  }

  // ---- sorting ---------------------------------------------------------------------------------

  void rank(std::int64_t number) {
    ConcatItem& own = item(number);
    own = ConcatItem{-__builtin_inf(), -__builtin_inf(), 1.0, 1.0, 0, {}};
    Bits* const bits = at<Bits>(plan_.levels) + number * plan_.steps;
    std::uint32_t* const order = rows(number);
    for (std::int64_t i = 0; i < a_.queries; ++i) {
      const Level score = query_score(number, i);
      own.top_query = most(own.top_query, score);
      own.has_bad_score |= !is_finite(score);
      bits[i] = ordered(clipped(score));
    }
    for (std::int64_t j = 0; j < a_.keys; ++j) {
      const Level score = key_score(number, j);
      own.top_key = most(own.top_key, score);
      own.has_bad_score |= !is_finite(score);
      bits[a_.queries + j] = ordered(-clipped(score));
    }
    for (std::int64_t i = 0; i < plan_.steps; ++i) order[i] = static_cast<std::uint32_t>(i);
    sort_levels(bits, order, at<Bits>(plan_.spare_levels) + number * plan_.steps,
                at<std::uint32_t>(plan_.spare_rows) + number * plan_.steps, plan_.steps);
    Level* const level = levels(number);
    for (std::int64_t i = 0; i < plan_.steps; ++i) {
      const Level sorted = of_ordered<Level>(load_bits<Bits>(bits + i));
      std::memcpy(level + i, &sorted, sizeof(sorted));
    }
    if (sizeof(T) == sizeof(double)) choose_units(own, number);
  }

  void choose_units(ConcatItem& own, std::int64_t number) {
    const T* const value = static_cast<const T*>(a_.value) + number * a_.value_strides[0];
    const double values = largest(value, a_.value_strides, a_.keys, a_.channels);
    const double highest = most(1.0, own.top_query + own.top_key);
    if (!backward_) {
      own.value_unit = unit_of(a_.keys, values * highest);
      return;
    }
    const T* const grad = static_cast<const T*>(a_.grad) + number * a_.grad_strides[0];
    const double grads = largest(grad, a_.grad_strides, a_.queries, a_.channels);
    const double depth = static_cast<double>(a_.channels);
    own.value_unit = unit_of(a_.keys, values * most(1.0, grads * depth));
    const double factor = most(highest, values * depth);
    own.grad_unit = unit_of(a_.queries > a_.keys ? a_.queries : a_.keys, grads * factor);
  }

  // ---- sums below and above a chunk ------------------------------------------------------------

  void total(std::int64_t number) {
    const Task task = task_of(number);
    if (task.chunk == plan_.chunks - 1) return;  // nothing lies above it
    is_narrow(task.block) ? total_of<kNarrow>(task) : total_of<kConcatBlock>(task);
  }

  // G and S of the keys of a chunk, at its last level.
  template <int kWidth>
  void total_of(const Task& task);

  // Of every chunk, what lies below it, at the last level before it.
  void carry_up(std::int64_t number);

  // Of every chunk, what lies above it, at the first level after it.
  void carry_down(std::int64_t number);

  // ---- walks -----------------------------------------------------------------------------------

  NLK_INLINE static double distance(double above, double below) {
    const double gap = above - below;  // float64 scores may lie further apart than numbers reach
    return gap <= __DBL_MAX__ ? gap : __DBL_MAX__;
  }
  template <int kWidth>
  NLK_INLINE static void climb_to(double next, double& level, Row<kWidth>& stairs,
                                  const Row<kWidth>& sums) {
    if (next > level) stairs.add(distance(next, level), sums);  // at no distance infinities stay
    level = next;
  }
  template <int kWidth>
  NLK_INLINE static void fall_to(double next, double& level, Row<kWidth>& stairs,
                                 const Row<kWidth>& sums) {
    if (next < level) stairs.add(distance(level, next), sums);
    level = next;
  }
  template <int kWidth>
  NLK_INLINE static void in_unit(Row<kWidth>& numbers, double unit) {
    if constexpr (sizeof(T) == sizeof(double)) {
      for (auto& vector : numbers.at) vector *= splat(unit);
    }
  }
  // Whether a sum of scores makes a row infinite or NaN; it is what the row's sums are multiplied by.
  NLK_INLINE static bool is_bad(double score_sum) { return !(score_sum < __builtin_inf()); }

  void climb(std::int64_t number) {
    const Task task = task_of(number);
    is_narrow(task.block) ? climb_of<kNarrow>(task) : climb_of<kConcatBlock>(task);
  }

  template <int kWidth>
  void climb_of(const Task& task);

  void climb_again(std::int64_t number) {
    const Task task = task_of(number);
    is_narrow(task.block) ? climb_again_of<kNarrow>(task) : climb_again_of<kConcatBlock>(task);
  }

  // Products of grad with G; and G and S of grad, at the chunk's first level.
  template <int kWidth>
  void climb_again_of(const Task& task);

  void descend(std::int64_t number) {
    const Task task = task_of(number);
    is_narrow(task.block) ? descend_of<kNarrow>(task) : descend_of<kConcatBlock>(task);
  }

  template <int kWidth>
  void descend_of(const Task& task);

  // Adds up the products of all channels.
  void finish(std::int64_t number);

  const ConcatArguments& a_;
  const bool backward_;
  const ConcatPlan plan_;
  char* const memory_;
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_CONCAT_STAIRS_H_
