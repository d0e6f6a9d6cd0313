// Context pooling of the channel gate on GPUs; see include/nlk/cuda/gate.h. x is read once forward and
// once backward and d_x written once, beside 8 bytes a position: bound by memory wherever a block's
// two products and one sum a number take no longer, which nobody measured.
#include "cuda/launch.cuh"

#include "nlk/cuda/gate.h"

#include "cuda/gate_read.cuh"

namespace nlk::cuda {
namespace {

constexpr Error kInvalid = 1;  // cudaErrorInvalidValue

// Adds up the splits of 32 channels of an item: eight threads a channel take every eighth split, and
// their sums are added in order.
constexpr int kCombined = 32, kShares = 8;

struct Combination {
  const float* parts;
  const float* part_stats;
  const void* context;  // what is taken off, times the mean error; of the backward
  void* out;            // T of the forward, float of the backward
  float* stats;
  std::int64_t splits;
  int channels;
};

// The largest logit of all splits, or 0 where all are -inf.
__device__ __forceinline__ float origin_of(const float* stats, std::int64_t splits) {
  float top = negative_infinity();
  for (std::int64_t split = 0; split < splits; ++split) top = fmaxf(top, stats[3 * split]);
  return top == negative_infinity() ? 0.0f : top;
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kCombined * kShares) combine_kernel(const Combination a) {
  float* const shared = reinterpret_cast<float*>(shared_memory_of_block());  // (3, shares, combined)
  const unsigned tiles = (a.channels + kCombined - 1) / kCombined;
  const std::int64_t item = blockIdx.x / tiles;
  const int own = threadIdx.x % kCombined, share = threadIdx.x / kCombined;
  const int channel = static_cast<int>(blockIdx.x % tiles) * kCombined + own;
  const bool is_present = channel < a.channels;
  const float* const stats = a.part_stats + item * a.splits * 3;
  const float* const parts = a.parts + item * a.splits * a.channels + channel;
  const float origin = origin_of(stats, a.splits);

  float sum = 0.0f, total = 0.0f, error = 0.0f;
  for (std::int64_t split = share; split < a.splits; split += kShares) {
    const float fade = exp2f((stats[3 * split] - origin) * kLog2E);
    total = fmaf(fade, stats[3 * split + 1], total);
    if (kBackward) error = fmaf(fade, stats[3 * split + 2], error);
    if (is_present) sum = fmaf(fade, parts[split * a.channels], sum);
  }
  shared[threadIdx.x] = sum;
  shared[kCombined * kShares + threadIdx.x] = total;
  if (kBackward) shared[2 * kCombined * kShares + threadIdx.x] = error;
  __syncthreads();
  if (share != 0) return;
  sum = total = error = 0.0f;
  for (int other = own; other < kCombined * kShares; other += kCombined) {
    sum += shared[other];
    total += shared[kCombined * kShares + other];
    if (kBackward) error += shared[2 * kCombined * kShares + other];
  }
  if (kBackward) {
    error /= total;
    if (own == 0 && blockIdx.x % tiles == 0) {
      a.stats[3 * item] = origin;
      a.stats[3 * item + 1] = total;
      a.stats[3 * item + 2] = error;
    }
  }
  if (!is_present) return;
  const std::int64_t at = item * a.channels + channel;
  if constexpr (kBackward) {
    const float mean = error == 0.0f ? 0.0f : error * to_float(static_cast<const T*>(a.context)[at]);
    static_cast<float*>(a.out)[at] = sum / total - mean;
  } else {
    static_cast<T*>(a.out)[at] = to<T>(sum / total);
  }
}

// d_weight: the sums of all items, in their order.
constexpr int kWeightThreads = 128;
template <typename T>
__global__ void __launch_bounds__(kWeightThreads)
    weight_kernel(const float* sums, std::int64_t batch, int channels, T* d_weight) {
  const int channel = blockIdx.x * kWeightThreads + threadIdx.x;
  if (channel >= channels) return;
  double sum = 0.0;
  for (std::int64_t item = 0; item < batch; ++item) sum += sums[item * channels + channel];
  d_weight[channel] = to<T>(static_cast<float>(sum));
}

// A tile of 64 positions and 64 channels of d_x; neighbouring lanes write neighbours.
constexpr int kSide = 64, kWriteThreads = 256;

struct Writing {
  void* d_x;
  std::int64_t item, channel;  // strides
  Positions positions;
  const void* grad;
  const void* weight;
  const float* scores;
  const float* stats;
  int channels;
  float unit;
};

template <typename T, bool kLast>
__global__ void __launch_bounds__(kWriteThreads) write_kernel(const Writing a) {
  float* const shares = reinterpret_cast<float*>(shared_memory_of_block());
  float* const slopes = shares + kSide;
  const unsigned parts = (a.channels + kSide - 1) / kSide;
  const unsigned tiles = (a.positions.count + kSide - 1) / kSide;
  const std::int64_t item = blockIdx.x / parts / tiles;
  const unsigned start = blockIdx.x / parts % tiles * kSide;
  const int first = static_cast<int>(blockIdx.x % parts) * kSide;
  if (threadIdx.x < kSide && start + threadIdx.x < a.positions.count) {
    const float* const logits = a.scores + item * 2 * a.positions.count + start + threadIdx.x;
    const float* const stats = a.stats + 3 * item;
    const float share = exp2f((logits[0] - stats[0]) * kLog2E) * a.unit / stats[1];
    shares[threadIdx.x] = share;
    slopes[threadIdx.x] = share * (logits[a.positions.count] - stats[2]);
  }
  __syncthreads();
  const int own = threadIdx.x % kSide;
  for (int other = threadIdx.x / kSide; other < kSide; other += kWriteThreads / kSide) {
    const int place = kLast ? other : own, channel = first + (kLast ? own : other);
    if (start + place >= a.positions.count || channel >= a.channels) continue;
    const float grad = to_float(static_cast<const T*>(a.grad)[item * a.channels + channel]);
    const float weight = to_float(static_cast<const T*>(a.weight)[channel]);
    static_cast<T*>(a.d_x)[item * a.item + channel * a.channel + a.positions.offset(start + place)] =
        to<T>(fmaf(shares[place], grad, slopes[place] * weight));
  }
}

Positions positions_of(const GateArguments& a, const GateLayout& layout) {
  Positions positions = {};
  positions.count = static_cast<unsigned>(a.positions[0] * a.positions[1] * a.positions[2]);
  positions.height = static_cast<unsigned>(a.positions[1]);
  positions.width = static_cast<unsigned>(a.positions[2]);
  positions.is_flat = true;
  std::int64_t inner = 1;
  bool has_step = false;
  for (int axis = 2; axis >= 0; --axis) {
    positions.strides[axis] = layout.positions[axis];
    if (a.positions[axis] == 1) continue;
    if (!has_step) positions.step = layout.positions[axis];
    has_step = true;
    positions.is_flat &= layout.positions[axis] == inner * positions.step;
    inner *= a.positions[axis];
  }
  return positions;
}

std::int64_t positions_in(const GateArguments& a) {
  return a.positions[0] * a.positions[1] * a.positions[2];
}
int tile_of(const GateArguments& a) {
  return a.channels_last ? kGateTogether : gate_positions(a.channels);
}
GateSplits splits_of(const GateArguments& a) {
  const int tile = tile_of(a);
  return gate_splits_of(a.batch, (positions_in(a) + tile - 1) / tile);
}

// A power of two by which so many shares of at most 1 sum to less than 1.
float unit_of(std::int64_t positions) {
  float unit = 1.0f;
  for (; positions > 0; positions /= 2) unit /= 2;
  return unit;
}

template <typename T, bool kBackward>
Error read(const GateArguments& a, float* scores, const Launch& where) {
  const GateSplits splits = splits_of(a);
  const std::int64_t blocks = a.batch * splits.count;
  if (blocks > 0x7fffffff || positions_in(a) > 0x7fffffff || a.channels > kGateWidest)
    return kInvalid;
  const int tile = tile_of(a);
  Reading reading = {};
  reading.x = a.x;
  reading.item = a.x_layout.item;
  reading.channel = a.x_layout.channel;
  reading.positions = positions_of(a, a.x_layout);
  reading.weight = a.weight;
  reading.grad = a.grad;
  reading.context = a.context;
  reading.scores = scores;
  reading.parts = a.parts;
  reading.part_stats = a.part_stats;
  reading.splits = splits.count;
  reading.tiles_of_split = splits.tiles;
  reading.tiles = (positions_in(a) + tile - 1) / tile;
  reading.channels = static_cast<int>(a.channels);
  reading.unit = unit_of(positions_in(a));
  const int threads = a.channels_last ? gate_threads_of_channels(a.channels)
                                      : gate_threads(a.channels, tile);
  const int sums = (kBackward ? 2 : 1) * (reading.channels + 2 * threads / 32 * tile);
  auto kernel = read_channels_kernel<T, kBackward>;
  if (!a.channels_last) {
    kernel = tile == 32   ? read_positions_kernel<T, 32, kBackward>
             : tile == 16 ? read_positions_kernel<T, 16, kBackward>
                          : read_positions_kernel<T, 8, kBackward>;
  }
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, 4 * sums, where, reading);
}

template <typename T, bool kBackward>
Error combine(const GateArguments& a, void* out, float* stats, const Launch& where) {
  Combination combination = {a.parts, a.part_stats, a.context, out, stats, splits_of(a).count,
                             static_cast<int>(a.channels)};
  const std::int64_t blocks = a.batch * ((a.channels + kCombined - 1) / kCombined);
  if (blocks > 0x7fffffff) return kInvalid;
  const int shared = 4 * (kBackward ? 3 : 2) * kCombined * kShares;
  return launch(combine_kernel<T, kBackward>, dim3(static_cast<unsigned>(blocks)),
                kCombined * kShares, shared, where, combination);
}

template <typename T>
Error write(const GateArguments& a, const GateGradient& to, const Launch& where) {
  Writing writing = {};
  writing.d_x = to.d_x;
  writing.item = to.d_x_layout.item;
  writing.channel = to.d_x_layout.channel;
  writing.positions = positions_of(a, to.d_x_layout);
  writing.grad = a.grad;
  writing.weight = a.weight;
  writing.scores = to.scores;
  writing.stats = to.stats;
  writing.channels = static_cast<int>(a.channels);
  writing.unit = unit_of(positions_in(a));
  const std::int64_t blocks = a.batch * ((positions_in(a) + kSide - 1) / kSide) *
                              ((a.channels + kSide - 1) / kSide);
  if (blocks > 0x7fffffff) return kInvalid;
  const auto kernel = to.d_x_layout.channel == 1 ? write_kernel<T, true> : write_kernel<T, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kWriteThreads, 4 * 2 * kSide, where,
                writing);
}

