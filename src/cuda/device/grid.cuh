// Grids that follow one another on a stream (programmatic dependent launch, sm_90 and later). A
// kernel launched with LaunchOptions::overlap may start while the grid before it still runs, and
// below these calls do nothing.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_GRID_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_GRID_CUH_

namespace flash_attn_res::cuda {

/// Whether there is anything between a block's beginning and the end of the grid before it.
__device__ constexpr bool grids_overlap() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

/// From here on the next grid's blocks may take the place that this grid leaves. They see none of
/// its results before they have waited for its end, wherever this is called.
__device__ __forceinline__ void begin_next_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the grid before this one has ended and its results can be read. It comes before the
/// first access to global memory.
__device__ __forceinline__ void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_GRID_CUH_
