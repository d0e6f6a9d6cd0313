// How region aggregation is cut into tasks, and how a task's numbers lie in its scratch.
#ifndef NLK_CPU_REGION_PLAN_H_
#define NLK_CPU_REGION_PLAN_H_

#include "cpu/simd.h"
#include "nlk/region.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// What packed rows of one tensor may take: with those of the other one of d_weight they stay in
// a second-level cache of 1 MiB.
constexpr std::int64_t kPackedBytes = 448 << 10;
// So many tasks at least, where there are so many rows. The cut, and with it the order of the sums
// of d_weight, depends on the problem alone.
constexpr std::int64_t kTasks = 32;

NLK_INLINE std::int64_t at_least(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
NLK_INLINE std::int64_t at_most(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
NLK_INLINE std::int64_t pieces(std::int64_t whole, std::int64_t piece) {
  return (whole + piece - 1) / piece;
}
NLK_INLINE std::int64_t aligned(std::int64_t bytes) { return (bytes + 63) / 64 * 64; }

// A task computes rows [top, bottom) of all frames of one item, of a group of channels: as many as a
// vector has lanes ("by channels") or a single one ("by lines"). It packs the rows that it reads,
// in what is computed in:
//   by channels: (rows, T, W, lanes), without any padding: taps outside are left out of the loops;
//   by lines   : (rows, line): all frames' rows behind each other, with zeros between and around
//                them, so that a tap's frame and column are one shift along the line. Narrow maps
//                fill vectors so. Zeros would spread a NaN or an infinity of the other factor:
//                channels with such numbers take another path (region_exact.h).
// Rows outside are left out of the loops in both.
struct Plan {
  std::int64_t batch, channels, frames, height, width;
  int kt, kh, kw;                 // the taps that reach a position of x, around the middle
  bool by_channels;
  std::int64_t group, groups;     // channels that are computed together; how many such
  std::int64_t together;          // groups of a task: 16-bit numbers of two share a line of the cache
  std::int64_t step, pitch;       // distances between columns and frames of packed numbers
  std::int64_t front;             // numbers of a line before its first position
  std::int64_t row, grad_row;     // distances between rows of packed x, and of grad and the output
  std::int64_t segment, segments; // rows of a task; how many such
  std::int64_t splits;            // parts of d_weight, summed at the end

  std::int64_t taps() const { return std::int64_t{kt} * kh * kw; }
  std::int64_t tap_lanes() const { return by_channels ? group : 1; }
  std::int64_t teams() const { return (groups + together - 1) / together; }
  std::int64_t tasks() const { return batch * teams() * segments; }
  std::int64_t units() const { return batch * segments; }  // of a group of channels
};

// The taps of one axis that reach a position: at most so many on either side as it has others.
NLK_INLINE int reaching(std::int64_t taps, std::int64_t positions) {
  return static_cast<int>(at_most(taps, 2 * positions - 1));
}

template <typename E>
Plan plan_of(const RegionArguments& arguments) {
  typedef Computed<E> T;
  constexpr std::int64_t lanes = kLanes<T>;
  Plan plan{};
  plan.batch = arguments.sizes[0];
  plan.channels = arguments.sizes[1];
  plan.frames = arguments.sizes[2];
  plan.height = arguments.sizes[3];
  plan.width = arguments.sizes[4];
  plan.kt = reaching(arguments.kernel[0], plan.frames);
  plan.kh = reaching(arguments.kernel[1], plan.height);
  plan.kw = reaching(arguments.kernel[2], plan.width);

  const std::int64_t pitch = plan.width + plan.kw / 2;
  const std::int64_t vectors = pieces(plan.frames * pitch, lanes);
  // Vectors for each channel and row, where a number that is gathered counts four times.
  const double by_lines = vectors * (arguments.x_strides[4] == 1 ? 1.0 : 1.5);
  const double by_channels = static_cast<double>(pieces(plan.channels, lanes)) / plan.channels *
                             plan.frames * plan.width *
                             (arguments.x_strides[1] == 1 ? 1.0 : 1.5);
  plan.by_channels = by_channels < by_lines;
  plan.group = plan.by_channels ? lanes : 1;
  plan.groups = pieces(plan.channels, plan.group);
  plan.together = plan.by_channels ? sizeof(T) / sizeof(E) : 1;
  if (plan.by_channels) {
    plan.step = lanes;
    plan.pitch = plan.width * lanes;
    // A line more, lest rows below each other fall into one set of the cache.
    plan.row = plan.grad_row = (plan.frames * plan.width + 1) * lanes;
  } else {
    plan.step = 1;
    plan.pitch = pitch;
    plan.front = plan.kt / 2 * pitch + plan.kw / 2;
    // A row is written in whole vectors, and read up to the last shift of the last vector.
    plan.grad_row = (vectors + 1) * lanes;
    plan.row = plan.grad_row + 2 * plan.front;
  }

  const std::int64_t fitting = kPackedBytes / static_cast<std::int64_t>(sizeof(T)) / plan.row;
  const std::int64_t wanted = pieces(kTasks, plan.batch * plan.teams());
  plan.segments = at_least(pieces(plan.height, at_least(fitting, kTallest)),
                           at_most(wanted, pieces(plan.height, 4)));
  plan.segment = pieces(plan.height, plan.segments);
  plan.segments = pieces(plan.height, plan.segment);
  plan.splits = at_most(plan.units(), pieces(kTasks, plan.groups));
  return plan;
}

// A thread's scratch, one after the other, each aligned to a line of the cache.
template <typename T>
struct Scratch {
  T* input;         // packed rows of x, or of grad where d_x is computed
  T* other;         // packed rows of grad for d_weight, else of the output (by lines)
  T* taps;          // packed taps, (kt, kw, kh, lanes) or (kt, kw, kh)
  double* totals;   // (kt, kw, kh, lanes) for d_weight

  static std::int64_t input_bytes(const Plan& plan) {
    return aligned((plan.segment + plan.kh - 1) * plan.row * sizeof(T));
  }
  static std::int64_t other_bytes(const Plan& plan) {
    return aligned(plan.segment * plan.grad_row * sizeof(T));
  }
  static std::int64_t taps_bytes(const Plan& plan) {
    return aligned(plan.taps() * plan.tap_lanes() * sizeof(T));
  }
  static std::int64_t totals_bytes(const Plan& plan) {
    return aligned(plan.taps() * kLanes<T> * sizeof(double));
  }
  static std::int64_t bytes(const Plan& plan, bool gradient) {
    return input_bytes(plan) + other_bytes(plan) +
           (gradient ? totals_bytes(plan) : taps_bytes(plan));
  }

  // That of `thread`, from the beginning of the workspace on.
  Scratch(const Plan& plan, bool gradient, char* workspace, int thread) {
    char* own = workspace + thread * bytes(plan, gradient);
    input = reinterpret_cast<T*>(own);
    other = reinterpret_cast<T*>(own + input_bytes(plan));
    char* rest = own + input_bytes(plan) + other_bytes(plan);
    taps = reinterpret_cast<T*>(rest);
    totals = reinterpret_cast<double*>(rest);
  }
};

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_REGION_PLAN_H_
