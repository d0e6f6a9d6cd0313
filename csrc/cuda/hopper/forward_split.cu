// Kernels of forward_split.cuh.
#include "cuda/hopper/forward_split.cuh"

#include "cuda/hopper/forward_host.cuh"

namespace nlk::cuda::hopper {

namespace {

template <class Form>
bool run(const HopperForward& a, const Launch& where, Error& error) {
  if (!serves<Form>(a)) return false;
  error = run_forward<Form>(attend_split<Form>, a, where);
  return true;
}

template <class Number>
bool run_any(const HopperForward& a, const Launch& where, Error& error) {
  return run<Form<Number, 64, 1, false, false>>(a, where, error) ||
         run<Form<Number, 64, 2, false, false>>(a, where, error) ||
         run<Form<Number, 64, 1, false, true>>(a, where, error) ||
         run<Form<Number, 64, 2, false, true>>(a, where, error) ||
         run<Form<Number, 64, 1, true, false>>(a, where, error);
}

}  // namespace

Error forward_split(const HopperForward& a, const Launch& where) {
  Error error = cudaErrorInvalidValue;
  if (a.value_depth <= 2 * kValues) {
    run_any<Bfloat16>(a, where, error) || run_any<Float16>(a, where, error);
  }
  return error;
}

}  // namespace nlk::cuda::hopper
