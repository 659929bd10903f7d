// What the library chose, in words: for `flash-attn-res doctor`.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace flash_attn_res::torch_binding {
namespace {

/// The instruction set of the CPU kernels: "portable", "neon", "avx2", "avx512", "avx512_bf16".
std::string cpu_kernels_op() { return cpu::name_of(cpu::active_isa()); }

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_res, m) { m.def("cpu_kernels() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&flash_attn_res::torch_binding::cpu_kernels_op));
}
