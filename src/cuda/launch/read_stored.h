// `read` over a stored bank: sources with scales, and a partial sum in bfloat16 or none.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_READ_STORED_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_READ_STORED_H_

#include "cuda/launch/launch.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {

/// Runs the whole call with the rows of a token in registers, if it has up to nine sources in
/// float8 or float16 with scales and a partial sum behind them, or up to ten in float16 alone and
/// no norm, x and all else in bfloat16, and is otherwise a usual one (UsualRead), from sm_90 on.
/// Whether it does is a question of a token's shape, not of how many there are. `lse`: where the
/// call is an `attend` with one query.
bool run_read_stored(Call& call, const ReadArgs& args, FloatView lse = {});

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_READ_STORED_H_
