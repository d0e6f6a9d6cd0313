// The gradient of the weight. A task sums, for one group of channels, the products of some items and
// rows; what the tasks found is added up at the end, in their order. Sums of a few hundred products
// are in what is computed in, sums of such sums in double.
#ifndef NLK_CPU_REGION_GRADIENT_H_
#define NLK_CPU_REGION_GRADIENT_H_

#include "cpu/region_columns.h"
#include "cpu/region_exact.h"
#include "cpu/region_pack.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// The taps of one frame and one column of the kernel, for a column of `rows` rows from `top` on;
// `sweep` lacks what depends on the rows of the kernel.
template <typename T>
NLK_INLINE void sweep_rows(const Plan& plan, Sweep<T>& sweep, std::int64_t top, int rows,
                           double* totals) {
  const T* input = sweep.input;
  in_groups_of_taps(plan.kh, NLK_EACH_GROUP(held, first) {
    constexpr int count = decltype(held)::value;
    sweep.input = input + first * sweep.input_row;
    sweep.inside = rows_inside(top + first - plan.kh / 2, rows + count - 1, plan.height);
    kCorrelateGradient<T, count>[rows - 1](sweep, totals + first * kLanes<T>);
  });
}

// Rows [top, bottom); input begins with row top - kh/2, grad with row top.
template <typename T>
void add_lines(const Plan& plan, std::int64_t top, std::int64_t bottom, const T* input,
               const T* grad, double* totals) {
  constexpr std::int64_t lanes = kLanes<T>;
  Sweep<T> sweep{};
  sweep.input_row = plan.row;
  sweep.grad_row = plan.grad_row;
  for (int i = 0; i < plan.kt; ++i) {
    // The vectors of grad whose frames meet one of x.
    const std::int64_t later = i - plan.kt / 2;
    const std::int64_t first = at_least(0, -later) * plan.pitch / lanes;
    const std::int64_t end =
        pieces(at_most(plan.frames, plan.frames - later) * plan.pitch, lanes);
    sweep.count = end - first;
    for (int k = 0; k < plan.kw; ++k) {
      double* of_taps = totals + (i * plan.kw + k) * plan.kh * lanes;
      in_columns(top, bottom, [&](std::int64_t row, int rows) {
        sweep.input = input + (row - top) * plan.row + i * plan.pitch + k + first * lanes;
        sweep.grad = grad + (row - top) * plan.grad_row + first * lanes;
        sweep_rows(plan, sweep, row, rows, of_taps);
      });
    }
  }
}

template <typename T>
void add_channels(const Plan& plan, std::int64_t top, std::int64_t bottom, const T* input,
                  const T* grad, double* totals) {
  constexpr std::int64_t lanes = kLanes<T>;
  Sweep<T> sweep{};
  sweep.input_row = plan.row;
  sweep.grad_row = plan.grad_row;
  in_columns(top, bottom, [&](std::int64_t row, int rows) {
    for (int i = 0; i < plan.kt; ++i) {
      const std::int64_t later = i - plan.kt / 2;
      for (std::int64_t frame = at_least(0, -later);
           frame < at_most(plan.frames, plan.frames - later); ++frame) {
        for (int k = 0; k < plan.kw; ++k) {
          const std::int64_t shift = k - plan.kw / 2;
          const std::int64_t first = at_least(0, -shift);
          sweep.count = at_most(plan.width, plan.width - shift) - first;
          sweep.input = input + (row - top) * plan.row + (frame + later) * plan.pitch +
                        (first + shift) * lanes;
          sweep.grad =
              grad + (row - top) * plan.grad_row + frame * plan.pitch + first * lanes;
          sweep_rows(plan, sweep, row, rows, totals + (i * plan.kw + k) * plan.kh * lanes);
        }
      }
    }
  });
}

template <typename E>
struct GradientJob {
  const RegionArguments& arguments;
  Plan plan;
  double* parts;  // (splits, C, kt, kw, kh): what the tasks found
};

