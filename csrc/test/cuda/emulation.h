// Runs CUDA kernels on a CPU, for tests: blocks one after another, the threads of a block as fibers
// that switch only where they wait for each other. What a kernel does between two barriers must
// not depend on the order of its threads: `NLK_EMULATION_ORDER` (0 up, 1 down, else a seed of
// random orders) chooses it. Copies in the background arrive as late as they may, and shared
// memory holds NaN where nothing was written.
//
// Included by csrc/cuda/launch.cuh where NLK_CUDA_EMULATION is defined; one host thread at a time.
#ifndef NLK_TEST_CUDA_EMULATION_H_
#define NLK_TEST_CUDA_EMULATION_H_

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace nlk::cuda::emulation {

// ---- numbers -----------------------------------------------------------------------------------

inline float bits_to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline std::uint32_t float_to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bfloat16_to_float(std::uint16_t x) { return bits_to_float(std::uint32_t{x} << 16); }
inline std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = float_to_bits(x);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float half_to_float(std::uint16_t x) {
  const int exponent = (x >> 10) & 31, fraction = x & 1023;
  float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return x & 0x8000 ? -size : size;
}
inline std::uint16_t float_to_half(float x) {
  const std::uint16_t sign = float_to_bits(x) >> 31 ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size != size) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0.0f) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  // Digits end at 2^-24, or 11 below the first.
  const int last = std::max(exponent - 11, -24);
  const float scaled = std::nearbyint(std::ldexp(size, -last));
  const auto digits = static_cast<std::uint16_t>(scaled);
  // A carry into the next exponent is the right number as well.
  return sign | static_cast<std::uint16_t>(digits + (last > -24 ? (last + 24) << 10 : 0));
}

// ---- threads of a block ------------------------------------------------------------------------

constexpr int kLanes = 32;
constexpr std::size_t kStack = 128 * 1024;

// Threads that wait for each other; the last one to come lets all of them go on.
struct Barrier {
  int members = 0, waiting = 0;
  std::uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Warp {
  Barrier barrier;
  // What the lanes show each other, by turns: a slow lane still reads while others go on.
  alignas(16) std::uint32_t shown[2][kLanes][12];
  const void* rows[2][kLanes];
};

struct Thread {
  ucontext_t first;
  jmp_buf at;
  bool started = false, done = false;
  const Barrier* awaited = nullptr;
  std::uint64_t generation = 0;
  int turn = 0;
  dim3 index;
  std::vector<Copy> copies;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Block {
  dim3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<unsigned char> shared;
  unsigned char* shared_start = nullptr;
  std::function<void()> body;
  int current = 0;
  jmp_buf scheduler;
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}
inline Thread& self() { return block()->threads[block()->current]; }
inline Warp& warp() { return block()->warps[block()->current / kLanes]; }
inline int lane() { return block()->current % kLanes; }

inline void wait(Barrier& barrier) {
  if (++barrier.waiting == barrier.members) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  Thread& me = self();
  me.awaited = &barrier;
  me.generation = barrier.generation;
  if (_setjmp(me.at) == 0) _longjmp(block()->scheduler, 1);
}

inline void enter() {
  block()->body();
  self().done = true;
  _longjmp(block()->scheduler, 1);
}

inline bool may_run(const Thread& thread) {
  if (thread.done) return false;
  return thread.awaited == nullptr || thread.awaited->generation != thread.generation;
}

inline void resume(Block& running, int number) {
  Thread& thread = running.threads[number];
  running.current = number;
  thread.awaited = nullptr;
  if (_setjmp(running.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.at, 1);
  thread.started = true;
  setcontext(&thread.first);
}

// In which order the threads of a block get their turns.
inline std::vector<int> turns(int count) {
  const char* text = std::getenv("NLK_EMULATION_ORDER");
  const int order = text ? std::atoi(text) : 0;
  std::vector<int> found(count);
  std::iota(found.begin(), found.end(), 0);
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order > 1) std::shuffle(found.begin(), found.end(), std::mt19937(order));
  return found;
}

inline void run_block(Block& running, int shared_bytes) {
  std::fill(running.shared.begin(), running.shared.end(), 0xff);
  const auto start = reinterpret_cast<std::uintptr_t>(running.shared.data());
  running.shared_start = running.shared.data() + (1024 - start % 1024) % 1024;
  unsigned char* end = running.shared_start + shared_bytes;
  const int count = static_cast<int>(running.threads.size());
  running.barrier = {count, 0, 0};
  for (int first = 0; first < count; first += kLanes)
    running.warps[first / kLanes].barrier = {std::min(kLanes, count - first), 0, 0};
  for (int number = 0; number < count; ++number) {
    Thread& thread = running.threads[number];
    thread.started = thread.done = false;
    thread.awaited = nullptr;
    thread.turn = 0;
    thread.copies.clear();
    thread.index = dim3(number % running.size.x, number / running.size.x % running.size.y,
                        number / running.size.x / running.size.y);
    getcontext(&thread.first);
    thread.first.uc_stack.ss_sp = thread.stack.get();
    thread.first.uc_stack.ss_size = kStack;
    thread.first.uc_link = nullptr;
    makecontext(&thread.first, enter, 0);
  }
  const std::vector<int> order = turns(count);
  for (bool any = true; any;) {
    any = false;
    for (const int number : order) {
      if (!may_run(running.threads[number])) continue;
      any = true;
      resume(running, number);
    }
  }
  const bool stuck = std::any_of(running.threads.begin(), running.threads.end(),
                                 [](const Thread& thread) { return !thread.done; });
  const bool beyond = std::any_of(end, end + 64, [](unsigned char byte) { return byte != 0xff; });
  if (stuck || beyond) {
    std::fprintf(stderr, "emulation: %s\n",
                 stuck ? "threads wait for others that have ended" : "shared memory overrun");
    std::abort();
  }
}

// ---- what a warp does together -----------------------------------------------------------------

// Shows words to the other lanes; returns what all of them show.
template <int kWords>
auto exchange(const std::uint32_t (&mine)[kWords]) -> const std::uint32_t (*)[12] {
  const int turn = self().turn++ % 2;
  Warp& own = warp();
  std::memcpy(own.shown[turn][lane()], mine, sizeof mine);
  wait(own.barrier);
  return own.shown[turn];
}

inline float shuffle_xor(float x, int lanes) {
  const std::uint32_t mine[1] = {float_to_bits(x)};
  return bits_to_float(exchange(mine)[lane() ^ lanes][0]);
}

inline void load_matrices(std::uint32_t (&out)[4], const void* row, bool transposed) {
  const int turn = self().turn++ % 2, own = lane();
  Warp& all = warp();
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "emulation: expected ldmatrix rows at multiples of 16 bytes\n");
    std::abort();
  }
  all.rows[turn][own] = row;
  wait(all.barrier);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int word = 0; word < 2; ++word) {
      const int along = own / 4, across = own % 4 * 2 + word;
      const int from_row = transposed ? across : along, column = transposed ? along : across;
      const auto* from = static_cast<const std::uint16_t*>(all.rows[turn][8 * matrix + from_row]);
      const std::uint32_t low = word ? out[matrix] & 0xffff : 0;
      out[matrix] = low | std::uint32_t{from[column]} << (16 * word);
    }
  }
}

