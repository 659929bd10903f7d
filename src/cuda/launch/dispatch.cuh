// From a dtype known at run time to the storage type that a kernel is compiled for.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_DISPATCH_CUH_
#define FLASH_ATTN_RES_CUDA_LAUNCH_DISPATCH_CUH_

#include "cuda/device/chunk.cuh"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cuda {

/// Whether a dtype is one of the 16-bit ones.
inline bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

/// Calls function.operator()<T>() with the storage type of a kernel; kNone: AnyType.
template <class Function>
void dispatch_storage(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return function.template operator()<__half>();
    case DType::kFloat32:
      return function.template operator()<float>();
    default:
      return function.template operator()<AnyType>();
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_DISPATCH_CUH_
