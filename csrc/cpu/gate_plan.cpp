#include "cpu/gate_plan.h"

#include <algorithm>

namespace nlk {
namespace {

constexpr std::int64_t kAlignment = 64;
constexpr std::int64_t kVectorBytes = 64;  // the longest
// A tile is read twice, the second time from the cache.
constexpr std::int64_t kTileBytes = std::int64_t{256} << 10;
constexpr std::int64_t kSplitBytes = std::int64_t{1} << 20;
constexpr std::int64_t kMostSplits = 128;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Takes so many bytes and returns where they begin.
std::int64_t take(std::int64_t& bytes, std::int64_t size) {
  const std::int64_t begin = bytes;
  bytes += round_up(size, kAlignment);
  return begin;
}

// Axes that follow each other without a gap become one.
GateAxes axes_of(const std::int64_t* sizes, const std::int64_t* strides) {
  std::int64_t size[3] = {1, 1, 1}, step[3] = {0, 0, 0};
  int count = 0;  // of axes so far, innermost first
  for (int axis = 2; axis >= 0; --axis) {
    if (sizes[axis] == 1) continue;
    if (count > 0 && strides[axis] == size[count - 1] * step[count - 1]) {
      size[count - 1] *= sizes[axis];
      continue;
    }
    size[count] = sizes[axis];
    step[count] = strides[axis];
    ++count;
  }
  if (count == 0) step[0] = 1;
  return GateAxes{size[0], step[0], size[1], step[1], step[2]};
}

std::int64_t item_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace

GatePlan gate_plan(const GateArguments& arguments, bool backward) noexcept {
  GatePlan plan = {};
  const std::int64_t channels = arguments.channels, size = item_size(arguments.dtype);
  plan.positions = arguments.positions[0] * arguments.positions[1] * arguments.positions[2];
  plan.x = axes_of(arguments.positions, arguments.x_strides + 2);
  plan.d_x = axes_of(arguments.positions, arguments.d_x_strides + 2);
  plan.layout = plan.x.step == 1 && plan.x.run >= kGatePadding ? GateLayout::kPositions
                : arguments.x_strides[1] == 1                  ? GateLayout::kChannels
                                                               : GateLayout::kPacked;
  const std::int64_t run = plan.layout == GateLayout::kPositions ? plan.x.run : plan.positions;
  const std::int64_t most = std::clamp(kTileBytes / (channels * size), kGatePadding, kGateTile);
  plan.tiles_per_run = ceil_div(run, most);
  // Of about equal size; whole cache lines where there are several.
  plan.tile = std::min(run, round_up(ceil_div(run, plan.tiles_per_run), kGatePadding));
  plan.tiles_per_run = ceil_div(run, plan.tile);
  plan.tiles = plan.positions / run * plan.tiles_per_run;
  plan.tiles_per_split = std::max(ceil_div(kSplitBytes, plan.tile * channels * size),
                                  ceil_div(plan.tiles, kMostSplits));
  plan.splits = ceil_div(plan.tiles, plan.tiles_per_split);
  plan.number = size == 2 ? 4 : 8;
  plan.unit = 1.0;
  for (std::int64_t left = plan.positions; left > 0; left >>= 1) plan.unit /= 2;

  const std::int64_t batch = arguments.batch, stats = static_cast<std::int64_t>(sizeof(GateStats));
  std::int64_t bytes = 0;
  plan.parts = take(bytes, batch * plan.splits * channels * plan.number);
  plan.part_stats = take(bytes, batch * plan.splits * stats);
  plan.stats = take(bytes, backward ? batch * stats : 0);
  plan.d_weights = take(bytes, backward ? batch * channels * 8 : 0);
  plan.scores = take(bytes, backward ? 2 * batch * plan.positions * plan.number : 0);
  std::int64_t scratch = 0;
  plan.factors = take(scratch, 2 * channels * plan.number);
  plan.lanes = take(scratch, plan.layout == GateLayout::kChannels ? channels * plan.number
                                                                  : channels * kVectorBytes);
  const std::int64_t packed = channels * (plan.tile + kGatePadding) * size;
  plan.packed = take(scratch, plan.layout == GateLayout::kPacked ? packed : 0);
  plan.scratch_bytes = scratch;
  plan.scratch = take(bytes, arguments.threads * scratch);
  plan.bytes = bytes;
  return plan;
}

std::int64_t gate_workspace(const GateArguments& arguments, bool backward) noexcept {
  return gate_plan(arguments, backward).bytes;
}

}  // namespace nlk
