// Sums over the warps of a block.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_BLOCK_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_BLOCK_CUH_

namespace flash_attn_res::cuda {

/// Barrier over the block; a block of one warp needs the lighter one.
__device__ __forceinline__ void block_barrier(int warps) {
  if (warps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

/// Sum over warps of sums[w * stride], in order.
__device__ __forceinline__ float sum_over_warps(const float* sums, int warps, int stride) {
  float total = 0.0f;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    total += sums[w * stride];
  }
  return total;
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_BLOCK_CUH_
