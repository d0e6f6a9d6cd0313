// A model of a Hopper GPU in the names of nlk/cuda/hopper/ptx.h: kernels of csrc/cuda/hopper run on the
// CPU as they stand. Threads are fibers, run in an order drawn from a seed. What the hardware may do
// late happens late, or early, as drawn: copies land at any time after their issue, products are
// computed at any time between commit and wait, warp by warp. In between, what must not be read is
// NaN: the target of a copy, accumulators. Shared memory begins as NaN.
//
// Found as errors: deadlocks, barriers left in the middle of a phase, accumulators and register
// operands touched in flight, stores handed to products without a proxy fence, misplaced copies.
// Not modelled: time, banks, the fence before products, the scopes of acquire and release.
#ifndef NLK_TEST_CUDA_HOPPER_MACHINE_H_
#define NLK_TEST_CUDA_HOPPER_MACHINE_H_

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "nlk/cuda/hopper/layout.h"
#include "nlk/cuda/hopper/number.h"
#include "test/cuda/hopper/numbers16.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace nlk::cuda::hopper {

// What cuTensorMapEncodeTiled makes of a tensor of 16-bit numbers; strides in elements, the innermost 1.
struct TensorMap {
  const std::uint16_t* data;
  std::int64_t sizes[3], strides[3];
  int box[2];
};

struct Words {
  std::uint32_t word[4];
};

namespace machine {

struct Barrier {
  int expected = 0, pending = 0;
  std::int64_t bytes = 0;
  std::uint32_t phase = 0;
};

constexpr int kSharedBytes = 233472;
// Where the first byte of dynamic shared memory may lie.
constexpr std::uint32_t kSharedBase = 1040;

struct Block {
  int index = 0, rank = 0;
  std::vector<std::uint8_t> shared = std::vector<std::uint8_t>(kSharedBytes, 0xff);
  std::unordered_map<std::uint32_t, Barrier> barriers;

  std::uint8_t* at(std::uint32_t address, int bytes) {
    if (address < kSharedBase || address + bytes > kSharedBase + kSharedBytes - 1024)
      throw std::runtime_error("an address outside shared memory");
    return shared.data() + (address - kSharedBase);
  }
};

// Products of a warp: its 16 rows of one wgmma.
struct Product {
  int columns;
  bool bfloat, in_registers, transpose_a, transpose_b, accumulate;
  std::uint64_t a, b;
  float* sums[32];
  const std::uint32_t* registers[32];
  std::uint32_t copied[32][4];
};

struct Warp {
  int arrived = 0;
  std::uint64_t generation = 0;
  std::uint32_t slots[2][32];
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  // Accumulators in flight, by the place of lane 0's: their true values, 32 x count.
  std::map<float*, std::vector<float>> flying;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<std::uint8_t[]> stack;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0, turns_left = 0;
  bool done = false, dirty = false;
  std::function<bool()> ready;  // empty: can run
};

struct Copy {
  const TensorMap* map;
  std::uint32_t destination, barrier;
  int at[3];
  std::uint16_t blocks;
  Block* from;
};

// One launch: clusters run one after the other.
class Machine {
 public:
  explicit Machine(std::uint64_t seed) : random_(seed) {}

  void run(int blocks, int cluster, int threads, const std::function<void()>& kernel);

  void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    fiber->ready = std::move(ready);
    swapcontext(&fiber->context, &scheduler_);
  }
  bool draw(int one_in) { return random_() % static_cast<unsigned>(one_in) == 0; }

  // All lanes of a warp meet; the last one runs `act` before any goes on.
  template <typename Act>
  void meet(const Act& act) {
    Warp* warp = fiber->warp;
    const std::uint64_t generation = warp->generation;
    if (++warp->arrived == 32) {
      act();
      warp->arrived = 0;
      ++warp->generation;
      return;
    }
    wait_until([warp, generation] { return warp->generation != generation; });
  }

