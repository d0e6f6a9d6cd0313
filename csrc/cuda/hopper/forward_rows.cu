// Kernels of forward_rows.cuh, and the entry that chooses among all forms.
#include "cuda/hopper/forward_rows.cuh"

#include "cuda/hopper/forward_host.cuh"

namespace nlk::cuda {

namespace hopper {

namespace {

template <class Form>
bool try_rows(const HopperForward& a, const Launch& where, Error& error) {
  if (!serves<Form>(a)) return false;
  error = run_forward<Form>(attend_rows<Form>, a, where);
  return true;
}

template <class Number>
bool try_rows_of(const HopperForward& a, const Launch& where, Error& error) {
  return try_rows<Form<Number, 80, 1, false, false>>(a, where, error) ||
         try_rows<Form<Number, 80, 2, false, false>>(a, where, error) ||
         try_rows<Form<Number, 64, 1, false, false>>(a, where, error) ||
         try_rows<Form<Number, 64, 2, false, false>>(a, where, error) ||
         try_rows<Form<Number, 112, 1, false, false>>(a, where, error) ||
         try_rows<Form<Number, 64, 1, true, false>>(a, where, error);
}

}  // namespace

Error forward_rows(const HopperForward& a, const Launch& where) {
  Error error = cudaErrorInvalidValue;
  if (a.value_depth <= kValues) {
    try_rows_of<Bfloat16>(a, where, error) || try_rows_of<Float16>(a, where, error);
  }
  return error;
}

}  // namespace hopper

Error hopper_forward(const HopperForward& a, const Launch& where) {
  return a.plan.split ? hopper::forward_split(a, where) : hopper::forward_rows(a, where);
}

int hopper_forward_shared(const HopperPlan& plan, std::int64_t depth) {
  return hopper::shared_plan(plan, depth).bytes();
}

}  // namespace nlk::cuda
