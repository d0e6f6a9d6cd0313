// Random context poolings in every instruction set that this machine runs, against naive loops.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "nlk/gate.h"
#include "test/check.h"

namespace {

constexpr double kLimit = 1e-11, kFloor = 0.01;  // of the largest number and this

enum class Order { kChannelsFirst, kChannelsLast, kEverySecond };

struct Case {
  std::int64_t batch, channels, frames, height, width;
  Order order;
};

std::vector<double> draw(std::int64_t count, std::mt19937& random, double deviation) {
  std::normal_distribution<double> normal(0, deviation);
  std::vector<double> numbers(count);
  for (double& number : numbers) number = normal(random);
  return numbers;
}

// How many results are wrong.
int check(const Case& sizes, nlk::Isa isa, int threads, std::mt19937& random) {
  const auto [batch, channels, frames, height, width, order] = sizes;
  const std::int64_t positions = frames * height * width;
  // Distance of neighbours, of channels and of positions.
  const std::int64_t apart = order == Order::kEverySecond ? 2 : 1;
  const bool last = order == Order::kChannelsLast;
  const std::int64_t channel = last ? 1 : positions * apart, step = last ? channels : apart;
  const auto x = draw(batch * channels * positions * apart, random, 1);
  const auto weight = draw(channels, random, 2 / std::sqrt(static_cast<double>(channels)));
  const auto grad = draw(batch * channels, random, 1);
  const auto at = [&](std::int64_t b, std::int64_t c, std::int64_t p) {
    return x[b * channels * positions * apart + c * channel + p * step];
  };
  std::vector<double> out(batch * channels), d_x(batch * channels * positions), d_weight(channels);
  auto true_out = out, true_x = d_x, true_weight = d_weight;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<double> shares(positions), above(positions);
    double top = -INFINITY, total = 0, mean = 0;
    for (std::int64_t p = 0; p < positions; ++p) {
      for (std::int64_t c = 0; c < channels; ++c) {
        shares[p] += weight[c] * at(b, c, p);
        above[p] += grad[b * channels + c] * at(b, c, p);
      }
      top = std::fmax(top, shares[p]);
    }
    for (double& share : shares) total += share = std::exp(share - top);
    for (std::int64_t p = 0; p < positions; ++p) mean += (shares[p] /= total) * above[p];
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t p = 0; p < positions; ++p) {
        const double slope = shares[p] * (above[p] - mean);
        true_out[b * channels + c] += shares[p] * at(b, c, p);
        true_weight[c] += slope * at(b, c, p);
        true_x[(b * channels + c) * positions + p] =
            shares[p] * grad[b * channels + c] + slope * weight[c];
      }
    }
  }
  nlk::GateArguments call{};
  call.dtype = nlk::Dtype::kFloat64;
  call.threads = threads;
  call.batch = batch, call.channels = channels;
  call.positions[0] = frames, call.positions[1] = height, call.positions[2] = width;
  const std::int64_t strides[] = {channels * positions * apart, channel, height * width * step,
                                  width * step, step};
  const std::int64_t d_strides[] = {channels * positions, positions, height * width, width, 1};
  for (int axis = 0; axis < 5; ++axis) {
    call.x_strides[axis] = strides[axis];
    call.d_x_strides[axis] = d_strides[axis];
  }
  call.x = x.data(), call.weight = weight.data(), call.weight_stride = 1;
  call.grad = grad.data(), call.context = true_out.data();
  call.grad_strides[0] = call.context_strides[0] = channels;
  call.grad_strides[1] = call.context_strides[1] = 1;
  call.out = out.data(), call.d_x = d_x.data(), call.d_weight = d_weight.data();
  // Exactly as long as is asked for: a sanitizer sees what lies behind.
  for (const bool backward : {false, true}) {
    std::vector<char> workspace(nlk::gate_workspace(call, backward), '\xff');
    call.workspace = workspace.data();
    backward ? nlk::gate_backward(isa, call) : nlk::gate_forward(isa, call);
  }
  int wrong = 0;
  wrong += !nlk::is_close("out", out, true_out, kLimit, kFloor);
  wrong += !nlk::is_close("d_x", d_x, true_x, kLimit, kFloor);
  wrong += !nlk::is_close("d_weight", d_weight, true_weight, kLimit, kFloor);
  if (wrong > 0) {
    std::printf("  B=%d C=%d %dx%dx%d, %d threads\n", int(batch), int(channels), int(frames),
                int(height), int(width), threads);
  }
  return wrong;
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, Order::kChannelsFirst},  {2, 5, 2, 3, 4, Order::kChannelsFirst},
      {3, 17, 3, 7, 5, Order::kChannelsFirst}, {1, 70, 4, 13, 17, Order::kChannelsFirst},
      {2, 33, 2, 3, 5, Order::kChannelsLast},  {1, 300, 3, 14, 14, Order::kChannelsLast},
      {2, 9, 1, 3, 3, Order::kEverySecond},    {1, 40, 5, 9, 11, Order::kEverySecond},
  };
  return nlk::on_every_isa([&](nlk::Isa isa) {
    std::mt19937 random(0);
    int wrong = 0;
    for (const Case& sizes : cases) {
      for (const int threads : {1, 3}) wrong += check(sizes, isa, threads, random);
    }
    return wrong;
  });
}
