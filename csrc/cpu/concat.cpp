// The concatenation in linear time but for sorting; see include/nlk/concat.h.
//
// A query of score a sees the keys whose threshold t = -key_score lies below a. Queries and keys are
// sorted together, on equal levels queries first: sums of exactly zero are left out. Walking up,
//
//   G  the sum of the values passed,      S  the sum of (level - t) value of the values passed
//
// are all that is kept: the next level adds (its distance) G to S, a key adds its value to G, and a
// query's row is S / M. No factor is negative, so nothing cancels, however far the scores lie from
// zero. Gradients walk the same stairs: up for d_query_score = grad . G / M, then down with the sums
// of grad for d_value = S / M and d_key_score = value . G / M.
//
// Sums are in double. A task walks one chunk of the stairs with 64 channels, whose sums stay in
// registers; what lies before a chunk is added up in between ("totals", "carry").
//
// Scores that are NaN or infinite rank with the largest finite ones of their sign, NaN as positive;
// rows that they make NaN or infinite are written so apart.
#include "nlk/concat.h"

#include "cpu/concat_stairs.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// Rows that are requested so many steps before they are read.
constexpr int kAhead = 12;

template <typename T>
template <int kWidth>
void Stairs<T>::total_of(const Task& task) {
  const Level* const level = levels(task.item);
  const std::uint32_t* const order = rows(task.item);
  const std::int64_t first = first_step(task.chunk), last = first_step(task.chunk + 1);
  const double top = level[last - 1], unit = item(task.item).value_unit;
  const Rows<T> value = values(task);
  T buffer[kWidth] = {};
  Row<kWidth> sums, stairs;
  sums.clear();
  stairs.clear();
  for (std::int64_t step = first; step < last; ++step) {
    if (order[step] < a_.queries) continue;
    Row<kWidth> numbers = value.template read<kWidth>(order[step] - a_.queries, buffer);
    in_unit(numbers, unit);
    sums.add(numbers);
    stairs.add(distance(top, level[step]), numbers);
  }
  sums.write(carried(plan_.sums, task.item, task.block, task.chunk));
  if (!backward_) stairs.write(carried(plan_.stairs, task.item, task.block, task.chunk));
}

template <typename T>
void Stairs<T>::carry_up(std::int64_t number) {
  const std::int64_t block = number % plan_.blocks, own = number / plan_.blocks;
  Row<kConcatBlock> sums, stairs, sum, stair;
  sums.clear();
  stairs.clear();
  stair.clear();
  double level = levels(own)[0];
  for (std::int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
    double* const own_sums = carried(plan_.sums, own, block, chunk);
    double* const own_stairs = carried(plan_.stairs, own, block, chunk);
    const bool is_last = chunk == plan_.chunks - 1;
    if (!is_last) sum.read(own_sums);
    sums.write(own_sums);
    if (!backward_) {
      if (!is_last) stair.read(own_stairs);
      stairs.write(own_stairs);
    }
    if (is_last) return;
    const double top = levels(own)[first_step(chunk + 1) - 1];
    climb_to(top, level, stairs, sums);
    stairs.add(stair);
    sums.add(sum);
  }
}

template <typename T>
void Stairs<T>::carry_down(std::int64_t number) {
  const std::int64_t block = number % plan_.blocks, own = number / plan_.blocks;
  Row<kConcatBlock> sums, stairs, sum, stair;
  sums.clear();
  stairs.clear();
  double level = levels(own)[plan_.steps - 1];
  for (std::int64_t chunk = plan_.chunks - 1; chunk >= 0; --chunk) {
    double* const own_sums = carried(plan_.grad_sums, own, block, chunk);
    double* const own_stairs = carried(plan_.grad_stairs, own, block, chunk);
    if (chunk > 0) sum.read(own_sums), stair.read(own_stairs);
    sums.write(own_sums);
    stairs.write(own_stairs);
    if (chunk == 0) return;
    fall_to(levels(own)[first_step(chunk)], level, stairs, sums);
    stairs.add(stair);
    sums.add(sum);
  }
}

template <typename T>
template <int kWidth>
void Stairs<T>::climb_of(const Task& task) {
  const ConcatItem own = item(task.item);
  const Level* const level = levels(task.item);
  const std::uint32_t* const order = rows(task.item);
  const std::int64_t first = first_step(task.chunk), last = first_step(task.chunk + 1);
  const std::uint32_t queries = static_cast<std::uint32_t>(a_.queries);
  const Rows<T> value = values(task);
  T* const out = static_cast<T*>(a_.out) + task.item * a_.queries * a_.channels +
                 task.block * kConcatBlock;
  const double factor = 1 / (static_cast<double>(a_.keys) * own.value_unit);
  T buffer[kWidth] = {};
  Row<kWidth> sums, stairs;
  sums.clear();
  stairs.clear();
  if (task.chunk > 0) {
    sums.read(carried(plan_.sums, task.item, task.block, task.chunk));
    stairs.read(carried(plan_.stairs, task.item, task.block, task.chunk));
  }
  double here = level[task.chunk > 0 ? first - 1 : 0];
  for (std::int64_t step = first; step < last; ++step) {
    const std::uint32_t ahead = order[least(step + kAhead, last - 1)];
    if (ahead >= queries) {
      value.template prefetch<kWidth>(ahead - queries);
    } else {
      prefetch_written(out + ahead * a_.channels, value.count);
    }
    climb_to(level[step], here, stairs, sums);
    const std::uint32_t row = order[step];
    if (row >= queries) {
      Row<kWidth> numbers = value.template read<kWidth>(row - queries, buffer);
      in_unit(numbers, own.value_unit);
      sums.add(numbers);
      continue;
    }
    T* const target = out + row * a_.channels;
    if (own.has_bad_score) {
      const double highest = query_score(task.item, row) + own.top_key;
      if (is_bad(highest)) {
        write_row(target, sums, highest, value.count);
        continue;
      }
    }
    write_row(target, stairs, factor, value.count);
  }
}

