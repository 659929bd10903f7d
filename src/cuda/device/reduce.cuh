// Sums and maxima over the lanes of a warp, in a fixed order: the same inputs give the same bits.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_REDUCE_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_REDUCE_CUH_

namespace flash_attn_res::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// Sum over groups of `width` neighbouring lanes (a power of two), in every lane.
__device__ __forceinline__ float warp_sum(float value, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

/// One halving step: lanes whose bit kOffset is set keep the upper kHalf values, the others the
/// lower.
template <int kHalf, int kOffset, int kCount>
__device__ __forceinline__ void scatter_steps(float (&values)[kCount], int lane) {
  if constexpr (kHalf > 0) {
    const bool upper = (lane & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i];
      const float sent = upper ? values[i] : values[i + kHalf];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kOffset);
    }
    scatter_steps<kHalf / 2, kOffset / 2>(values, lane);
  }
}

/// Sums kCount values over the warp at once: lane l returns the sum of values[l / (32 / kCount)].
/// Each step halves the values that a lane still carries, so that 32 sums take 31 shuffles, not
/// 160.
template <int kCount>
__device__ __forceinline__ float warp_sum_scatter(float (&values)[kCount]) {
  static_assert(kCount <= kWarp && (kCount & (kCount - 1)) == 0);
  scatter_steps<kCount / 2, kWarp / 2>(values, static_cast<int>(threadIdx.x) % kWarp);
  return warp_sum(values[0], kWarp / kCount);
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_REDUCE_CUH_
