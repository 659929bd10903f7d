// Bulk copies between global and shared memory and between the CTAs of a cluster, and L2 prefetches
// (sm_90).
//
// One row is one copy: a multiple of 16 bytes at addresses that are multiples of 16. CuTe's
// SM90_BULK_COPY_G2S and ..._S2G carry no cache hint, and the hints are worth 2 to 15 % here
// (docs/kernels.md), so these are thin wrappers of the same instructions with the hint.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_COPY_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_COPY_CUH_

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>

#include "cuda/device/hopper_barrier.cuh"
#include "cuda/hopper_plan.h"

namespace flash_attn_res::cuda::hopper {

/// L2 eviction priority as the instructions take it.
struct CachePolicy {
  uint64_t bits;

  explicit __device__ __forceinline__ CachePolicy(CacheHint hint) {
    switch (hint) {
      case CacheHint::kEvictFirst:
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(bits));
        break;
      case CacheHint::kEvictLast:
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(bits));
        break;
      default:
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(bits));
        break;
    }
  }
};

/// Starts loading a row; its bytes count towards the barrier.
__device__ __forceinline__ void load_row(void* shared, const void* global, int bytes,
                                         Barrier& barrier, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(cute::cast_smem_ptr_to_uint(shared)),
      "l"(global), "r"(bytes), "r"(barrier.address()), "l"(policy.bits)
      : "memory");
}

/// Starts storing a row, as part of this thread's current group of stores.
__device__ __forceinline__ void store_row(void* global, const void* shared, int bytes,
                                          CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
          global),
      "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes), "l"(policy.bits)
      : "memory");
}

/// Asks for a row to be brought into L2.
__device__ __forceinline__ void prefetch_row(const void* global, int bytes, CachePolicy policy) {
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(global),
               "r"(bytes), "l"(policy.bits)
               : "memory");
}

/// Asks for the cache line of an address.
__device__ __forceinline__ void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}

/// Closes this thread's group of stores.
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until all of this thread's groups but the last `kLast` have read shared memory.
template <int kLast>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLast) : "memory");
}

/// Waits until this thread's stores are complete.
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// Orders this thread's ordinary accesses to shared memory before later bulk copies.
__device__ __forceinline__ void fence_before_bulk_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Starts copying `bytes` of this CTA's shared memory to the same place of CTA `rank` of the
/// cluster; they count towards that CTA's `barrier`. One lane a peer does it: storing to each peer
/// from all lanes took the softmax warp 0.8 us a step with eight CTAs.
__device__ __forceinline__ void copy_to_peer(void* shared, int bytes, Barrier& barrier, int rank) {
  const uint32_t here = cute::cast_smem_ptr_to_uint(shared);
  const uint32_t peer = static_cast<uint32_t>(rank);
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(cute::set_block_rank(here, peer)),
      "r"(here), "r"(bytes), "r"(cute::set_block_rank(barrier.address(), peer))
      : "memory");
}

/// Starts storing 16 bytes to the same place of CTA `rank` of the cluster; they count towards that
/// CTA's `barrier`. Sooner there than a bulk copy: for the few sums that one lane a quad sends.
__device__ __forceinline__ void store_to_peer(float* shared, const float4& values, Barrier& barrier,
                                              int rank) {
  const uint32_t peer = static_cast<uint32_t>(rank);
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(shared), peer)),
      "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w),
      "r"(cute::set_block_rank(barrier.address(), peer))
      : "memory");
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_COPY_CUH_
