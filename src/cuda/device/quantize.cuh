// float32 values as float8 e4m3 with a scale.
//
//   scale     = max(amax / 448, 2^-126), with powers of two up to the next one
//   stored_d  = e4m3(x_d * (1 / scale))            nearest even, saturating at +-448
//
// Absolute values are compared as integers, in which NaN > Inf > every number: a NaN in a group
// reaches its scale.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_QUANTIZE_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_QUANTIZE_CUH_

#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/device/chunk.cuh"
#include "cuda/device/params.h"

namespace flash_attn_res::cuda {

__device__ __forceinline__ uint32_t absolute_bits(float value) {
  return __float_as_uint(value) & 0x7fffffffu;
}

/// The bits of the largest absolute value of a chunk.
__device__ __forceinline__ uint32_t largest_bits(const Chunk& c) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    largest = max(largest, absolute_bits(c.v[i]));
  }
  return largest;
}

/// The scale of a group whose largest absolute value has these bits.
__device__ __forceinline__ float group_scale(uint32_t largest, bool power_of_two) {
  const float ratio = __fdiv_rn(__uint_as_float(largest), 448.0f);
  const float scale = ratio < 0x1p-126f ? 0x1p-126f : ratio;
  const uint32_t bits = __float_as_uint(scale);
  const bool finite = bits < 0x7f800000u;
  return power_of_two && finite ? __uint_as_float((bits + 0x7fffffu) & 0x7f800000u) : scale;
}

/// Stores chunk `chunk` of a row of float8, aligned to 8 bytes. `inverse` is 1 / scale.
__device__ __forceinline__ void store_fp8_chunk(const RowRef& row, unsigned chunk, const Chunk& c,
                                                float inverse) {
  uint32_t words[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const float2 low = {c.v[4 * w] * inverse, c.v[4 * w + 1] * inverse};
    const float2 high = {c.v[4 * w + 2] * inverse, c.v[4 * w + 3] * inverse};
    words[w] = __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
               static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3))
                   << 16;
  }
  *reinterpret_cast<uint2*>(row.data + static_cast<uint64_t>(chunk) * kChunk) = {words[0],
                                                                                 words[1]};
}

/// Bits of the power of two that a group is divided by (include/flash_attn_res/quantize.h), from
/// the bits of its largest absolute value.
__device__ __forceinline__ uint32_t storage_exponent(uint32_t largest, bool half) {
  if (largest >= 0x7f800000u) {
    return 0xffu;  // NaN
  }
  // 448 is 1.75 2^8.
  const int shift = half ? 14 : (largest & 0x7fffffu) > 0x600000u ? 7 : 8;
  return static_cast<uint32_t>(max(static_cast<int>(largest >> 23) - shift, 1));
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_QUANTIZE_CUH_
