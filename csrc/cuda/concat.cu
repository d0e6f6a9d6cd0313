// The concatenation on GPUs; see include/nlk/cuda/concat.h. Three kernels in a row:
//   sums    G and S of each chunk of steps at its last level
//   carry   of each chunk, G and S at the level where it begins
//   walk    every reader's row, and product; with products a fourth adds up those of all channels
// A warp takes a chunk of 64 steps and 64 channels: it reads the rows of 8 steps at once, then takes
// the steps one after another. Sums are float32 in a unit in which none exceeds the largest number,
// those between chunks float64; each is summed by one thread in a fixed order.
#include "cuda/launch.cuh"

#include "nlk/cuda/concat.h"

#include "cuda/lanes.cuh"

namespace nlk::cuda {
namespace {

constexpr Error kInvalid = 1;  // cudaErrorInvalidValue
constexpr int kLanes = 32;
constexpr int kHeld = 2;  // channels of a lane
constexpr int kChannels = kLanes * kHeld;
constexpr int kAtOnce = 8;  // steps whose rows are read together
constexpr int kThreads = 128;
constexpr float kMost = 3.402823466e38f;

struct Walk {
  ConcatArguments a;
  std::int64_t steps, chunks, blocks;  // of an item: steps, chunks of them, blocks of channels
  float* totals;
  float* stairs;
  float* products;       // (blocks, batch, readers)
  float unit, factor;    // of the sources' numbers; of results
};

// What a warp works on, and its lane's part.
struct Task {
  std::int64_t item, chunk, block;
  int lane;
};

__device__ __forceinline__ bool next_task(const Walk& walk, Task& task) {
  const std::int64_t number =
      std::int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  task.block = number % walk.blocks;
  task.chunk = number / walk.blocks % walk.chunks;
  task.item = number / walk.blocks / walk.chunks;
  task.lane = threadIdx.x % kLanes;
  return task.item < walk.a.batch;
}

// Steps count in the direction of the walk.
__device__ __forceinline__ std::int64_t place(const Walk& walk, std::int64_t item, std::int64_t step) {
  return item * walk.steps + (walk.a.falls ? walk.steps - 1 - step : step);
}
__device__ __forceinline__ float level_at(const Walk& walk, std::int64_t item, std::int64_t step) {
  const float level = walk.a.levels[place(walk, item, step)];
  return walk.a.falls ? -level : level;
}

// Where a lane's numbers of a step lie, and whose they are: `row` is the reader's or the source's.
struct Step {
  int row;
  bool is_reader, is_source;
};
__device__ __forceinline__ Step step_of(const Walk& walk, int order) {
  const int own = order - static_cast<int>(walk.a.first_reader);
  const bool is_reader = order >= 0 && own >= 0 && own < walk.a.readers;
  const bool is_source = order >= 0 && !is_reader;
  const int source = walk.a.first_reader == 0 ? order - static_cast<int>(walk.a.readers) : order;
  return {is_reader ? own : source, is_reader, is_source};
}

// The rows of one batch item from a lane's first channel on; its channels are kLanes apart.
template <typename T>
struct Rows {
  const T* first;
  std::int64_t row, step;

  __device__ Rows(const Operand& operand, const Task& task)
      : first(static_cast<const T*>(operand.data) + task.item * operand.item +
              (task.block * kChannels + task.lane) * operand.channel),
        row(operand.row),
        step(kLanes * operand.channel) {}
  __device__ __forceinline__ float read(int number, int held) const {
    return to_float(first[number * row + held * step]);
  }
};

// How many of a lane's channels exist.
__device__ __forceinline__ int channels_of(const Walk& walk, const Task& task) {
  const std::int64_t left = walk.a.channels - task.block * kChannels - task.lane;
  return left <= 0 ? 0 : left <= kLanes ? 1 : kHeld;
}

// Where the sums of a chunk's lane lie.
__device__ __forceinline__ std::int64_t sums_at(const Walk& walk, const Task& task) {
  return (task.item * walk.chunks + task.chunk) * walk.a.channels + task.block * kChannels +
         task.lane;
}

// Adds (above - below) * sums; at no distance infinite sums stay out of it.
__device__ __forceinline__ float climbed(float stairs, float above, float below, float sums) {
  return above > below ? fmaf(above - below, sums, stairs) : stairs;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const Walk walk) {
  Task task;
  if (!next_task(walk, task)) return;
  const std::int64_t first = task.chunk * kConcatChunk;
  const std::int64_t last = first + kConcatChunk < walk.steps ? first + kConcatChunk : walk.steps;
  const float top = level_at(walk, task.item, last - 1);
  const Rows<T> sources(walk.a.source, task);
  const int present = channels_of(walk, task);
  float totals[kHeld] = {}, stairs[kHeld] = {};
  for (std::int64_t base = first; base < last; base += kLanes) {
    const std::int64_t own = base + task.lane;
    const bool exists = own < last;
    const int order =
        exists ? static_cast<int>(walk.a.order[place(walk, task.item, own)]) : -1;
    const float distance = exists ? top - level_at(walk, task.item, own) : 0.0f;
    for (int part = 0; part < kLanes; part += kAtOnce) {
      float numbers[kAtOnce][kHeld];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const Step step = step_of(walk, shuffle(order, part + i));
#pragma unroll
        for (int held = 0; held < kHeld; ++held)
          numbers[i][held] =
              step.is_source && held < present ? walk.unit * sources.read(step.row, held) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float far = shuffle(distance, part + i);
#pragma unroll
        for (int held = 0; held < kHeld; ++held) {
          totals[held] += numbers[i][held];
          if (far > 0.0f) stairs[held] = fmaf(far, numbers[i][held], stairs[held]);
        }
      }
    }
  }
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    if (held >= present) continue;
    walk.totals[sums_at(walk, task) + held * kLanes] = totals[held];
    walk.stairs[sums_at(walk, task) + held * kLanes] = stairs[held];
  }
}

