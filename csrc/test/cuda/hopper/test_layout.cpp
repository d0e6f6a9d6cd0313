// Every address, descriptor and fragment that the Hopper kernels reckon with, tried out.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "cuda/hopper/parameters.h"
#include "nlk/cuda/hopper/layout.h"

using namespace nlk::cuda::hopper;

namespace {

int wrong = 0;

void expect(bool right, const char* what, int a = 0, int b = 0, int c = 0) {
  if (right) return;
  if (++wrong <= 20) std::printf("wrong: %s at %d %d %d\n", what, a, b, c);
}

// A chunk's bytes all have places of their own, and eight lines' units of one column eight banks.
void check_swizzle() {
  std::set<std::uint32_t> places;
  for (int line = 0; line < 112; ++line)
    for (int byte = 0; byte < kLineBytes; ++byte) places.insert(in_chunk(line, byte));
  expect(places.size() == 112 * kLineBytes && *places.rbegin() == 112 * kLineBytes - 1, "chunk");
  for (int unit = 0; unit < 8; ++unit) {
    std::set<std::uint32_t> banks;
    for (int line = 0; line < 8; ++line) banks.insert(in_chunk(line, 16 * unit) % kLineBytes);
    expect(banks.size() == 8, "banks", unit);
  }
}

// Where lines run along the summed index, wgmma reads what a copy has written as (outer, summed).
void check_summed_lines(std::uint32_t start, int outers) {
  const std::uint64_t desc = descriptor(start, 0);
  for (int step = 0; step < 4; ++step)
    for (int outer = 0; outer < outers; ++outer)
      for (int summed = 0; summed < 16; ++summed)
        expect(operand_address(desc + descriptor_step(false, step), false, outer, summed) ==
                   start + in_chunk(outer, 2 * (16 * step + summed)),
               "summed lines", step, outer, summed);
}

// Where they run along rows or columns, 64 of these are a chunk of `lines` summed indices.
void check_outer_lines(std::uint32_t start, int outers, int lines) {
  const int chunk = lines * kLineBytes;
  const std::uint64_t desc = descriptor(start, chunk);
  for (int step = 0; step < lines / 16; ++step)
    for (int outer = 0; outer < outers; ++outer)
      for (int summed = 0; summed < 16; ++summed)
        expect(operand_address(desc + descriptor_step(true, step), true, outer, summed) ==
                   start + outer / 64 * chunk + in_chunk(16 * step + summed, outer % 64 * 2),
               "outer lines", step, outer, summed);
}

void check_descriptor_fields() {
  const std::uint64_t desc = descriptor(0x38c00, 0x2800);
  expect((desc >> 62) == 1 && (desc >> 49 & 7) == 0, "swizzle mode, base offset");
  expect((desc & 0x3fff) == 0x38c0 && (desc >> 16 & 0x3fff) == 0x280 && (desc >> 32 & 0x3fff) == 0x40,
         "fields");
}

void check_fragments(int columns) {
  std::vector<int> seen(static_cast<std::size_t>(64 * columns));
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int i = 0; i < columns / 2; ++i)
      ++seen[static_cast<std::size_t>(fragment_row(thread, i) * columns + fragment_column(thread, i))];
  for (int count : seen) expect(count == 1, "fragment");
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int k = 0; k < columns / 16; ++k)
      for (int r = 0; r < 4; ++r)
        for (int h = 0; h < 2; ++h) {
          const int from = operand_source(k, r) + h;
          expect(fragment_row(thread, from) == operand_row(thread, r) &&
                     fragment_column(thread, from) == 16 * k + operand_column(thread, r, h),
                 "accumulators as operand", thread, k, r);
        }
}

// stmatrix: lane l's word of matrix m goes to the line that lane 8 m + l / 4 addresses.
void check_matrices() {
  for (int thread = 0; thread < kWarpgroup; ++thread)
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < 4; ++r) {
        const int lane = thread % 32, addresser = thread - lane + 8 * r + lane / 4;
        expect(operand_line(addresser, k) + lane % 4 * 4 ==
                   in_chunk(operand_row(thread, r), 2 * (16 * k + operand_column(thread, r, 0))),
               "stmatrix", thread, k, r);
      }
}

void check_exchange() {
  int words[4][4];
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 4; ++i) words[lane][i] = 10 * lane + i;
  for (int distance = 1; distance < 4; distance *= 2)
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      int sent[4];
      for (int lane = 0; lane < 4; ++lane) sent[lane] = words[lane][exchanged(lane, distance, i)];
      for (int lane = 0; lane < 4; ++lane) words[lane][exchanged(lane, distance, i)] = sent[lane ^ distance];
    }
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < 4; ++i) expect(words[lane][i] == 10 * i + lane, "exchange", lane, i);
}

// A ring of barriers that complete once a round: a consumer waits for the round that is being filled, a
// producer never for the first.
void check_ring(int slots) {
  Ring ring{slots};
  for (int step = 0; step < 5 * slots; ++step) {
    const auto round = static_cast<std::uint32_t>(step / slots);
    expect(ring.slot == step % slots && ring.parity == round % 2, "ring", slots, step);
    // A wait with a parity ends once the phase of that parity has: after round + 1 completions of
    // "full", after round completions of "empty".
    const auto ended = [](std::uint32_t completions, std::uint32_t parity) {
      return completions % 2 != parity;
    };
    expect(!ended(round, ring.parity) && ended(round + 1, ring.parity), "full", slots, step);
    expect(ended(round, ring.parity ^ 1), "empty", slots, step);
    expect(round == 0 || !ended(round - 1, ring.parity ^ 1), "not yet empty", slots, step);
    ring.advance();
  }
}

void check_shared() {
  for (const bool split : {false, true})
    for (const bool streamed : {false, true})
      for (const int keys : {64, 80, 112}) {
        if (streamed && !split) continue;
        const auto plan = SharedPlan::of(split ? 64 : 128, keys, 4, 5, 1, split, streamed);
        for (const std::uint32_t start : {plan.query, plan.key, plan.value, plan.weights})
          expect(start % kAtomBytes == 0, "atoms", split, streamed, keys);
        expect(plan.key_slot_bytes % kAtomBytes == 0 && plan.value_slab_bytes % kAtomBytes == 0, "slots");
        expect(plan.barriers % kBarrierBytes == 0 && plan.fades <= plan.barriers, "barriers");
      }
}

}  // namespace

int main() {
  check_swizzle();
  check_descriptor_fields();
  for (const std::uint32_t start : {0u, 1024u, 0x37c00u}) {
    for (const int outers : {64, 80, 112, 256}) {
      if (start + static_cast<std::uint32_t>(outers * kLineBytes) < 0x40000u) check_summed_lines(start, outers);
    }
    check_outer_lines(start < 0x30000u ? start : 0x2c400u, 256, 64);
    check_outer_lines(1024, 256, 80);
    check_outer_lines(1024, 256, 112);
  }
  for (const int columns : {64, 80, 112, 256}) check_fragments(columns);
  check_matrices();
  check_exchange();
  for (int slots = 1; slots <= 16; ++slots) check_ring(slots);
  check_shared();
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
