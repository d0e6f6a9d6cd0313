#include "nlk/attention.h"

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/linear.h"
#include "cpu/shares.h"

namespace nlk {
namespace NLK_ISA {
namespace {

// body(what makes a kernel of a problem).
template <typename T, typename Body>
auto with_forward(const AttentionProblem& problem, Body body) {
  if (problem.affinity == Affinity::kLinear) {
    return body([](const AttentionProblem& p) { return Linear<T>(p, false); });
  }
  return body([](const AttentionProblem& p) { return Forward<T>(p); });
}
template <typename T, typename Body>
auto with_backward(const AttentionProblem& problem, Body body) {
  if (problem.affinity == Affinity::kLinear) {
    return body([](const AttentionProblem& p) { return Linear<T>(p, true); });
  }
  return body([](const AttentionProblem& p) { return Backward<T>(p); });
}

}  // namespace

std::int64_t attention_forward_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto number) {
    return with_forward<decltype(number)>(problem,
                                          [&](auto make) { return workspace_of(problem, make); });
  });
}

std::int64_t attention_backward_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto number) {
    return with_backward<decltype(number)>(problem,
                                           [&](auto make) { return workspace_of(problem, make); });
  });
}

bool attention_forward(const AttentionForward& call) {
  return with_dtype(call.problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    return with_forward<T>(call.problem, [&](auto make) { return run_shares<T>(call, make); });
  });
}

bool attention_backward(const AttentionBackward& call) {
  return with_dtype(call.problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    return with_backward<T>(call.problem, [&](auto make) { return run_shares<T>(call, make); });
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
