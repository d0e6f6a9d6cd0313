// The public form of every entry point: runs the copy of an instruction set.
#include "nlk/dispatch.h"

#include "nlk/attention.h"
#include "nlk/concat.h"
#include "nlk/gate.h"
#include "nlk/norm.h"
#include "nlk/peak.h"
#include "nlk/pointwise.h"
#include "nlk/pool.h"
#include "nlk/region.h"

namespace nlk {

std::int64_t attention_forward_workspace(Isa isa, const AttentionProblem& problem) {
  NLK_ON_ISA(isa, attention_forward_workspace(problem))
}
std::int64_t attention_backward_workspace(Isa isa, const AttentionProblem& problem) {
  NLK_ON_ISA(isa, attention_backward_workspace(problem))
}
bool attention_forward(Isa isa, const AttentionForward& call) {
  NLK_ON_ISA(isa, attention_forward(call))
}
bool attention_backward(Isa isa, const AttentionBackward& call) {
  NLK_ON_ISA(isa, attention_backward(call))
}

// ---- region ------------------------------------------------------------------------------------

std::int64_t region_workspace(Isa isa, const RegionArguments& arguments) {
  NLK_ON_ISA(isa, region_workspace(arguments))
}

bool region_forward(Isa isa, const RegionArguments& arguments) {
  NLK_ON_ISA(isa, region_forward(arguments))
}

bool region_backward(Isa isa, const RegionArguments& arguments) {
  NLK_ON_ISA(isa, region_backward(arguments))
}

// ---- concat, gate ------------------------------------------------------------------------------

bool concat_forward(Isa isa, const ConcatArguments& arguments) {
  NLK_ON_ISA(isa, concat_forward(arguments))
}

bool concat_backward(Isa isa, const ConcatArguments& arguments) {
  NLK_ON_ISA(isa, concat_backward(arguments))
}

bool gate_forward(Isa isa, const GateArguments& arguments) {
  NLK_ON_ISA(isa, gate_forward(arguments))
}

bool gate_backward(Isa isa, const GateArguments& arguments) {
  NLK_ON_ISA(isa, gate_backward(arguments))
}

// ---- pointwise, norm, pool ---------------------------------------------------------------------

std::int64_t pointwise_workspace(Isa isa, const PointwiseArguments& arguments) {
  NLK_ON_ISA(isa, pointwise_workspace(arguments))
}

bool pointwise(Isa isa, const PointwiseArguments& arguments) {
  NLK_ON_ISA(isa, pointwise(arguments))
}

std::int64_t outer_workspace(Isa isa, const OuterArguments& arguments) {
  NLK_ON_ISA(isa, outer_workspace(arguments))
}

bool outer(Isa isa, const OuterArguments& arguments) { NLK_ON_ISA(isa, outer(arguments)) }

std::int64_t norm_workspace(Isa isa, const NormArguments& arguments) {
  NLK_ON_ISA(isa, norm_workspace(arguments))
}

bool norm_forward(Isa isa, const NormArguments& arguments) {
  NLK_ON_ISA(isa, norm_forward(arguments))
}

bool norm_sums(Isa isa, const NormArguments& arguments) { NLK_ON_ISA(isa, norm_sums(arguments)) }

bool norm_backward(Isa isa, const NormArguments& arguments) {
  NLK_ON_ISA(isa, norm_backward(arguments))
}

bool pool_forward(Isa isa, const PoolArguments& arguments) {
  NLK_ON_ISA(isa, pool_forward(arguments))
}

bool pool_backward(Isa isa, const PoolArguments& arguments) {
  NLK_ON_ISA(isa, pool_backward(arguments))
}

// ---- peak --------------------------------------------------------------------------------------

std::int64_t peak_operations(Isa isa, const PeakArguments& arguments) {
  NLK_ON_ISA(isa, peak_operations(arguments))
}

bool peak_run(Isa isa, const PeakArguments& arguments) {
  NLK_ON_ISA(isa, peak_run(arguments))
}

}  // namespace nlk
