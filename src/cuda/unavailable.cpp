// The CUDA backend of a build without CUDA: it says so.

#include <string>

#include "cuda/backend.h"

namespace flash_attn_res::cuda {
namespace {

Status unavailable(const char* op) {
  return {StatusCode::kUnsupportedDevice,
          std::string(op) +
              ": this build of flash_attn_res has no CUDA kernels; build it where nvcc is found"};
}

}  // namespace

int64_t attend_workspace_bytes(const AttendArgs&) { return 0; }
Status attend(const AttendArgs&, const Context&) { return unavailable("attend"); }

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs&) { return 0; }
Status attend_backward(const AttendBackwardArgs&, const Context&) {
  return unavailable("attend_backward");
}

int64_t read_workspace_bytes(const ReadArgs&) { return 0; }
Status read(const ReadArgs&, const Context&) { return unavailable("read"); }

int64_t read_backward_workspace_bytes(const ReadBackwardArgs&) { return 0; }
Status read_backward(const ReadBackwardArgs&, const Context&) {
  return unavailable("read_backward");
}

Status stochastic_add(const StochasticAddArgs&, const Context&) {
  return unavailable("stochastic_add");
}
Status quantize(const QuantizeArgs&, const Context&) { return unavailable("quantize"); }

}  // namespace flash_attn_res::cuda
