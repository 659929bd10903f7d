// Barriers in shared memory on which bulk copies and warps of one CTA or cluster complete (sm_90).
//
// A barrier completes a phase when all its arrivals and all its expected bytes are in; phases
// alternate 0, 1, 0, ... and a wait names the parity it waits for. CuTe has the same instructions
// (cute::wait_barrier and others) but without a memory clobber: ordinary loads of what a barrier
// guards could then move above the wait. These wrappers have it.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_BARRIER_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_BARRIER_CUH_

#include <cstdint>
#include <cute/arch/util.hpp>

namespace flash_attn_res::cuda::hopper {

/// One mbarrier.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ uint32_t address() const {
    return cute::cast_smem_ptr_to_uint(&state);
  }

  /// By one thread, before any other use and before `publish_barriers`.
  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }

  /// Arrives, and makes the phase wait for `bytes` of asynchronous writes as well.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }

  /// Whether the phase of this parity is complete. A yes makes visible what a wait would.
  __device__ __forceinline__ bool test(uint32_t parity) const {
    uint32_t done;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done != 0;
  }

  /// Waits for the phase of this parity; makes writes of this CTA's arrivers visible.
  __device__ __forceinline__ void wait(uint32_t parity) {
    spin([&] {
      uint32_t done;
      asm volatile(
          "{\n .reg .pred p;\n"
          " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          " selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
      return done != 0;
    });
  }

  /// The same for writes that came from other CTAs of the cluster.
  __device__ __forceinline__ void wait_cluster(uint32_t parity) {
    spin([&] {
      uint32_t done;
      asm volatile(
          "{\n .reg .pred p;\n"
          " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          " selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
      return done != 0;
    });
  }

 private:
  template <class Done>
  static __device__ __forceinline__ void spin(Done done) {
#ifdef FLASH_ATTN_RES_BOUNDED_SPINS
    // For tests of the kernels themselves: a protocol error then fails instead of hanging.
    for (int64_t tries = 0; !done(); ++tries) {
      if (tries > (int64_t{1} << 24)) {
        __trap();
      }
    }
#else
    while (!done()) {
    }
#endif
  }
};

/// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Where a warp stands in a ring of buffers: the slot, and the parity of the slot's current phase.
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int depth) {
    if (++slot == depth) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// A step's buffer of a pair that alternates, and the parity of the phase.
__device__ __forceinline__ int pair_slot(int step) { return step & 1; }
__device__ __forceinline__ uint32_t pair_parity(int step) {
  return static_cast<uint32_t>(step >> 1) & 1;
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_BARRIER_CUH_