  // Others may go on first.
  void pause();
  void sync(bool of_cluster);
  void issue(Copy copy);
  void arrive(Block& block, std::uint32_t barrier, int arrivals, std::int64_t bytes);
  void complete_products(Warp& warp, std::size_t kept);
  // That no lane of this warp has stores that others' products would not see.
  void check_published() const;

  int blocks_of_grid = 0, cluster_size = 1;
  Fiber* fiber = nullptr;
  std::vector<std::unique_ptr<Block>> cluster;

 private:
  void land(std::size_t which);
  void multiply(const Block& block, Warp& warp, const Product& product, int warp_of_group);
  void create(Fiber& made, int thread);
  void run_cluster(int first, int threads);

  std::mt19937_64 random_;
  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<Copy> copies_;
  std::map<int, std::pair<int, std::uint64_t>> syncs_;
};

extern Machine* current;

template <class Number, int kColumns, bool kTransposeA, bool kTransposeB>
void issue_product(float* sums, const std::uint32_t* registers, std::uint64_t a, std::uint64_t b,
                   bool accumulate);

}  // namespace machine

inline int thread_index() { return machine::current->fiber->thread; }
inline int block_index() { return machine::current->fiber->block->index; }
inline int block_count() { return machine::current->blocks_of_grid; }
inline int cluster_rank() { return machine::current->fiber->block->rank; }
inline std::uint32_t shared_start() {
  return (machine::kSharedBase + kAtomBytes - 1) & ~static_cast<std::uint32_t>(kAtomBytes - 1);
}

inline void block_sync() { machine::current->sync(false); }
inline void cluster_sync() { machine::current->sync(true); }
inline void warp_sync() {
  machine::current->meet([] {});
}
template <int kCount>
void shrink_registers() {}
template <int kCount>
void grow_registers() {}

inline void store_shared(std::uint32_t address, float number) {
  machine::current->fiber->dirty = true;
  std::memcpy(machine::current->fiber->block->at(address, 4), &number, 4);
}
inline float load_shared(std::uint32_t address) {
  float number;
  std::memcpy(&number, machine::current->fiber->block->at(address, 4), 4);
  return number;
}
inline void fence_async_proxy() { machine::current->fiber->dirty = false; }

inline std::uint32_t shuffle_xor(std::uint32_t word, int distance) {
  machine::Fiber* fiber = machine::current->fiber;
  std::uint32_t* slots = fiber->warp->slots[fiber->warp->generation % 2];
  const int lane = fiber->thread % 32;
  slots[lane] = word;
  machine::current->meet([] {});
  return slots[lane ^ distance];
}
inline float shuffle_xor(float number, int distance) {
  std::uint32_t word;
  std::memcpy(&word, &number, 4);
  word = shuffle_xor(word, distance);
  std::memcpy(&number, &word, 4);
  return number;
}

// Lane l holds the address of line l % 8 of matrix l / 8, which all lanes' register l / 8 fill.
inline void store_matrices(std::uint32_t address, const std::uint32_t* registers) {
  machine::Fiber* fiber = machine::current->fiber;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint32_t* addresses = fiber->warp->slots[fiber->warp->generation % 2];
    addresses[fiber->thread % 32] = address;
    machine::current->meet([] {});
    const int lane = fiber->thread % 32;
    const std::uint32_t line = addresses[8 * matrix + lane / 4];
    if (line % 16 != 0) throw std::runtime_error("stmatrix: an address is no multiple of 16");
    std::memcpy(fiber->block->at(line + lane % 4 * 4, 4), registers + matrix, 4);
  }
  fiber->dirty = true;
}

inline void barrier_init(std::uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0) throw std::runtime_error("a barrier is no multiple of 8");
  machine::current->fiber->block->at(barrier, 8);
  machine::current->fiber->block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
