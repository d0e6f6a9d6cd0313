// Attention in every instruction set of the build that this machine runs, against double loops:
// random sizes, strides, dtypes and threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "nlk/attention.h"
#include "test/check.h"
#include "test/tensor.h"

namespace {

using nlk::Affinity;
using nlk::Dtype;
using nlk::Tensor;

constexpr int kRounds = 120;

struct Expected {
  std::vector<double> out, d_query, d_key, d_value;
};

Expected define(const nlk::AttentionProblem& p, const Tensor& query, const Tensor& key,
                const Tensor& value, const Tensor& grad) {
  Expected e;
  e.out.resize(p.batch * p.queries * p.value_depth);
  e.d_query.resize(p.batch * p.queries * p.depth);
  e.d_key.resize(p.batch * p.keys * p.depth);
  e.d_value.resize(p.batch * p.keys * p.value_depth);
  const bool softmax = p.affinity == Affinity::kSoftmax;
  std::vector<double> weights(p.keys), slopes(p.keys);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t n = 0; n < p.queries; ++n) {
      double top = -HUGE_VAL, total = 0, delta = 0;
      for (std::int64_t m = 0; m < p.keys; ++m) {
        double score = 0;
        for (std::int64_t c = 0; c < p.depth; ++c) score += query.at(b, n, c) * key.at(b, m, c);
        weights[m] = score * p.scale / (softmax ? 1.0 : static_cast<double>(p.keys));
        if (p.affinity == Affinity::kRelu) weights[m] = std::fmax(weights[m], 0.0);
        top = std::fmax(top, weights[m]);
      }
      if (softmax) {
        for (auto& weight : weights) total += weight = std::exp(weight - top);
        for (auto& weight : weights) weight /= total;
      }
      for (std::int64_t m = 0; m < p.keys; ++m) {
        slopes[m] = 0;
        for (std::int64_t c = 0; c < p.value_depth; ++c) {
          e.out[(b * p.queries + n) * p.value_depth + c] += weights[m] * value.at(b, m, c);
          e.d_value[(b * p.keys + m) * p.value_depth + c] += weights[m] * grad.at(b, n, c);
          slopes[m] += grad.at(b, n, c) * value.at(b, m, c);
        }
        delta += weights[m] * slopes[m];
      }
      for (std::int64_t m = 0; m < p.keys; ++m) {
        double slope = slopes[m] * p.scale / (softmax ? 1.0 : static_cast<double>(p.keys));
        if (softmax) slope = weights[m] * (slopes[m] - delta) * p.scale;
        if (p.affinity == Affinity::kRelu && weights[m] <= 0) slope = 0;
        for (std::int64_t c = 0; c < p.depth; ++c) {
          e.d_query[(b * p.queries + n) * p.depth + c] += slope * key.at(b, m, c);
          e.d_key[(b * p.keys + m) * p.depth + c] += slope * query.at(b, n, c);
        }
      }
    }
  }
  return e;
}

