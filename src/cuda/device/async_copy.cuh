// Asynchronous copies from global to shared memory (sm_80 and later).

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_ASYNC_COPY_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_ASYNC_COPY_CUH_

#include <cstdint>

namespace flash_attn_res::cuda {

/// Copies 16 bytes past L1, which holds none of what is read once.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/// An address of shared memory that the compiler keeps in a register, where it would form that of a
/// pointer anew for every copy.
struct SharedAddress {
  uint32_t bytes;

  explicit __device__ __forceinline__ SharedAddress(const void* shared)
      : bytes(static_cast<uint32_t>(__cvta_generic_to_shared(shared))) {}

  /// Copies 16 bytes to this address + offset, past L1; or 8, which only go through it.
  template <int kBytes>
  __device__ __forceinline__ void copy_async(uint32_t offset, const void* global) const {
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(bytes + offset), "l"(global)
                   : "memory");
    } else {
      static_assert(kBytes == 8);
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(bytes + offset), "l"(global)
                   : "memory");
    }
  }
  /// What lies at this address + offset.
  __device__ __forceinline__ void load(uint32_t offset, uint4& bits) const {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(bytes + offset)
                 : "memory");
  }
  __device__ __forceinline__ void load(uint32_t offset, uint2& bits) const {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "r"(bytes + offset)
                 : "memory");
  }
  __device__ __forceinline__ uint4 load(uint32_t offset) const {
    uint4 bits;
    load(offset, bits);
    return bits;
  }
};

/// `copy_async` through L1, for pieces whose 32-byte sector is fetched by two instructions.
__device__ __forceinline__ void copy_async_cached(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/// Copies one float.
__device__ __forceinline__ void copy_float(float* shared, const float* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

/// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// The same for a count known at run time, up to 3.
__device__ __forceinline__ void wait_copies(int pending) {
  switch (pending) {
    case 0:
      return wait_copies<0>();
    case 1:
      return wait_copies<1>();
    case 2:
      return wait_copies<2>();
    default:
      return wait_copies<3>();
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_ASYNC_COPY_CUH_
