// The Hopper kernels (sm_90a): which calls of phase 1 and of `read_backward` they serve, and how
// they are launched. Everything else is left to the general kernels.

#ifndef FLASH_ATTN_RES_CUDA_HOPPER_H_
#define FLASH_ATTN_RES_CUDA_HOPPER_H_

#include <cstdint>

#include "cuda/hopper_plan.h"
#include "cuda/hopper_read_backward_plan.h"
#include "cuda/kernels/read_params.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {
class Call;
struct DeviceLimits;
struct ReadBackwardScratch;
struct ReadBackwardShape;
}  // namespace flash_attn_res::cuda

namespace flash_attn_res::cuda::hopper {

/// Whether these kernels can run a call on a GPU of this compute capability: sm_90, bfloat16
/// sources, float16 ones or float8 ones with scales, bfloat16 outputs (or float16 ones, but from
/// bfloat16) and bfloat16 output gradients, bfloat16 or float32 source gradients, keys of full
/// width, rows aligned to 16 bytes, N <= 16, S <= 24, no probabilities asked for, and in the
/// backward all of dout, dsources and dqueries given. T > 0.
bool serves(const AttendArgs& args, int major, int minor);
bool serves(const AttendBackwardArgs& args, int major, int minor);

/// Scratch bytes of a call, whatever its device and alignment; 0 for shapes that are not served.
int64_t attend_workspace_bytes(const AttendArgs& args);
int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args);

/// Runs a call that is served with the kernel for few queries over few float8 sources (kFewQueries,
/// kFewSources), if it is one of those that have it. This is a question of a token's shape.
bool run_attend_few(Call& call, const AttendArgs& args);

/// Launch choices of a call; `clusters` is still to be set from the device.
Plan choose_attend(int64_t num_sources, int64_t num_queries, int64_t dim, SourceLayout layout = {});
Plan choose_attend_backward(int64_t num_sources, int64_t num_queries, int64_t dim,
                            int64_t gradient_bytes, SourceLayout layout = {});

/// Run a call that is served. `plan`: other launch choices than the policy's, for measurements.
Status attend(const AttendArgs& args, const Context& context, const Plan* plan = nullptr);
Status attend_backward(const AttendBackwardArgs& args, const Context& context,
                       const Plan* plan = nullptr);

/// Whether the Hopper kernel can run this `read_backward`: sm_90, K <= 32, one 16-bit dtype for all
/// values (dsources may be float32), rows aligned to 16 bytes, keys that begin at a multiple of
/// eight columns, dx given where there is a norm. T > 0.
bool serves(const ReadBackwardArgs& args, const DeviceLimits& limits);

/// Runs a call that is served, and returns how many rows of partial sums of dquery and dnorm_weight
/// it leaves in the scratch memory. `plan`: other launch choices than the policy's, for
/// measurements.
unsigned run_read_backward(Call& call, const ReadBackwardArgs& args, const ReadBackwardShape& shape,
                           const ReadBackwardScratch& scratch,
                           const ReadBackwardPlan* plan = nullptr);

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_HOPPER_H_