// mma.sync.m16n8k16: each lane shows its 8 numbers of a and its 4 of b, and finds its four sums.
inline void multiply_add(float* sum, const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1, float (*number)(std::uint16_t)) {
  const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::uint32_t mine[12];
  for (int i = 0; i < 12; ++i)
    mine[i] = float_to_bits(number(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)))));
  const auto* all = exchange(mine);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      const int left = 2 * (row / 8 + 2 * (k / 8)) + k % 2, right = 8 + 2 * (k / 8) + k % 2;
      sum[i] += bits_to_float(all[row % 8 * 4 + pair][left]) *
                bits_to_float(all[column * 4 + pair][right]);
    }
  }
}

inline void copy_async(void* shared, const void* global, int valid) {
  const auto both = reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global);
  if (both % 16 != 0 || valid < 0 || valid > 16) {
    std::fprintf(stderr, "emulation: cp.async of %d bytes, addresses %p %p\n", valid, shared, global);
    std::abort();
  }
  self().copies.push_back({shared, global, valid});
}

inline void copies_end() {
  for (const Copy& copy : self().copies) {
    unsigned char bytes[16] = {};
    std::memcpy(bytes, copy.from, copy.valid);
    std::memcpy(copy.to, bytes, sizeof bytes);
  }
  self().copies.clear();
}

}  // namespace nlk::cuda::emulation

#define threadIdx (nlk::cuda::emulation::self().index)
#define blockIdx (nlk::cuda::emulation::block()->index)
#define blockDim (nlk::cuda::emulation::block()->size)
#define gridDim (nlk::cuda::emulation::block()->grid)

inline void __syncthreads() { nlk::cuda::emulation::wait(nlk::cuda::emulation::block()->barrier); }
inline void __syncwarp() { nlk::cuda::emulation::wait(nlk::cuda::emulation::warp().barrier); }

namespace nlk::cuda {

// The smallest part that is served: sm_75.
constexpr int kEmulatedShared = 64 * 1024;

inline unsigned char* shared_memory_of_block() { return emulation::block()->shared_start; }

template <typename... Parameters, typename... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int shared, const Launch&,
             Arguments... arguments) {
  if (threads > 1024 || shared > kEmulatedShared) return 1;
  emulation::Block running;
  running.size = dim3(threads);
  running.grid = blocks;
  running.threads = std::vector<emulation::Thread>(threads);
  running.warps.resize((threads + emulation::kLanes - 1) / emulation::kLanes);
  running.shared.resize(shared + 2048);
  running.body = [&] { kernel(arguments...); };
  emulation::block() = &running;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        running.index = dim3(x, y, z);
        emulation::run_block(running, shared);
      }
  emulation::block() = nullptr;
  return 0;
}

}  // namespace nlk::cuda

#endif  // NLK_TEST_CUDA_EMULATION_H_
