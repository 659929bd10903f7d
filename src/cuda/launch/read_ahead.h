// The usual `read` of many tokens, and how a kernel that copies rows ahead is launched.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_

#include <cstdint>

#include "cuda/launch/launch.h"
#include "cuda/policy.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {

/// Runs the whole call with the rows of tokens copied ahead, if that serves it and is faster.
/// `storage` is that of the rows; `lse`: where the call is an `attend` with one query.
bool run_read_ahead(Call& call, const ReadArgs& args, UniformType storage, FloatView lse = {});

/// Whether there are so many tokens that rows are copied ahead. Otherwise a token a block is as
/// fast, or spread over several: its grids overlap, and one advance after the other in a graph (D =
/// 7168, T = 2048) takes 42 us instead of 44. Of more terms the rows are many, and a
/// multiprocessor's second token is worth it: a Kimi K3 site takes 16.7 us instead of 19.0 at T =
/// 256, 96 instead of 101 at 2048.
inline bool is_many(int64_t tokens, int64_t terms, bool update, const DeviceLimits& limits) {
  const int least = terms > 2 ? 1 : update ? 16 : 3;
  return limits.major >= 8 && tokens >= least * limits.multiprocessors;
}

/// Launches a kernel of read_ahead.cuh; Ahead is its ReadAheadParams.
template <class Ahead, class Params>
void launch_ahead(Call& call, void (*kernel)(Ahead), const ReadAheadPolicy& policy, int64_t tokens,
                  const Params& params) {
  const unsigned resident =
      call.resident_blocks(kernel, policy.threads, policy.shared_bytes, tokens);
  const ReadAheadBands bands = read_ahead_bands(tokens, resident, call.limits().multiprocessors);
  const Ahead ahead = {params, bands.stride, bands.count};
  call.launch_with({.overlap = true}, kernel, dim3(bands.stride * bands.bands),
                   dim3(static_cast<unsigned>(policy.threads)), policy.shared_bytes, ahead);
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_READ_AHEAD_H_
