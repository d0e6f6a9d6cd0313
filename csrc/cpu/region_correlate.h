// Region aggregation, and the gradient of x: the aggregation of grad with flipped taps. A task
// computes some rows of one item and one group of channels.
#ifndef NLK_CPU_REGION_CORRELATE_H_
#define NLK_CPU_REGION_CORRELATE_H_

#include "cpu/region_columns.h"
#include "cpu/region_exact.h"
#include "cpu/region_pack.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// The taps [first, end) of an axis that are inside for one of the positions [low, high] at least.
struct Reach {
  int first, end;
  bool operator==(const Reach& other) const { return first == other.first && end == other.end; }
};
NLK_INLINE Reach reach(int taps, std::int64_t low, std::int64_t high, std::int64_t positions) {
  const std::int64_t middle = taps / 2;
  return Reach{static_cast<int>(at_least(0, middle - high)),
               static_cast<int>(at_most(taps, positions + middle - low))};
}

// Columns of `rows` rows from `top` on; `window` lacks what depends on the rows of the kernel.
template <typename T, bool kVectorTaps>
NLK_INLINE void correlate_rows(const Plan& plan, Window<T> window, std::int64_t top, int rows) {
  const T* input = window.input;
  const T* taps = window.taps;
  in_groups_of_taps(plan.kh, NLK_EACH_GROUP(held, first) {
    constexpr int count = decltype(held)::value;
    window.input = input + first * window.row;
    window.taps = taps + first * plan.tap_lanes();
    window.inside = rows_inside(top + first - plan.kh / 2, rows + count - 1, plan.height);
    kCorrelate<T, count, kVectorTaps>[rows - 1](window, first == 0);
  });
}

// Rows [top, bottom) from packed rows from top - kh/2 on.
template <typename T>
void correlate_lines(const Plan& plan, std::int64_t top, std::int64_t bottom, const T* input,
                     const T* taps, T* sums) {
  constexpr std::int64_t lanes = kLanes<T>;
  Window<T> window{};
  window.row = plan.row;
  window.frame = plan.pitch;
  window.step = 1;
  window.taps_step = plan.kh;
  window.taps_frame = std::int64_t{plan.kw} * plan.kh;
  window.columns = plan.kw;
  window.sums_row = plan.grad_row;
  window.sums_step = lanes;
  const std::int64_t vectors = pieces(plan.frames * plan.pitch, lanes);
  const auto frames_of = [&](std::int64_t vector) {
    const std::int64_t last = (vector * lanes + lanes - 1) / plan.pitch;
    return reach(plan.kt, vector * lanes / plan.pitch, at_most(plan.frames - 1, last), plan.frames);
  };
  for (std::int64_t vector = 0; vector < vectors; vector += window.count) {
    const Reach frames = frames_of(vector);
    window.frames = frames.end - frames.first;
    window.count = 1;
    while (vector + window.count < vectors && frames_of(vector + window.count) == frames) {
      ++window.count;
    }
    window.taps = taps + frames.first * window.taps_frame;
    in_columns(top, bottom, [&](std::int64_t row, int rows) {
      window.input =
          input + (row - top) * plan.row + vector * lanes + frames.first * plan.pitch;
      window.sums = sums + (row - top) * plan.grad_row + vector * lanes;
      correlate_rows<T, false>(plan, window, row, rows);
    });
  }
}

// Columns whose sums wait for being written.
constexpr int kWaiting = 8;