void barrier_arrive(std::uint32_t barrier);
void barrier_arrive_at(std::uint32_t barrier, int rank);
inline void barrier_expect(std::uint32_t barrier, int bytes) {
  machine::current->arrive(*machine::current->fiber->block, barrier, 1, bytes);
}
inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  const machine::Barrier* waited = &machine::current->fiber->block->barriers.at(barrier);
  machine::current->wait_until([waited, parity] { return waited->phase != parity; });
}

inline void copy_box_to(const TensorMap& map, std::uint32_t destination, std::uint32_t barrier, int x,
                        int y, int z, std::uint16_t blocks) {
  machine::current->issue(
      {&map, destination, barrier, {x, y, z}, blocks, machine::current->fiber->block});
}
inline void copy_box(const TensorMap& map, std::uint32_t destination, std::uint32_t barrier, int x, int y,
                     int z) {
  const int rank = machine::current->fiber->block->rank;
  copy_box_to(map, destination, barrier, x, y, z, static_cast<std::uint16_t>(1 << rank));
}

template <class Number, int kColumns, bool kTransposeA, bool kTransposeB>
void wgmma_ss(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  machine::issue_product<Number, kColumns, kTransposeA, kTransposeB>(d, nullptr, a, b, accumulate);
}
template <class Number, int kColumns, bool kTransposeB>
void wgmma_rs(float (&d)[kColumns / 2], const std::uint32_t* a, std::uint64_t b, bool accumulate) {
  machine::issue_product<Number, kColumns, false, kTransposeB>(d, a, 0, b, accumulate);
}
inline void wgmma_fence() {}
void wgmma_commit();
void wgmma_wait_for(std::size_t pending);
template <int kPending>
void wgmma_wait() {
  wgmma_wait_for(kPending);
}
template <typename T, int kCount>
void pin(T (&)[kCount]) {}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}
inline float reciprocal(float x) { return 1.0f / x; }

template <class Number>
std::uint32_t pack(float low, float high) {
  return machine::rounded(low, Number::kIsBfloat16) |
         static_cast<std::uint32_t>(machine::rounded(high, Number::kIsBfloat16)) << 16;
}

template <class Number>
float unpack(std::uint32_t word, bool high) {
  return machine::widened(static_cast<std::uint16_t>(high ? word >> 16 : word), Number::kIsBfloat16);
}

namespace machine {

template <class Number, int kColumns, bool kTransposeA, bool kTransposeB>
void issue_product(float* sums, const std::uint32_t* registers, std::uint64_t a, std::uint64_t b,
                   bool accumulate) {
  static_assert(kColumns % 8 == 0 && kColumns <= 256);
  Fiber* fiber = current->fiber;
  Warp* warp = fiber->warp;
  // The first lane opens the product, all add their registers, the last one takes off.
  if (warp->arrived == 0) {
    warp->open.push_back({kColumns, Number::kIsBfloat16, registers != nullptr, kTransposeA, kTransposeB,
                          accumulate, a, b, {}, {}, {}});
  }
  Product& product = warp->open.back();
  const int lane = fiber->thread % 32;
  if (product.a != a || product.b != b || product.accumulate != accumulate)
    throw std::runtime_error("threads of a warp disagree about a product");
  product.sums[lane] = sums;
  product.registers[lane] = registers;
  if (registers != nullptr) std::memcpy(product.copied[lane], registers, 16);
  current->meet([warp] {
    Product& made = warp->open.back();
    const std::size_t count = made.columns / 2;
    std::vector<float>& flying = warp->flying[made.sums[0]];
    if (!flying.empty()) return;
    flying.resize(32 * count);
    for (int of = 0; of < 32; ++of) {
      std::memcpy(flying.data() + of * count, made.sums[of], count * 4);
      std::fill(made.sums[of], made.sums[of] + count, NAN);
    }
  });
}

}  // namespace machine

}  // namespace nlk::cuda::hopper

#endif  // NLK_TEST_CUDA_HOPPER_MACHINE_H_
