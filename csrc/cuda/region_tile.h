// Where the numbers of region aggregation's tiles lie in shared memory, and which thread sums what.
// Formulas only: the kernels use them, and tests try them on the CPU.
//
// A thread sums kWide neighbours along W in `frames` frames. Its row of inputs, kWide + kw - 1
// numbers in registers, serves kWide * kw products for each frame. kWide is odd, and a row's pitch is
// an odd multiple of the threads beside each other in it: a warp's lanes read from 32 banks.
#ifndef NLK_CUDA_REGION_TILE_H_
#define NLK_CUDA_REGION_TILE_H_

#include <cstdint>

#ifdef __CUDACC__
#define NLK_BOTH __host__ __device__
#else
#define NLK_BOTH
#endif

namespace nlk::cuda {

constexpr int kWide = 7;
constexpr int kWarpLanes = 32;

NLK_BOTH constexpr int divide_up(int value, int step) { return (value + step - 1) / step; }
NLK_BOTH constexpr std::int64_t divide_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step;
}
NLK_BOTH constexpr int least_of(int a, int b) { return a < b ? a : b; }

// The least number of at least `size` that is an odd multiple of `unit`, a power of two.
NLK_BOTH constexpr int odd_multiple(int size, int unit) {
  const int times = divide_up(size, unit);
  return (times % 2 == 1 ? times : times + 1) * unit;
}

// A box of shared memory: numbers of some channels, frames, rows and columns.
struct Box {
  int channels, frames, rows, columns;
  int pitch, channel_pitch;  // from a row to the next, from a channel to the next

  NLK_BOTH constexpr int size() const { return channels * channel_pitch; }
  NLK_BOTH constexpr int at(int channel, int frame, int row, int column) const {
    return channel * channel_pitch + (frame * rows + row) * pitch + column;
  }
};

// The threads of a block: `across` beside each other in a row, `rows`, `channels`. Neighbouring lanes
// hold neighbouring channels where `last`, else neighbouring columns.
struct Threads {
  int across, rows, channels;
  bool last;

  NLK_BOTH constexpr int count() const { return across * rows * channels; }
  NLK_BOTH constexpr int channel(int thread) const {
    return last ? thread % channels : thread / (across * rows);
  }
  NLK_BOTH constexpr int place(int thread) const { return last ? thread / channels : thread % (across * rows); }
  NLK_BOTH constexpr int column(int thread) const { return place(thread) % across * kWide; }
  NLK_BOTH constexpr int row(int thread) const { return place(thread) / across; }
  // Lanes of a warp that share a channel.
  NLK_BOTH constexpr int lanes_of_channel() const {
    return last ? kWarpLanes / least_of(channels, kWarpLanes) : least_of(across * rows, kWarpLanes);
  }
};

// The box of what `threads` sum in `frames` frames, with the rows of `high` passes over it, and
// `around` it what a kernel reaches: kt - 1, kh - 1, kw - 1, or nothing.
NLK_BOTH constexpr Box box_of(Threads threads, int frames, int rows, int around_t, int around_h,
                              int around_w) {
  Box box = {threads.channels, frames + around_t, rows + around_h,
             threads.across * kWide + around_w, 0, 0};
  box.pitch = odd_multiple(box.columns, threads.across);
  const int size = box.frames * box.rows * box.pitch, lanes = threads.lanes_of_channel();
  box.channel_pitch = lanes == kWarpLanes ? size : odd_multiple(size, lanes);
  return box;
}

// A tile of the kernels made for one size of the kernel: `threads` sum `frames` frames.
struct RegionTile {
  Threads threads;
  int frames;
};

// Channels beside each other in memory, or columns of frames that are at most 7, 14 or more wide.
constexpr RegionTile kChannelsTile = {{1, 8, 16, true}, 2};
constexpr RegionTile kNarrowTile = {{1, 8, 8, false}, 4};
constexpr RegionTile kMiddleTile = {{2, 16, 4, false}, 4};
constexpr RegionTile kWideTile = {{4, 32, 1, false}, 4};

// For the weight's gradient a warp sums the taps of one row of the kernel, and takes `rows` of its
// tile in passes; these are the threads of a warp.
struct WeightTile {
  Threads lanes;
  int frames, rows;
};
constexpr WeightTile kChannelsWeightTile = {{1, 2, 16, true}, 2, 8};
constexpr WeightTile kNarrowWeightTile = {{1, 8, 4, false}, 4, 8};
constexpr WeightTile kMiddleWeightTile = {{2, 16, 1, false}, 4, 16};
constexpr WeightTile kWideWeightTile = {{4, 8, 1, false}, 4, 32};

// The kernels for any size of the kernel: one frame of x at a time.
constexpr Threads kAnyThreads = {2, 16, 4, false};
constexpr Threads kAnyChannels = {1, 8, 16, true};

// Cost of covering frames of (height, width) with tiles, in instructions of a thread: products, and
// about twelve for each number that is brought to shared memory.
constexpr std::int64_t region_cost(std::int64_t height, std::int64_t width, int rows, int across,
                                   int kh, int kw, int taps) {
  const std::int64_t tiles = divide_up(height, static_cast<std::int64_t>(rows)) *
                             divide_up(width, static_cast<std::int64_t>(across * kWide));
  const std::int64_t products = std::int64_t{rows} * across * kWide * taps;
  const std::int64_t loads = std::int64_t{rows + kh - 1} * (across * kWide + kw - 1);
  return tiles * (products + 18 * loads);
}

// Which of narrow (0), middle (1) and wide (2) costs least; the larger where they are equal.
constexpr int region_width(std::int64_t height, std::int64_t width, int kh, int kw, int taps) {
  const std::int64_t narrow = region_cost(height, width, 8, 1, kh, kw, taps);
  const std::int64_t middle = region_cost(height, width, 16, 2, kh, kw, taps);
  const std::int64_t wide = region_cost(height, width, 32, 4, kh, kw, taps);
  if (wide <= middle && wide <= narrow) return 2;
  return middle <= narrow ? 1 : 0;
}

// Tiles of a tensor: channels in groups, and positions.
struct Tiling {
  std::int64_t groups, t, h, w;

  NLK_BOTH constexpr std::int64_t positions() const { return t * h * w; }
};

constexpr Tiling tiling_of(const std::int64_t* sizes, int channels, int frames, int rows,
                           int columns) {
  return {divide_up(sizes[1], std::int64_t{channels}), divide_up(sizes[2], std::int64_t{frames}),
          divide_up(sizes[3], std::int64_t{rows}), divide_up(sizes[4], std::int64_t{columns})};
}

// Into how many parts the tiles of each group of channels are shared out for the weight's gradient.
// About eight blocks for each of the largest GPUs' multiprocessors.
constexpr std::int64_t kRegionBlocks = 1024;
struct Parts {
  std::int64_t count, tiles;  // of each
};
constexpr Parts region_parts(std::int64_t groups, std::int64_t tiles) {
  const std::int64_t wanted = kRegionBlocks / groups > 1 ? kRegionBlocks / groups : 1;
  const std::int64_t each = divide_up(tiles, tiles < wanted ? tiles : wanted);
  return {divide_up(tiles, each), each};
}

}  // namespace nlk::cuda

#endif  // NLK_CUDA_REGION_TILE_H_