__global__ void __launch_bounds__(kThreads) carry_kernel(const Walk walk) {
  const std::int64_t number = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t item = number / walk.a.channels, channel = number % walk.a.channels;
  if (item >= walk.a.batch) return;
  double total = 0.0, stair = 0.0;
  float below = level_at(walk, item, 0);
  for (std::int64_t chunk = 0; chunk < walk.chunks; ++chunk) {
    const std::int64_t at = (item * walk.chunks + chunk) * walk.a.channels + channel;
    const double own_total = walk.totals[at], own_stair = walk.stairs[at];
    walk.totals[at] = static_cast<float>(total);
    walk.stairs[at] = static_cast<float>(stair);
    if (chunk == walk.chunks - 1) break;
    const float top = level_at(walk, item, (chunk + 1) * kConcatChunk - 1);
    if (top > below) stair += (static_cast<double>(top) - below) * total;
    stair += own_stair;
    total += own_total;
    below = top;
  }
}

// Four blocks at least: where nothing is said, ptxas spills a few registers for the sake of more.
template <typename T, bool kOut, bool kDots>
__global__ void __launch_bounds__(kThreads, 4) walk_kernel(const Walk walk) {
  Task task;
  if (!next_task(walk, task)) return;
  const std::int64_t first = task.chunk * kConcatChunk;
  const std::int64_t last = first + kConcatChunk < walk.steps ? first + kConcatChunk : walk.steps;
  const Rows<T> sources(walk.a.source, task), others(walk.a.other, task);
  const int present = channels_of(walk, task);
  T* const out = static_cast<T*>(walk.a.out) + task.item * walk.a.readers * walk.a.channels +
                 task.block * kChannels + task.lane;
  float* const products = walk.products + (task.block * walk.a.batch + task.item) * walk.a.readers;
  const float top = walk.a.tops[task.item];
  const float start = level_at(walk, task.item, first > 0 ? first - 1 : 0);

  // Below the chunk, up to its start, and within it, up to the last source.
  float totals[kHeld], stairs[kHeld], own_totals[kHeld] = {}, own_stairs[kHeld] = {};
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    totals[held] = held < present ? walk.totals[sums_at(walk, task) + held * kLanes] : 0.0f;
    stairs[held] = kOut && held < present ? walk.stairs[sums_at(walk, task) + held * kLanes] : 0.0f;
  }
  float here = start;
  for (std::int64_t base = first; base < last; base += kLanes) {
    const std::int64_t own = base + task.lane;
    const bool exists = own < last;
    const int order =
        exists ? static_cast<int>(walk.a.order[place(walk, task.item, own)]) : -1;
    const float own_level = exists ? level_at(walk, task.item, own) : 0.0f;
    for (int part = 0; part < kLanes && base + part < last; part += kAtOnce) {
      float numbers[kAtOnce][kHeld];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const Step step = step_of(walk, shuffle(order, part + i));
#pragma unroll
        for (int held = 0; held < kHeld; ++held) {
          numbers[i][held] = 0.0f;
          if (step.is_source && held < present) numbers[i][held] = sources.read(step.row, held);
          if (kDots && step.is_reader && held < present)
            numbers[i][held] = others.read(step.row, held);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int whose = shuffle(order, part + i);
        if (whose < 0) break;
        const Step step = step_of(walk, whose);
        const float level = shuffle(own_level, part + i);
        if (step.is_source) {
#pragma unroll
          for (int held = 0; held < kHeld; ++held) {
            if (kOut) own_stairs[held] = climbed(own_stairs[held], level, here, own_totals[held]);
            own_totals[held] = fmaf(walk.unit, numbers[i][held], own_totals[held]);
          }
          here = level;
          continue;
        }
        if (kDots) {
          float product = 0.0f;
#pragma unroll
          for (int held = 0; held < kHeld; ++held)
            product = fmaf(totals[held] + own_totals[held], numbers[i][held], product);
#pragma unroll
          for (int distance = kLanes / 2; distance > 0; distance /= 2)
            product += shuffle_xor(product, distance);
          if (task.lane == 0) products[step.row] = product * walk.factor;
        }
        if (kOut) {
          // Clipped scores are looked up.
          const std::int64_t scores = task.item * walk.steps + walk.a.first_reader;
          const bool is_clipped = level >= kMost || level <= -kMost;
          const float highest = (is_clipped ? walk.a.scores[scores + step.row] : level) + top;
          const bool is_bad = !(highest <= kMost);
#pragma unroll
          for (int held = 0; held < kHeld; ++held) {
            const float stair = climbed(stairs[held], level, start, totals[held]) +
                                climbed(own_stairs[held], level, here, own_totals[held]);
            const float total = totals[held] + own_totals[held];
            if (held < present)
              out[step.row * walk.a.channels + held * kLanes] =
                  to<T>(is_bad ? total * highest : stair * walk.factor);
          }
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) products_kernel(const Walk walk) {
  const std::int64_t number = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t numbers = walk.a.batch * walk.a.readers;
  if (number >= numbers) return;
  float sum = 0.0f;
  for (std::int64_t block = 0; block < walk.blocks; ++block)
    sum += walk.products[block * numbers + number];
  static_cast<T*>(walk.a.dots)[number] = to<T>(sum);
}

std::int64_t divide_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step; }

// A power of two: sums of so many numbers in it stay below the largest of them.
float unit_of(std::int64_t numbers) {
  float unit = 1.0f;
  for (; numbers > 0; numbers /= 2) unit /= 2;
  return unit;
}

Walk walk_of(const ConcatArguments& arguments) {
  Walk walk = {};
  walk.a = arguments;
  walk.steps = arguments.sources + arguments.readers;
  walk.chunks = divide_up(walk.steps, kConcatChunk);
  walk.blocks = divide_up(arguments.channels, kChannels);
  const std::int64_t numbers = arguments.batch * walk.chunks * arguments.channels;
  walk.totals = arguments.sums;
  walk.stairs = arguments.sums + numbers;
  walk.products = arguments.sums + 2 * numbers;
  walk.unit = unit_of(arguments.sources);
  walk.factor = static_cast<float>(1.0 / (static_cast<double>(arguments.divisor) * walk.unit));
  return walk;
}

template <typename T>
Error walk_in(const Walk& walk, const Launch& where) {
  const ConcatArguments& a = walk.a;
  const std::int64_t tasks = divide_up(a.batch * walk.chunks * walk.blocks, kThreads / kLanes);
  const std::int64_t carries = divide_up(a.batch * a.channels, kThreads);
  const std::int64_t rows = divide_up(a.batch * a.readers, kThreads);
  constexpr std::int64_t kMostBlocks = 0x7fffffff;
  if (tasks > kMostBlocks || carries > kMostBlocks || rows > kMostBlocks) return kInvalid;
  if (walk.steps > 0x7fffffff) return kInvalid;  // rows are counted by ints
  const dim3 blocks(static_cast<unsigned>(tasks));
  if (const Error error = launch(sums_kernel<T>, blocks, kThreads, 0, where, walk)) return error;
  if (const Error error = launch(carry_kernel, dim3(static_cast<unsigned>(carries)), kThreads, 0,
                                 where, walk))
    return error;
  if (a.dots == nullptr) return launch(walk_kernel<T, true, false>, blocks, kThreads, 0, where, walk);
  const auto kernel = a.out == nullptr ? walk_kernel<T, false, true> : walk_kernel<T, true, true>;
  if (const Error error = launch(kernel, blocks, kThreads, 0, where, walk)) return error;
  return launch(products_kernel<T>, dim3(static_cast<unsigned>(rows)), kThreads, 0, where, walk);
}

}  // namespace

std::int64_t concat_sums(const ConcatArguments& arguments) {
  const Walk walk = walk_of(arguments);
  const std::int64_t dots = arguments.dots == nullptr ? 0 : walk.blocks * arguments.readers;
  return arguments.batch * (2 * walk.chunks * arguments.channels + dots);
}

Error concat_walk(const ConcatArguments& arguments, const Launch& where) {
  const Walk walk = walk_of(arguments);
  switch (arguments.dtype) {
    case 1: return walk_in<float>(walk, where);
    case 2: return walk_in<Bfloat16>(walk, where);
    case 3: return walk_in<Half>(walk, where);
    default: return kInvalid;
  }
}

}  // namespace nlk::cuda