// How many results are wrong.
int check(nlk::Isa isa, unsigned seed) {
  std::mt19937 random(seed);
  const auto draw = [&](unsigned most) { return static_cast<std::int64_t>(random() % most) + 1; };
  nlk::AttentionProblem p{};
  p.affinity = static_cast<Affinity>(random() % 4);
  p.dtype = static_cast<Dtype>(random() % 4);
  p.batch = seed % 10 == 0 ? draw(30) : draw(3);
  p.queries = draw(seed % 3 == 0 ? 300 : 40);
  p.keys = draw(seed % 3 == 1 ? 300 : 40);
  p.depth = draw(seed % 7 == 2 ? 300 : 60);
  p.value_depth = draw(seed % 7 == 3 ? 300 : 60);
  p.scale = seed % 5 == 0 ? -0.05 : 0.1;
  p.threads = static_cast<int>(draw(4));
  p.workspace_limit = seed % 2 ? 0 : 10 << 20;
  const int layout = static_cast<int>(random() % 3);
  Tensor query(p.dtype, p.batch, p.queries, p.depth, layout);
  Tensor key(p.dtype, p.batch, p.keys, p.depth, layout);
  Tensor value(p.dtype, p.batch, p.keys, p.value_depth, layout);
  Tensor grad(p.dtype, p.batch, p.queries, p.value_depth, layout);
  for (Tensor* tensor : {&query, &key, &value, &grad}) tensor->fill(random);
  Tensor out(p.dtype, p.batch, p.queries, p.value_depth, layout);
  Tensor d_query(p.dtype, p.batch, p.queries, p.depth, layout);
  Tensor d_key(p.dtype, p.batch, p.keys, p.depth, layout);
  Tensor d_value(p.dtype, p.batch, p.keys, p.value_depth, layout);
  const std::size_t wide = p.dtype == Dtype::kFloat64 ? 8 : 4;
  std::unique_ptr<char[]> stats(new char[2 * p.batch * p.queries * wide]);
  std::unique_ptr<char[]> state;
  if (p.affinity == Affinity::kLinear && seed % 4) {
    state.reset(new char[p.batch * p.depth * p.value_depth * wide]);
  }
  {
    const auto memory = nlk::workspace(nlk::attention_forward_workspace(isa, p));
    nlk::attention_forward(isa, {p, query.operand, key.operand, value.operand, out.operand,
                                 stats.get(), p.batch * p.queries, state.get(), memory.get()});
  }
  const auto differentiate = [&](Tensor& d_query, Tensor& d_key, Tensor& d_value,
                                 const void* state) {
    const auto memory = nlk::workspace(nlk::attention_backward_workspace(isa, p));
    nlk::attention_backward(isa, {p, grad.operand, query.operand, key.operand, value.operand,
                                  d_query.operand, d_key.operand, d_value.operand, state,
                                  memory.get()});
  };
  differentiate(d_query, d_key, d_value, nullptr);
  const Expected e = define(p, query, key, value, grad);
  const double limit = p.dtype == Dtype::kFloat64   ? 1e-11
                       : p.dtype == Dtype::kFloat32 ? 1e-4
                                                    : 0.03;
  int wrong = 0;
  const auto compare = [&](const char* what, const Tensor& got, const std::vector<double>& wanted) {
    wrong += !nlk::is_close(what, got.numbers(), wanted, limit, 0.05);
  };
  compare("out", out, e.out);
  compare("d_query", d_query, e.d_query);
  compare("d_key", d_key, e.d_key);
  compare("d_value", d_value, e.d_value);
  if (state) {
    Tensor d_query_again(p.dtype, p.batch, p.queries, p.depth, layout);
    Tensor d_key_again(p.dtype, p.batch, p.keys, p.depth, layout);
    Tensor d_value_again(p.dtype, p.batch, p.keys, p.value_depth, layout);
    differentiate(d_query_again, d_key_again, d_value_again, state.get());
    const bool same = d_query_again.is_bitwise(d_query) && d_key_again.is_bitwise(d_key) &&
                      d_value_again.is_bitwise(d_value);
    if (!same) std::printf("  other gradients with the state of the forward\n");
    wrong += !same;
  }
  if (wrong > 0) {
    std::printf("  seed %u: affinity %d, dtype %d, B=%d N=%d M=%d D=%d V=%d, %d threads\n", seed,
                static_cast<int>(p.affinity), static_cast<int>(p.dtype), int(p.batch),
                int(p.queries), int(p.keys), int(p.depth), int(p.value_depth), p.threads);
  }
  return wrong;
}

}  // namespace

int main() {
  return nlk::on_every_isa([](nlk::Isa isa) {
    int wrong = 0;
    for (unsigned seed = 0; seed < kRounds; ++seed) wrong += check(isa, seed);
    return wrong;
  });
}
