// Phase 1 on Hopper (sm_90a): which calls its kernels serve, and how they are launched. Everything
// else is left to the general kernels.

#ifndef FLASH_ATTN_RES_CUDA_HOPPER_H_
#define FLASH_ATTN_RES_CUDA_HOPPER_H_

#include <cstdint>

#include "cuda/hopper_plan.h"
#include "flash_attn_res/attend.h"

namespace flash_attn_res::cuda::hopper {

/// Whether these kernels can run a call on a GPU of this compute capability: sm_90, bfloat16
/// sources, outputs and output gradients, bfloat16 or float32 source gradients, keys of full width,
/// rows aligned to 16 bytes, N <= 16, S <= 24, no probabilities asked for, and in the backward all
/// of dout, dsources and dqueries given. T > 0.
bool serves(const AttendArgs& args, int major, int minor);
bool serves(const AttendBackwardArgs& args, int major, int minor);

/// Scratch bytes of a call, whatever its device and alignment; 0 for shapes that are not served.
int64_t attend_workspace_bytes(const AttendArgs& args);
int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args);

/// Launch choices of a call; `clusters` is still to be set from the device.
Plan choose_attend(int64_t num_sources, int64_t num_queries, int64_t dim);
Plan choose_attend_backward(int64_t num_sources, int64_t num_queries, int64_t dim,
                            int64_t gradient_bytes);

/// Run a call that is served. `plan`: other launch choices than the policy's, for measurements.
Status attend(const AttendArgs& args, const Context& context, const Plan* plan = nullptr);
Status attend_backward(const AttendBackwardArgs& args, const Context& context,
                       const Plan* plan = nullptr);

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_HOPPER_H_
