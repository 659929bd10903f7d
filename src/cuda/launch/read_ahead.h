// The usual `read` of many tokens.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_

#include "cuda/launch/launch.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {

/// Runs the whole call with the rows of tokens copied ahead, if that serves it and is faster.
/// `storage` is that of the rows; `lse`: where the call is an `attend` with one query.
bool run_read_ahead(Call& call, const ReadArgs& args, UniformType storage, FloatView lse = {});

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_
