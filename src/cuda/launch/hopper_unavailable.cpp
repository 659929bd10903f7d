// The Hopper paths of a build without code for sm_90a or without the CUTLASS headers: they serve
// nothing, and the general kernels run instead.

#include <string>

#include "cuda/hopper.h"

namespace flash_attn_res::cuda::hopper {
namespace {

Status unavailable(const char* op) {
  return {StatusCode::kUnsupportedDevice,
          std::string(op) + ": this build of flash_attn_res has no Hopper kernels"};
}

}  // namespace

bool serves(const AttendArgs&, int, int) { return false; }
bool run_attend_few(Call&, const AttendArgs&) { return false; }
bool serves(const AttendBackwardArgs&, int, int) { return false; }
bool serves(const ReadBackwardArgs&, const DeviceLimits&) { return false; }

int64_t attend_workspace_bytes(const AttendArgs&) { return 0; }
int64_t attend_backward_workspace_bytes(const AttendBackwardArgs&) { return 0; }

Status attend(const AttendArgs&, const Context&, const Plan*) { return unavailable("attend"); }

Status attend_backward(const AttendBackwardArgs&, const Context&, const Plan*) {
  return unavailable("attend_backward");
}

unsigned run_read_backward(Call&, const ReadBackwardArgs&, const ReadBackwardShape&,
                           const ReadBackwardScratch&, const ReadBackwardPlan*) {
  return 0;
}

}  // namespace flash_attn_res::cuda::hopper
