// That the model of the machine sees mistakes: small kernels, right and wrong.
#define NLK_HOPPER_EMULATION
#include <cstdio>

#include "nlk/cuda/hopper/ptx.h"
#include "test/cuda/hopper/launch.h"

using namespace nlk::cuda::hopper;

namespace {

enum class Mistake {
  kNone, kUnawaitedCopy, kUnawaitedProduct, kWrittenSums, kOverwrittenOperand, kUnfencedStore,
  kWrongParity, kManyArrivals, kEarlyRelease
};

// One warpgroup: two copies of A (64 x 64) of ones through one slot, B ones, sums of 64 x 16 are 64 each.
void kernel(const TensorMap& map, Mistake mistake, int* bad) {
  const std::uint32_t a = shared_start(), b = a + 8192, barriers = b + 8192;
  const std::uint32_t full = barriers, empty = barriers + 8;
  const int thread = thread_index();
  if (thread == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 4);
    barrier_init_fence();
  }
  block_sync();
  std::uint32_t ones[4];
  for (auto& word : ones) word = pack<Bfloat16>(1, 1);
  for (int k = 0; k < 4; ++k) store_matrices(b + operand_line(thread, k), ones);
  if (mistake != Mistake::kUnfencedStore) fence_async_proxy();
  if (mistake == Mistake::kUnfencedStore && thread % 32 == 0) barrier_arrive(empty);
  block_sync();
  float sums[8];
  std::uint32_t own[4] = {ones[0], ones[1], ones[2], ones[3]};
  for (std::uint32_t round = 0; round < 2; ++round) {
    if (thread == 0) {
      barrier_wait(empty, mistake == Mistake::kWrongParity ? round : round ^ 1);
      barrier_expect(full, 8192);
      copy_box(map, a, full, 0, 0, 0);
    }
    if (mistake != Mistake::kUnawaitedCopy) barrier_wait(full, round);
    for (int k = 0; k < 4; ++k)
      wgmma_ss<Bfloat16, 16, false, false>(sums, descriptor(a, 0) + descriptor_step(false, k),
                                           descriptor(b, 0) + descriptor_step(false, k), k > 0);
    wgmma_rs<Bfloat16, 16, false>(sums, own, descriptor(b, 0), true);
    wgmma_commit();
    if (mistake == Mistake::kWrittenSums) sums[0] = 1;
    if (mistake == Mistake::kOverwrittenOperand) own[0] = 0;
    if (mistake == Mistake::kEarlyRelease && thread % 32 == 0) barrier_arrive(empty);
    if (mistake == Mistake::kEarlyRelease && round == 0 && thread == 0) {
      barrier_wait(empty, 0);
      barrier_expect(full, 8192);
      copy_box(map, a, full, 0, 0, 0);
    }
    if (mistake != Mistake::kUnawaitedProduct) wgmma_wait<0>();
    for (float sum : sums) *bad += sum != 80;
    wgmma_wait<0>();
    if (mistake == Mistake::kEarlyRelease) return barrier_wait(full, 1);
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(empty);
    if (mistake == Mistake::kManyArrivals && thread == 0) barrier_arrive(empty);
    block_sync();
  }
}

// Whether any of 20 orders of events ends in an error or in wrong sums.
bool is_seen(Mistake mistake) {
  std::vector<std::uint16_t> data(64 * 64, 0x3f80);
  TensorMap map;
  make_map(map, true, data.data(), {64, 64, 1}, {1, 64, 64 * 64}, 64);
  for (int seed = 0; seed < 20; ++seed) {
    int bad = 0;
    machine::Machine model(static_cast<std::uint64_t>(seed));
    try {
      model.run(1, 1, kWarpgroup, [&] { kernel(map, mistake, &bad); });
    } catch (const std::exception& error) {
      return true;
    }
    if (bad != 0) return true;
  }
  return false;
}

int check_rounding() {
  int wrong = 0;
  for (int bits = 0; bits < 1 << 16; ++bits) {
    for (const bool bfloat : {false, true}) {
      const auto number = static_cast<std::uint16_t>(bits);
      const float wide = machine::widened(number, bfloat);
      if (!std::isnan(wide)) wrong += machine::rounded(wide, bfloat) != number;
      const float next = machine::widened(static_cast<std::uint16_t>(number + 1), bfloat);
      // Halfway to the next number goes to the even one, a little more to the next.
      if (!std::isfinite(wide) || !std::isfinite(next)) continue;
      const float middle = wide + (next - wide) / 2;
      if (!std::isfinite(middle) || (number & 0x7fff) == 0x7fff) continue;
      wrong += machine::rounded(middle, bfloat) != static_cast<std::uint16_t>(number + number % 2);
      wrong += machine::rounded(std::nextafter(middle, next), bfloat) !=
               static_cast<std::uint16_t>(number + 1);
    }
  }
  std::printf("rounding: %d wrong\n", wrong);
  return wrong;
}

}  // namespace

int main() {
  int wrong = check_rounding();
  const char* names[] = {"none", "unawaited copy", "unawaited product", "written sums",
                         "overwritten operand", "unfenced store", "wrong parity", "many arrivals",
                         "early release"};
  for (int mistake = 0; mistake <= static_cast<int>(Mistake::kEarlyRelease); ++mistake) {
    const bool seen = is_seen(static_cast<Mistake>(mistake));
    std::printf("%s: %s\n", names[mistake], seen ? "seen" : "not seen");
    wrong += seen != (mistake != 0);
  }
  return wrong == 0 ? 0 : 1;
}
