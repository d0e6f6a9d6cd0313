// Batches that come out even: each thread takes whole items, one after another. What it packs stays
// in its own cache, and no phase waits for other threads.
#ifndef NLK_CPU_SHARES_H_
#define NLK_CPU_SHARES_H_

#include <array>

#include "cpu/attention_plan.h"

namespace nlk {
namespace NLK_ISA {
namespace {

inline std::array<Operand*, 4> operands_of(AttentionForward& call) {
  return {&call.query, &call.key, &call.value, &call.out};
}
inline std::array<Operand*, 7> operands_of(AttentionBackward& call) {
  return {&call.grad,    &call.query, &call.key,    &call.value,
          &call.d_query, &call.d_key, &call.d_value};
}

// To what belongs to a batch item and those behind it.
template <typename T>
void move_sums(AttentionForward& call, std::int64_t item) {
  const AttentionProblem& p = call.problem;
  call.stats = static_cast<Computed<T>*>(call.stats) + item * p.queries;
  if (call.state) {
    call.state = static_cast<Computed<T>*>(call.state) + item * p.depth * p.value_depth;
  }
}
template <typename T>
void move_sums(AttentionBackward& call, std::int64_t item) {
  const AttentionProblem& p = call.problem;
  if (call.state) {
    call.state = static_cast<const Computed<T>*>(call.state) + item * p.depth * p.value_depth;
  }
}

// The problem that each thread has for itself; the whole one where the batch does not come out even,
// or the workspace is too small for that. `make` makes a kernel of a problem.
template <typename Make>
AttentionProblem share_of(const AttentionProblem& problem, Make make) {
  if (problem.batch % problem.threads != 0) return problem;
  AttentionProblem share = problem;
  share.batch /= problem.threads;
  share.workspace_limit /= problem.threads;
  share.threads = 1;
  return make(share).lay_out(nullptr) <= share.workspace_limit ? share : problem;
}

template <typename Make>
std::int64_t workspace_of(const AttentionProblem& problem, Make make) {
  const AttentionProblem share = share_of(problem, make);
  return problem.threads / share.threads * make(share).lay_out(nullptr);
}

template <typename T, typename Call, typename Make>
bool run_shares(const Call& call, Make make) {
  const AttentionProblem share = share_of(call.problem, make);
  const std::int64_t shares = call.problem.threads / share.threads;
  if (shares == 1) return make(share).run(call);
  const std::int64_t bytes = make(share).lay_out(nullptr);
  auto body = [&](std::int64_t task, int) {
    const std::int64_t first = task * share.batch;
    Call part = call;
    part.problem = share;
    part.workspace = static_cast<char*>(call.workspace) + task * bytes;
    for (Operand* operand : operands_of(part)) {
      operand->data = static_cast<T*>(operand->data) + first * operand->item;
    }
    move_sums<T>(part, first);
    make(share).run(part);
  };
  return parallel(static_cast<int>(shares), shares, body);
}

}  // namespace
}  // namespace NLK_ISA
}  // namespace nlk

#endif  // NLK_CPU_SHARES_H_