template <typename T>
template <int kWidth>
void Stairs<T>::climb_again_of(const Task& task) {
  const ConcatItem own = item(task.item);
  const Level* const level = levels(task.item);
  const std::uint32_t* const order = rows(task.item);
  const std::int64_t first = first_step(task.chunk), last = first_step(task.chunk + 1);
  const std::uint32_t queries = static_cast<std::uint32_t>(a_.queries);
  const Rows<T> value = values(task), grad = grads(task);
  double* const products = dots(task.item, task.block);
  const double factor = 1 / (static_cast<double>(a_.keys) * own.value_unit);
  const double bottom = level[first];
  T buffer[kWidth] = {};
  Row<kWidth> sums, grad_sums, grad_stairs;
  sums.clear();
  grad_sums.clear();
  grad_stairs.clear();
  if (task.chunk > 0) sums.read(carried(plan_.sums, task.item, task.block, task.chunk));
  for (std::int64_t step = first; step < last; ++step) {
    const std::uint32_t ahead = order[least(step + kAhead, last - 1)];
    if (ahead < queries) {
      grad.template prefetch<kWidth>(ahead);
    } else {
      value.template prefetch<kWidth>(ahead - queries);
    }
    const std::uint32_t row = order[step];
    if (row >= queries) {
      Row<kWidth> numbers = value.template read<kWidth>(row - queries, buffer);
      in_unit(numbers, own.value_unit);
      sums.add(numbers);
      continue;
    }
    Row<kWidth> numbers = grad.template read<kWidth>(row, buffer);
    products[row] = factor * sums.dot(numbers);
    if (task.chunk == 0) continue;
    in_unit(numbers, own.grad_unit);
    grad_sums.add(numbers);
    grad_stairs.add(distance(level[step], bottom), numbers);
  }
  if (task.chunk == 0) return;
  grad_sums.write(carried(plan_.grad_sums, task.item, task.block, task.chunk));
  grad_stairs.write(carried(plan_.grad_stairs, task.item, task.block, task.chunk));
}

template <typename T>
template <int kWidth>
void Stairs<T>::descend_of(const Task& task) {
  const ConcatItem own = item(task.item);
  const Level* const level = levels(task.item);
  const std::uint32_t* const order = rows(task.item);
  const std::int64_t first = first_step(task.chunk), last = first_step(task.chunk + 1);
  const std::uint32_t queries = static_cast<std::uint32_t>(a_.queries);
  const Rows<T> value = values(task), grad = grads(task);
  double* const products = dots(task.item, task.block);
  T* const d_value = static_cast<T*>(a_.d_value) + task.item * a_.keys * a_.channels +
                     task.block * kConcatBlock;
  const double factor = 1 / (static_cast<double>(a_.keys) * own.grad_unit);
  T buffer[kWidth] = {};
  Row<kWidth> sums, stairs;
  sums.clear();
  stairs.clear();
  if (plan_.chunks > 1) {
    sums.read(carried(plan_.grad_sums, task.item, task.block, task.chunk));
    stairs.read(carried(plan_.grad_stairs, task.item, task.block, task.chunk));
  }
  double here = level[least(last, plan_.steps - 1)];
  for (std::int64_t step = last - 1; step >= first; --step) {
    const std::uint32_t ahead = order[step - kAhead < first ? first : step - kAhead];
    if (ahead < queries) {
      grad.template prefetch<kWidth>(ahead);
    } else {
      value.template prefetch<kWidth>(ahead - queries);
      prefetch_written(d_value + (ahead - queries) * a_.channels, value.count);
    }
    fall_to(level[step], here, stairs, sums);
    const std::uint32_t row = order[step];
    if (row < queries) {
      Row<kWidth> numbers = grad.template read<kWidth>(row, buffer);
      in_unit(numbers, own.grad_unit);
      sums.add(numbers);
      continue;
    }
    const std::int64_t key = row - queries;
    products[row] = factor * sums.dot(value.template read<kWidth>(key, buffer));
    T* const target = d_value + key * a_.channels;
    if (own.has_bad_score) {
      const double highest = key_score(task.item, key) + own.top_query;
      if (is_bad(highest)) {
        write_row(target, sums, highest, value.count);
        continue;
      }
    }
    write_row(target, stairs, factor, value.count);
  }
}

template <typename T>
void Stairs<T>::finish(std::int64_t number) {
  T* const d_query = static_cast<T*>(a_.d_query_score) + number * a_.queries;
  T* const d_key = static_cast<T*>(a_.d_key_score) + number * a_.keys;
  const double* const products = dots(number, 0);
  for (std::int64_t row = 0; row < plan_.steps; ++row) {
    double sum = products[row];
    for (std::int64_t block = 1; block < plan_.blocks; ++block) {
      sum += products[block * plan_.steps + row];
    }
    T* const target = row < a_.queries ? d_query + row : d_key + (row - a_.queries);
    *target = narrow<T>(static_cast<Level>(sum));
  }
}

}  // namespace

bool concat_forward(const ConcatArguments& arguments) {
  return with_dtype(arguments.dtype, [&](auto number) {
    return Stairs<decltype(number)>(arguments, false).forward();
  });
}

bool concat_backward(const ConcatArguments& arguments) {
  return with_dtype(arguments.dtype, [&](auto number) {
    return Stairs<decltype(number)>(arguments, true).backward();
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
