// Random concatenations in every instruction set that this machine runs, against naive loops.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "nlk/concat.h"
#include "test/check.h"

namespace {

constexpr double kLimit = 1e-11;  // of the largest number

struct Case {
  std::int64_t batch, queries, keys, channels;
  bool channel_first;
};

std::vector<double> draw(std::int64_t count, std::mt19937& random, double step) {
  std::normal_distribution<double> normal;
  std::vector<double> numbers(count);
  for (double& number : numbers) number = std::round(normal(random) / step) * step;
  return numbers;
}

// How many results are wrong.
int check(const Case& sizes, nlk::Isa isa, int threads, std::mt19937& random) {
  const auto [batch, queries, keys, channels, channel_first] = sizes;
  // Scores are multiples of 1/8: many are equal, and many sums are zero.
  const auto a = draw(batch * queries, random, 0.125), b = draw(batch * keys, random, 0.125);
  const auto value = draw(batch * keys * channels, random, 1e-9);
  const auto grad = draw(batch * queries * channels, random, 1e-9);
  const std::int64_t value_row = channel_first ? 1 : channels, value_step = channel_first ? keys : 1;
  std::vector<double> out(grad.size()), d_a(a.size()), d_b(b.size()), d_value(value.size());
  auto true_out = out, true_a = d_a, true_b = d_b, true_value = d_value;
  for (std::int64_t n = 0; n < batch; ++n) {
    for (std::int64_t i = 0; i < queries; ++i) {
      for (std::int64_t j = 0; j < keys; ++j) {
        const double sum = a[n * queries + i] + b[n * keys + j];
        if (!(sum > 0)) continue;
        for (std::int64_t c = 0; c < channels; ++c) {
          const double v = value[n * keys * channels + j * value_row + c * value_step];
          const double g = grad[(n * queries + i) * channels + c];
          true_out[(n * queries + i) * channels + c] += sum * v / keys;
          true_value[(n * keys + j) * channels + c] += sum * g / keys;
          true_a[n * queries + i] += g * v / keys;
          true_b[n * keys + j] += g * v / keys;
        }
      }
    }
  }
  nlk::ConcatArguments call{};
  call.dtype = nlk::Dtype::kFloat64;
  call.threads = threads;
  call.batch = batch, call.queries = queries, call.keys = keys, call.channels = channels;
  call.query_score = a.data(), call.key_score = b.data();
  call.query_score_strides[0] = queries, call.query_score_strides[1] = 1;
  call.key_score_strides[0] = keys, call.key_score_strides[1] = 1;
  call.value = value.data(), call.grad = grad.data();
  call.value_strides[0] = keys * channels;
  call.value_strides[1] = value_row, call.value_strides[2] = value_step;
  call.grad_strides[0] = queries * channels;
  call.grad_strides[1] = channels, call.grad_strides[2] = 1;
  call.out = out.data(), call.d_query_score = d_a.data();
  call.d_key_score = d_b.data(), call.d_value = d_value.data();
  // Exactly as long as is asked for: a sanitizer sees what lies behind.
  for (const bool backward : {false, true}) {
    std::vector<char> workspace(nlk::concat_workspace(call, backward), '\xff');
    call.workspace = workspace.data();
    backward ? nlk::concat_backward(isa, call) : nlk::concat_forward(isa, call);
  }
  int wrong = 0;
  wrong += !nlk::is_close("out", out, true_out, kLimit, 0);
  wrong += !nlk::is_close("d_query_score", d_a, true_a, kLimit, 0);
  wrong += !nlk::is_close("d_key_score", d_b, true_b, kLimit, 0);
  wrong += !nlk::is_close("d_value", d_value, true_value, kLimit, 0);
  if (wrong > 0) {
    std::printf("  B=%d N=%d M=%d V=%d, %d threads\n", int(batch), int(queries), int(keys),
                int(channels), threads);
  }
  return wrong;
}

}  // namespace

int main() {
  const Case cases[] = {{1, 1, 1, 1, false},    {2, 17, 9, 3, true},    {3, 40, 65, 16, false},
                        {2, 63, 200, 70, true}, {1, 130, 33, 64, false}, {1, 90, 41, 200, false},
                        {1, 4100, 12, 20, true}, {1, 30, 8300, 5, false}};
  return nlk::on_every_isa([&](nlk::Isa isa) {
    std::mt19937 random(0);
    int wrong = 0;
    for (const Case& sizes : cases) {
      for (const int threads : {1, 3}) wrong += check(sizes, isa, threads, random);
    }
    return wrong;
  });
}