// Calls with_type(T{}) for the dtype.
template <typename Call>
Error with_dtype(int dtype, const Call& call) {
  if (dtype == 1) return call(float{});
  if (dtype == 2) return call(Bfloat16{});
  if (dtype == 3) return call(Half{});
  return kInvalid;
}

}  // namespace

std::int64_t gate_splits(const GateArguments& arguments) { return splits_of(arguments).count; }

Error gate_forward(const GateArguments& arguments, void* context, const Launch& where) {
  return with_dtype(arguments.dtype, [&](auto number) -> Error {
    using T = decltype(number);
    if (const Error error = read<T, false>(arguments, nullptr, where)) return error;
    return combine<T, false>(arguments, context, nullptr, where);
  });
}

Error gate_backward(const GateArguments& arguments, const GateGradient& gradient,
                    const Launch& where) {
  return with_dtype(arguments.dtype, [&](auto number) -> Error {
    using T = decltype(number);
    if (const Error error = read<T, true>(arguments, gradient.scores, where)) return error;
    if (const Error error = combine<T, true>(arguments, gradient.sums, gradient.stats, where))
      return error;
    const int channels = static_cast<int>(arguments.channels);
    const dim3 blocks((channels + kWeightThreads - 1) / kWeightThreads);
    if (const Error error =
            launch(weight_kernel<T>, blocks, kWeightThreads, 0, where,
                   static_cast<const float*>(gradient.sums), arguments.batch, channels,
                   static_cast<T*>(gradient.d_weight)))
      return error;
    return write<T>(arguments, gradient, where);
  });
}

}  // namespace nlk::cuda
