// The PyTorch operator flash_attn_res::quantize_into: a float32 sum of values [..., D] as float16
// or float8_e4m3fn numbers with powers of two as scales (quantize.h), into memory of the caller's.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "bindings/torch/context.h"
#include "bindings/torch/convert.h"
#include "flash_attn_res/quantize.h"

namespace flash_attn_res::torch_binding {
namespace {

void quantize_into_op(std::vector<Tensor> terms, Tensor out, Tensor scale) {
  Views views;
  const std::vector<ConstMatrix> term_views = views.read_values(terms);
  QuantizeArgs args;
  args.terms = term_views;
  args.out = write_value(out);
  args.scale = write_value(scale);
  check(quantize(args, CallContext(out, 0).get()));
}

void implement(auto& library) { library.impl("quantize_into", TORCH_BOX(&quantize_into_op)); }

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_res, m) {
  m.def("quantize_into(Tensor[] terms, Tensor(a!) out, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CPU, m) { flash_attn_res::torch_binding::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CUDA, m) { flash_attn_res::torch_binding::implement(m); }
