// Pacing of the blocks of a persistent grid (sm_90).

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_WINDOW_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_WINDOW_CUH_

#include <cstdint>

#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda::hopper {

/// Keeps clusters from running ahead of each other, so that all of them read one narrow band of
/// memory: when they drift apart, DRAM pages are reopened, at a cost of up to 15 % of the time. A
/// hint only: it never decides what is computed, and a wait that takes some 50 us is the last.
class Window {
 public:
  /// `lead`: tokens, counted over all clusters, by which one may run ahead. CTA 0 starts the
  /// counter with the `first` tokens that the clusters load before they count. Nothing but time
  /// orders this before the others' counting.
  __device__ __forceinline__ Window(int* issued, int64_t lead, int first)
      : issued_(issued), lead_(lead) {
    if (blockIdx.x == 0 && threadIdx.x % kWarp == 0) {
      asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(issued_), "r"(first) : "memory");
    }
  }

  /// A cluster is about to load so many tokens.
  __device__ __forceinline__ void count(int tokens) const {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(issued_), "r"(tokens) : "memory");
  }

  /// Waits until token t, counted over all clusters, is within the window.
  __device__ __forceinline__ void wait(int64_t t) {
    int tries = 0;
    for (; tries < kTries && t > seen_ + lead_; ++tries) {
      int now;
      asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(issued_) : "memory");
      seen_ = now;
    }
    if (tries == kTries) {
      lead_ = INT64_MAX / 2;  // some cluster is not running
    }
  }

 private:
  static constexpr int kTries = 64;

  int* issued_;  // tokens that all clusters have begun to load
  int64_t lead_;
  int64_t seen_ = 0;  // the last reading
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_WINDOW_CUH_
