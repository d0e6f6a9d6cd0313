// The tiles of the CUDA kernels of region aggregation and of context pooling: every number of a result
// is some thread's, none two threads' or outside of its box, and lanes read from different banks.
#include <cstdio>
#include <set>
#include <vector>

#include "cuda/gate_tile.h"
#include "cuda/region_tile.h"

namespace {

using namespace nlk::cuda;

int wrong = 0;

void expect(bool holds, const char* what, long long a = 0, long long b = 0) {
  if (holds) return;
  ++wrong;
  std::printf("wrong: %s (%lld, %lld)\n", what, a, b);
}

// Every number of the box without halo is one thread's.
void check_cover(const Threads& threads, int rows) {
  const Box out = box_of(threads, 1, rows, 0, 0, 0);
  std::set<int> seen;
  for (int thread = 0; thread < threads.count(); ++thread) {
    expect(threads.channel(thread) < threads.channels, "channel", thread);
    for (int row = threads.row(thread); row < rows; row += threads.rows) {
      for (int i = 0; i < kWide; ++i) {
        const int at = out.at(threads.channel(thread), 0, row, threads.column(thread) + i);
        expect(at >= 0 && at < out.size(), "inside", thread, at);
        expect(seen.insert(at).second, "one thread's", thread, at);
      }
    }
  }
  const int numbers = threads.channels * rows * threads.across * kWide;
  expect(static_cast<int>(seen.size()) == numbers, "all covered", seen.size(), numbers);
}

// The lanes of a warp read different banks, or the same number.
void check_banks(const Threads& threads, const Box& box) {
  for (int first = 0; first < threads.count(); first += kWarpLanes) {
    std::vector<std::set<int>> banks(32);
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int thread = first + lane;
      const int at =
          box.at(threads.channel(thread), 0, threads.row(thread), threads.column(thread));
      banks[at % 32].insert(at);
    }
    for (int bank = 0; bank < 32; ++bank) expect(banks[bank].size() <= 1, "banks", first, bank);
  }
}

void check_box(const Threads& threads, int frames, int rows, int kt, int kh, int kw) {
  const Box in = box_of(threads, frames, rows, kt - 1, kh - 1, kw - 1);
  const Box out = box_of(threads, frames, rows, 0, 0, 0);
  check_banks(threads, in);
  check_banks(threads, out);
  // What the last thread reads lies in the box; rows and channels do not overlap.
  expect(in.pitch >= in.columns && out.pitch >= out.columns, "rows apart", in.pitch);
  expect(in.channel_pitch >= in.frames * in.rows * in.pitch, "channels apart", in.channel_pitch);
  const int last = in.at(threads.channels - 1, in.frames - 1, rows - 1 + kh - 1,
                         (threads.across - 1) * kWide + kWide + kw - 2);
  expect(last < in.size(), "last number", last, in.size());
}

void check_region() {
  const RegionTile tiles[] = {kChannelsTile, kNarrowTile, kMiddleTile, kWideTile};
  const WeightTile weights[] = {kChannelsWeightTile, kNarrowWeightTile, kMiddleWeightTile,
                                kWideWeightTile};
  for (const auto& tile : tiles) {
    check_cover(tile.threads, tile.threads.rows);
    for (const int size : {3, 7}) {
      check_box(tile.threads, tile.frames, tile.threads.rows, 3, size, size);
    }
  }
  for (const auto& tile : weights) {
    expect(tile.lanes.count() == kWarpLanes, "lanes", tile.lanes.count());
    check_cover(tile.lanes, tile.rows);
    for (const int size : {3, 7}) check_box(tile.lanes, tile.frames, tile.rows, 3, size, size);
  }
  for (const auto& threads : {kAnyThreads, kAnyChannels}) {
    check_cover(threads, threads.rows);
    for (int kh = 1; kh <= 15; kh += 2)
      for (int kw = 1; kw <= 15; kw += 2) check_box(threads, 1, threads.rows, 1, kh, kw);
  }
  // The frames of the published blocks fill their tiles.
  expect(region_width(28, 28, 7, 7, 147) == 2, "28 is wide");
  expect(region_width(14, 14, 7, 7, 147) == 1, "14 is middle");
  expect(region_width(7, 7, 7, 7, 147) == 0, "7 is narrow");
}

// Parts, or splits, hold every tile once, and none is empty.
template <typename Shares>
void check_shares(const Shares& shares, long long tiles) {
  expect(shares.count * shares.tiles >= tiles, "all tiles", tiles);
  expect((shares.count - 1) * shares.tiles < tiles, "none empty", tiles, shares.count);
}

void check_gate() {
  for (const int lanes : {8, 16, 32}) {
    std::set<int> slots;
    for (int lane = 0; lane < lanes; ++lane)
      for (int i = 0; i < kGateHeld / lanes; ++i) slots.insert(gate_slot(lane, lanes) + i);
    expect(static_cast<int>(slots.size()) == kGateHeld && *slots.rbegin() == kGateHeld - 1, "slots");
  }
  for (int channels = 1; channels <= 2048; ++channels) {
    const int positions = gate_positions(channels), threads = gate_threads(channels, positions);
    expect(threads % 32 == 0 && threads <= kGateThreads, "threads", channels, threads);
    expect(threads / positions * kGateHeld >= channels, "room for channels", channels, threads);
    const int others = gate_threads_of_channels(channels);
    expect(others % 32 == 0 && others <= kGateThreads, "threads of channels", channels, others);
    expect(others * kGateSlots >= channels, "room in slots", channels, others);
  }
}

}  // namespace

int main() {
  check_region();
  check_gate();
  for (long long groups : {1, 3, 17, 600, 1024, 5000}) {
    for (long long tiles = 1; tiles < 3000; tiles += tiles < 40 ? 1 : 37) {
      check_shares(region_parts(groups, tiles), tiles);
      check_shares(gate_splits_of(groups, tiles), tiles);
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
