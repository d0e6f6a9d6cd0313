#include "nlk/attention.h"

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/linear.h"

namespace nlk {
namespace NLK_ISA {

std::int64_t attention_forward_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    if (problem.affinity == Affinity::kLinear) return linear_workspace<T>(problem, false);
    return Forward<T>(problem).lay_out(nullptr);
  });
}

std::int64_t attention_backward_workspace(const AttentionProblem& problem) {
  return with_dtype(problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    if (problem.affinity == Affinity::kLinear) return linear_workspace<T>(problem, true);
    return Backward<T>(problem).lay_out(nullptr);
  });
}

bool attention_forward(const AttentionForward& call) {
  return with_dtype(call.problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    if (call.problem.affinity == Affinity::kLinear) return run_linear<T>(call);
    return Forward<T>(call.problem).run(call);
  });
}

bool attention_backward(const AttentionBackward& call) {
  return with_dtype(call.problem.dtype, [&](auto number) {
    typedef decltype(number) T;
    if (call.problem.affinity == Affinity::kLinear) return run_linear<T>(call);
    return Backward<T>(call.problem).run(call);
  });
}

}  // namespace NLK_ISA
}  // namespace nlk
