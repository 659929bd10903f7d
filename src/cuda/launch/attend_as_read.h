// Phase 1 with one query is a one-shot read that also tells its lse.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_ATTEND_AS_READ_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_ATTEND_AS_READ_H_

#include "cuda/launch/launch.h"
#include "flash_attn_res/attend.h"

namespace flash_attn_res::cuda {

/// Runs the whole call with a kernel of `read` that keeps a token's rows in registers, if it has
/// one query and such a kernel serves it: the bits are then those of the read. Of sources with
/// scales run_read_stored (read_stored.h) serves some.
bool run_attend_as_read(Call& call, const AttendArgs& args);

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_ATTEND_AS_READ_H_
