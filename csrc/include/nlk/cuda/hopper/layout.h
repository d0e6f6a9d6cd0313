// Where numbers lie on Hopper: swizzled tiles, wgmma descriptors and fragments, rings of slots.
// Formulas only, for kernels and for the tests that try every one of them on the CPU. Sources: the
// PTX ISA's chapters on wgmma and on tensor copies.
#ifndef NLK_CUDA_HOPPER_LAYOUT_H_
#define NLK_CUDA_HOPPER_LAYOUT_H_

#include <cstdint>

#ifdef __CUDACC__
#define NLK_HOST_DEVICE __host__ __device__
#else
#define NLK_HOST_DEVICE
#endif

namespace nlk::cuda::hopper {

// A chunk is `rows` lines of 128 bytes: 64 numbers of 16 bits. Eight lines are one swizzle atom, and
// chunks begin at multiples of it.
constexpr int kLineBytes = 128;
constexpr int kLineNumbers = 64;
constexpr int kAtomBytes = 8 * kLineBytes;
constexpr int kWarpgroup = 128;

NLK_HOST_DEVICE constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }
NLK_HOST_DEVICE constexpr int divide_up(int value, int step) { return (value + step - 1) / step; }

// The 128-byte swizzle: 16-byte units of a line change places by the line's number within its atom.
NLK_HOST_DEVICE constexpr std::uint32_t swizzle(std::uint32_t address) {
  return address ^ ((address >> 7 & 7) << 4);
}

// Where a tensor copy puts byte `byte` of line `line` of a box.
NLK_HOST_DEVICE constexpr std::uint32_t in_chunk(int line, int byte) {
  return swizzle(static_cast<std::uint32_t>(line * kLineBytes + byte));
}

// Descriptor of an operand in shared memory with the 128-byte swizzle. `stride`: bytes from eight
// lines to the next eight. `leading`: bytes from 64 rows (columns, of B) to the next 64 where lines
// run along them ("transposed"); the hardware ignores it where lines run along the summed index.
NLK_HOST_DEVICE constexpr std::uint64_t descriptor(std::uint32_t start, std::uint32_t leading,
                                                   std::uint32_t stride = kAtomBytes) {
  return static_cast<std::uint64_t>(start >> 4 & 0x3fff) |
         static_cast<std::uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<std::uint64_t>(stride >> 4 & 0x3fff) << 32 | std::uint64_t{1} << 62;
}

// What moving on by 16 summed indices adds to a descriptor: 32 bytes along the lines, or 16 lines.
NLK_HOST_DEVICE constexpr std::uint64_t descriptor_step(bool transposed, int steps) {
  return static_cast<std::uint64_t>(steps * (transposed ? 2 * kAtomBytes : 32) >> 4);
}

// The address that wgmma reads for element (outer, summed) of an operand: outer is the row of A or
// the column of B, summed < 16.
NLK_HOST_DEVICE constexpr std::uint32_t operand_address(std::uint64_t desc, bool transposed, int outer,
                                                        int summed) {
  const auto start = static_cast<std::uint32_t>(desc & 0x3fff) << 4;
  const auto leading = static_cast<std::uint32_t>(desc >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<std::uint32_t>(desc >> 32 & 0x3fff) << 4;
  const auto o = static_cast<std::uint32_t>(outer), s = static_cast<std::uint32_t>(summed);
  return swizzle(transposed
                     ? start + o / 64 * leading + o % 64 * 2 + s / 8 * stride + s % 8 * kLineBytes
                     : start + o / 8 * stride + o % 8 * kLineBytes + s * 2);
}

// Accumulator number i of a thread of the warpgroup is element (row, column) of the 64 x N product.
NLK_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
NLK_HOST_DEVICE constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// Number h (0: low half) of register r of A is element (row, summed) of its 64 x 16.
NLK_HOST_DEVICE constexpr int operand_row(int thread, int r) {
  return thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
}
NLK_HOST_DEVICE constexpr int operand_column(int thread, int r, int h) {
  return r / 2 * 8 + thread % 4 * 2 + h;
}

// Hence register r of step k of A, made of a product's accumulators, holds numbers
// operand_source(k, r) and the next: no number changes its thread.
NLK_HOST_DEVICE constexpr int operand_source(int k, int r) { return 8 * k + 2 * r; }

// The line that a lane addresses for stmatrix to store the four registers of step k of A: byte within
// a chunk of 64 lines.
NLK_HOST_DEVICE constexpr std::uint32_t operand_line(int thread, int k) {
  const int lane = thread % 32;
  return in_chunk(thread / 32 * 16 + lane % 16, (k * 16 + lane / 16 * 8) * 2);
}

// A quad's 4 x 4 words are transposed in two exchanges, with the lane at distance 1, then 2. Of the
// pair (i, i | distance), this is the one a lane sends, and in whose place it puts what comes.
NLK_HOST_DEVICE constexpr int exchanged(int lane, int distance, int i) {
  return (lane & distance) != 0 ? i : i | distance;
}

// Slots that are filled and emptied in turn. A barrier's phase is over for whoever waits with
// `parity` once it has completed as often as the ring has gone round; producers wait with 1 - parity,
// which lets the first round pass.
struct Ring {
  int slots = 1;
  int slot = 0;
  std::uint32_t parity = 0;

  NLK_HOST_DEVICE constexpr void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace nlk::cuda::hopper

#endif  // NLK_CUDA_HOPPER_LAYOUT_H_
