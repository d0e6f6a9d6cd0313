// How context pooling cuts its positions into tiles, and its workspace. Compiled once for all
// instruction sets; nothing here depends on the batch or the threads but the workspace's size.
#ifndef NLK_CPU_GATE_PLAN_H_
#define NLK_CPU_GATE_PLAN_H_

#include <cstdint>

#include "nlk/gate.h"

namespace nlk {

// More positions than a vector of any instruction set has lanes.
constexpr std::int64_t kGatePadding = 16;
constexpr std::int64_t kGateTile = 256;  // most positions of a tile

// Positions in their order: runs of neighbours at one distance, in two outer axes.
struct GateAxes {
  std::int64_t run, step;             // positions of a run, and from one to the next
  std::int64_t middle, middle_step;   // runs of the middle axis
  std::int64_t outer_step;
};

enum class GateLayout : int {
  kPositions,  // the positions of a run are neighbours in memory; a tile lies in one run
  kChannels,   // the channels of a position are
  kPacked,     // neither: a tile is copied
};

// Sums of a split: the largest logit, and with that subtracted, of the shares and of shares times u.
struct GateStats {
  double top, total, error;
};

struct GatePlan {
  std::int64_t positions;  // of an item
  GateAxes x, d_x;
  GateLayout layout;
  std::int64_t tile, tiles_per_run, tiles, tiles_per_split, splits;
  std::int64_t number;  // bytes of a number as it is summed: 8, but 4 for 16-bit dtypes
  double unit;          // a power of two: so many shares of at most 1 sum to less than 1
  // Where things begin in the workspace, in bytes.
  std::int64_t parts;       // number [batch][splits][channels]
  std::int64_t part_stats;  // GateStats [batch][splits]
  std::int64_t stats;       // GateStats [batch]; the others of the backward
  std::int64_t d_weights;   // double [batch][channels]
  std::int64_t scores;      // number [batch][2][positions]: logits, u
  std::int64_t scratch, scratch_bytes;  // of each thread
  std::int64_t factors, lanes, packed;  // in that: number [2][channels], [channels][vector], a tile
  std::int64_t bytes;
};

GatePlan gate_plan(const GateArguments& arguments, bool backward) noexcept;

}  // namespace nlk

#endif  // NLK_CPU_GATE_PLAN_H_