// The same by channels, written to `out`.
template <typename E, typename T>
void correlate_channels(const Plan& plan, std::int64_t top, std::int64_t bottom, const T* input,
                        const T* taps, const Part<E>& out) {
  constexpr std::int64_t lanes = kLanes<T>;
  T sums[kWaiting * kTallest * lanes];
  Window<T> window{};
  window.row = plan.row;
  window.frame = plan.pitch;
  window.step = lanes;
  window.taps_step = plan.kh * lanes;
  window.taps_frame = plan.kw * window.taps_step;
  window.sums = sums;
  window.sums_row = lanes;
  window.sums_step = kTallest * lanes;
  in_columns(top, bottom, [&](std::int64_t row, int rows) {
    for (std::int64_t frame = 0; frame < plan.frames; ++frame) {
      const Reach frames = reach(plan.kt, frame, frame, plan.frames);
      window.frames = frames.end - frames.first;
      const T* input_row =
          input + (row - top) * plan.row + (frame + frames.first - plan.kt / 2) * plan.pitch;
      for (std::int64_t column = 0; column < plan.width; column += window.count) {
        const Reach columns = reach(plan.kw, column, column, plan.width);
        // Beside the borders every tap is inside.
        const std::int64_t same = columns.end - columns.first < plan.kw
                                      ? 1
                                      : plan.width - plan.kw / 2 - column;
        window.count = at_most(same, kWaiting);
        window.columns = columns.end - columns.first;
        window.input = input_row + (column + columns.first - plan.kw / 2) * lanes;
        window.taps =
            taps + frames.first * window.taps_frame + columns.first * window.taps_step;
        E* corner = out.at(frame, row) + column * out.strides[4];
        // What is about to be written is far from each other.
        for (int r = 0; r < rows; ++r) {
          for (std::int64_t beside = 0; beside < window.count; ++beside) {
            __builtin_prefetch(corner + r * out.strides[3] + beside * out.strides[4], 1);
          }
        }
        correlate_rows<T, true>(plan, window, row, rows);
        for (int r = 0; r < rows; ++r) {
          E* to = corner + r * out.strides[3];
          for (std::int64_t beside = 0; beside < window.count; ++beside) {
            unpack_channels(sums + (beside * kTallest + r) * lanes, out,
                            to + beside * out.strides[4]);
          }
        }
      }
    }
  });
}

template <typename E>
struct CorrelateJob {
  const RegionArguments& arguments;
  Plan plan;
  const E* input;  // x or grad
  const std::int64_t* input_strides;
  bool flip;
};

template <typename E>
void correlate_group(const CorrelateJob<E>& job, std::int64_t item, std::int64_t group,
                     std::int64_t segment, const Scratch<Computed<E>>& scratch) {
  typedef Computed<E> T;
  const Plan& plan = job.plan;
  const std::int64_t top = segment * plan.segment;
  const std::int64_t bottom = at_most(top + plan.segment, plan.height);
  const std::int64_t first = at_least(0, top - plan.kh / 2);
  const std::int64_t last = at_most(plan.height, bottom + plan.kh / 2);
  T* packed = scratch.input + (first - (top - plan.kh / 2)) * plan.row;
  const auto from = part_of(job.input, job.input_strides, plan, item, group);
  const auto out = part_of(static_cast<E*>(job.arguments.out), job.arguments.out_strides, plan,
                           item, group);
  const bool finite = pack_taps<E>(job.arguments, plan, group, job.flip, scratch.taps);
  if (plan.by_channels) {
    pack_channels(from, plan, first, last, packed, plan.row);
    correlate_channels(plan, top, bottom, scratch.input, scratch.taps, out);
    return;
  }
  pack_lines(from, plan, first, last, packed + plan.front, plan.row);
  const auto correlate = finite ? &correlate_lines<T> : &correlate_exactly<T>;
  correlate(plan, top, bottom, scratch.input, scratch.taps, scratch.other);
  unpack_lines(scratch.other, plan.grad_row, plan, top, bottom, out);
}

template <typename E>
void run_correlate(void* context, std::int64_t task, int thread) {
  const CorrelateJob<E>& job = *static_cast<const CorrelateJob<E>*>(context);
  const Plan& plan = job.plan;
  const Scratch<Computed<E>> scratch(plan, false, static_cast<char*>(job.arguments.workspace),
                                     thread);
  const std::int64_t segment = task % plan.segments;
  const std::int64_t first = task / plan.segments % plan.teams() * plan.together;
  const std::int64_t item = task / plan.segments / plan.teams();
  for (std::int64_t group = first; group < at_most(first + plan.together, plan.groups); ++group) {
    correlate_group(job, item, group, segment, scratch);
  }
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_CORRELATE_H_
