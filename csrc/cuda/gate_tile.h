// Which thread of context pooling's reading kernels holds what. Formulas only, for the kernels and
// for the tests on the CPU.
//
// A block holds a tile of x in registers, all channels of it, kGateHeld numbers a thread. Where
// positions are neighbours, kPositions lanes beside each other hold those of a tile, and groups of
// them the channels; where channels are, a lane holds kGateTogether positions of kGateSlots channels.
#ifndef NLK_CUDA_GATE_TILE_H_
#define NLK_CUDA_GATE_TILE_H_

#include <cstdint>

#ifdef __CUDACC__
#define NLK_BOTH __host__ __device__
#else
#define NLK_BOTH
#endif

namespace nlk::cuda {

constexpr int kGateHeld = 32;
constexpr int kGateTogether = 8;
constexpr int kGateSlots = kGateHeld / kGateTogether;
constexpr int kGateThreads = 512;  // of the largest block

// Positions of a tile where they are neighbours: as many as leave room for all channels.
constexpr int gate_positions(std::int64_t channels) {
  return channels <= 512 ? 32 : channels <= 1024 ? 16 : 8;
}
// Whole warps that hold all channels of a tile.
constexpr int gate_threads(std::int64_t channels, int positions) {
  const std::int64_t lanes = (channels + kGateHeld - 1) / kGateHeld * positions;
  return static_cast<int>((lanes + 31) / 32 * 32);
}
constexpr int gate_threads_of_channels(std::int64_t channels) {
  const std::int64_t lanes = (channels + kGateSlots - 1) / kGateSlots;
  return static_cast<int>((lanes + 31) / 32 * 32);
}

// The first of the slots whose sums over `lanes` lanes a lane has in the end.
NLK_BOTH constexpr int gate_slot(int lane, int lanes) { return lane % lanes * (kGateHeld / lanes); }

// Splits of an item: about four blocks for each of the largest GPUs' multiprocessors, or one for each
// tile.
constexpr std::int64_t kGateBlocks = 512;
struct GateSplits {
  std::int64_t count, tiles;  // of each
};
constexpr GateSplits gate_splits_of(std::int64_t batch, std::int64_t tiles) {
  const std::int64_t wanted = kGateBlocks / batch > 1 ? kGateBlocks / batch : 1;
  const std::int64_t splits = tiles < wanted ? tiles : wanted;
  const std::int64_t each = (tiles + splits - 1) / splits;
  return {(tiles + each - 1) / each, each};
}

}  // namespace nlk::cuda

#endif  // NLK_CUDA_GATE_TILE_H_
