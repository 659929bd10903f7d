// Thread block clusters (sm_90 and later): the blocks that share a token, and what they send into
// one another's shared memory. Below sm_90 every block is its own cluster and sends nothing.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_CLUSTER_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_CLUSTER_CUH_

#include <cstdint>

namespace flash_attn_res::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// How many blocks this block's cluster has, and its place among them.
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// The two halves of a barrier over the cluster, for every thread: the first orders mailboxes
/// opened before it and nothing else.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Counts, in shared memory, the bytes that the blocks of a cluster send to this one. It is used
/// once. Sending needs no fence: a store and its count arrive together.
struct Mailbox {
  uint64_t state;

  /// By one thread; a barrier over the cluster must lie between this and the first `send`.
  __device__ __forceinline__ void open(uint32_t bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address()) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  /// Stores `value` to the same place of block `rank`'s shared memory and tells its mailbox.
  __device__ __forceinline__ void send(float* place, float value, unsigned rank) {
    const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(place));
    asm volatile(
        "{\n .reg .b32 place, box;\n"
        " mapa.shared::cluster.u32 place, %0, %2;\n"
        " mapa.shared::cluster.u32 box, %1, %2;\n"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [place], %3, [box];\n}" ::"r"(
            local),
        "r"(address()), "r"(rank), "r"(__float_as_uint(value))
        : "memory");
  }

  /// Waits until all that was expected has come.
  __device__ __forceinline__ void wait() {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n .reg .pred p;\n"
          " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
          " selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address())
          : "memory");
    }
  }

 private:
  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
  }
};

/// Which cluster of the grid this is, for clusters of 1, 2, 4 or 8 blocks along x. (The compiler
/// takes %clusterid from a division in float32, which is off beyond 2^24 blocks.)
__device__ __forceinline__ unsigned cluster_id() {
  return blockIdx.x >> (__ffs(static_cast<int>(cluster_size())) - 1);
}

#else

__device__ __forceinline__ unsigned cluster_id() { return blockIdx.x; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}

struct Mailbox {
  uint64_t state;

  __device__ __forceinline__ void open(uint32_t) {}
  __device__ __forceinline__ void send(float*, float, unsigned) {}
  __device__ __forceinline__ void wait() {}
};

#endif

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_CLUSTER_CUH_
