// The PyTorch operators flash_attn_res::{stochastic_add, stochastic_add_into}: a float32 sum of
// values [..., D], rounded to bfloat16 stochastically (stochastic.h). seed is an int64 tensor [2]
// of seed and step on the device of the values. stochastic_add_into writes to memory of the
// caller's, which may be that of a term.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "bindings/torch/context.h"
#include "bindings/torch/convert.h"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res::torch_binding {
namespace {

void stochastic_add_into_op(std::vector<Tensor> terms, Tensor seed, int64_t site, Tensor out) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.size(0) == 2 &&
                      seed.is_contiguous(),
                  "flash_attn_res: stochastic_add: seed is no contiguous int64 tensor [2]");
  STD_TORCH_CHECK(
      seed.is_cuda() == out.is_cuda() && (!out.is_cuda() || seed.get_device() == out.get_device()),
      "flash_attn_res: stochastic_add: seed is on another device than the terms");
  Views views;
  const std::vector<ConstMatrix> term_views = views.read_values(terms);
  StochasticAddArgs args;
  args.terms = term_views;
  args.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  args.site = site;
  args.out = write_value(out);
  check(stochastic_add(args, CallContext(out, 0).get()));
}

Tensor stochastic_add_op(std::vector<Tensor> terms, Tensor seed, int64_t site) {
  STD_TORCH_CHECK(!terms.empty(), "flash_attn_res: stochastic_add: terms has 0 items");
  Tensor out = torch::stable::new_empty(terms[0], terms[0].sizes(), ScalarType::BFloat16);
  stochastic_add_into_op(terms, seed, site, out);
  return out;
}

void implement(auto& library) {
  library.impl("stochastic_add", TORCH_BOX(&stochastic_add_op));
  library.impl("stochastic_add_into", TORCH_BOX(&stochastic_add_into_op));
}

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_res, m) {
  m.def("stochastic_add(Tensor[] terms, Tensor seed, int site) -> Tensor");
  m.def("stochastic_add_into(Tensor[] terms, Tensor seed, int site, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CPU, m) { flash_attn_res::torch_binding::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CUDA, m) { flash_attn_res::torch_binding::implement(m); }