template <typename E>
void add_unit(const GradientJob<E>& job, std::int64_t group, std::int64_t unit,
              const Scratch<Computed<E>>& scratch) {
  typedef Computed<E> T;
  const RegionArguments& arguments = job.arguments;
  const Plan& plan = job.plan;
  const std::int64_t item = unit / plan.segments;
  const std::int64_t top = unit % plan.segments * plan.segment;
  const std::int64_t bottom = at_most(top + plan.segment, plan.height);
  const std::int64_t first = at_least(0, top - plan.kh / 2);
  const std::int64_t last = at_most(plan.height, bottom + plan.kh / 2);
  T* packed = scratch.input + (first - (top - plan.kh / 2)) * plan.row;
  const auto x = part_of(static_cast<const E*>(arguments.x), arguments.x_strides, plan, item, group);
  const auto grad = part_of(static_cast<const E*>(arguments.grad), arguments.grad_strides, plan,
                            item, group);
  if (plan.by_channels) {
    pack_channels(x, plan, first, last, packed, plan.row);
    pack_channels(grad, plan, top, bottom, scratch.other, plan.grad_row);
    add_channels(plan, top, bottom, scratch.input, scratch.other, scratch.totals);
    return;
  }
  const bool finite_x = pack_lines(x, plan, first, last, packed + plan.front, plan.row);
  const bool finite_grad = pack_lines(grad, plan, top, bottom, scratch.other, plan.grad_row);
  const auto add = finite_x && finite_grad ? &add_lines<T> : &correlate_gradient_exactly<T>;
  add(plan, top, bottom, scratch.input, scratch.other, scratch.totals);
}

template <typename E>
void run_gradient(void* context, std::int64_t task, int thread) {
  typedef Computed<E> T;
  constexpr std::int64_t lanes = kLanes<T>;
  const GradientJob<E>& job = *static_cast<const GradientJob<E>*>(context);
  const Plan& plan = job.plan;
  const Scratch<T> scratch(plan, true, static_cast<char*>(job.arguments.workspace), thread);
  const std::int64_t split = task % plan.splits;
  const std::int64_t group = task / plan.splits;
  for (std::int64_t at = 0; at < plan.taps() * lanes; ++at) scratch.totals[at] = 0;
  const std::int64_t end = plan.units() * (split + 1) / plan.splits;
  for (std::int64_t unit = plan.units() * split / plan.splits; unit < end; ++unit) {
    add_unit(job, group, unit, scratch);
  }
  const std::int64_t channel = group * plan.group;
  double* part = job.parts + (split * plan.channels + channel) * plan.taps();
  for (std::int64_t tap = 0; tap < plan.taps(); ++tap) {
    double* total = scratch.totals + tap * lanes;
    if (!plan.by_channels) {
      for (std::int64_t half = lanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) total[lane] += total[lane + half];
      }
    }
    const std::int64_t count = at_most(plan.group, plan.channels - channel);
    for (std::int64_t lane = 0; lane < count; ++lane) part[lane * plan.taps() + tap] = total[lane];
  }
}

// One channel's d_weight, from all parts.
template <typename E>
void run_total(void* context, std::int64_t channel, int) {
  const GradientJob<E>& job = *static_cast<const GradientJob<E>*>(context);
  const Plan& plan = job.plan;
  const std::int64_t* kernel = job.arguments.kernel;
  E* weight =
      static_cast<E*>(job.arguments.d_weight) + channel * kernel[0] * kernel[1] * kernel[2];
  for (std::int64_t tap = 0; tap < kernel[0] * kernel[1] * kernel[2]; ++tap) {
    const std::int64_t i = tap / kernel[2] / kernel[1] - first_tap(kernel[0], plan.kt);
    const std::int64_t j = tap / kernel[2] % kernel[1] - first_tap(kernel[1], plan.kh);
    const std::int64_t k = tap % kernel[2] - first_tap(kernel[2], plan.kw);
    const bool reaches = i >= 0 && i < plan.kt && j >= 0 && j < plan.kh && k >= 0 && k < plan.kw;
    double total = 0;
    for (std::int64_t split = 0; reaches && split < plan.splits; ++split) {
      total += job.parts[(split * plan.channels + channel) * plan.taps() +
                         (i * plan.kw + k) * plan.kh + j];
    }
    weight[tap] = narrow<E>(static_cast<Computed<E>>(total));
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_GRADIENT_H_
