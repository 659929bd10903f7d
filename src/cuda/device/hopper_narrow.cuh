// float8 sources on their way to the tensor cores (sm_90): widened to bfloat16 in registers.
//
//   v[d] = scale[d / W] q[d]        exact in bfloat16: scales are powers of two, q has 4 bits
//
// Two at a time: the bits of q under the exponent of bfloat16 leave a factor 2^(127 - 7), which one
// product takes away, and a second one multiplies by the scale. A q that is NaN has no such bits:
// P1 of the forward looks for one and makes the token's logits NaN, and with them all that follows.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/device/hopper_mma.cuh"
#include "cuda/hopper_plan.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cuda::hopper {

using Fp8 = __nv_fp8_e4m3;

template <class Source>
inline constexpr bool kIsNarrow = sizeof(Source) == 1;

/// Scales of N sources: [T, groups] float8_e8m0 each.
struct ScaleTable {
  const uint8_t* data[kSourcesMax];
  int64_t stride;  // the same for all
  int shift;       // 2^shift columns share a scale

  void set(int64_t n, const ConstMatrix& matrix) {
    data[n] = static_cast<const uint8_t*>(matrix.data);
    stride = matrix.stride;
  }
  /// The columns that share a scale: kScaleGroup, or all of them.
  void set_columns(int64_t count) { shift = count <= kScaleGroup ? 7 : 30; }
  FLASH_ATTN_RES_HOPPER_BOTH int columns() const { return 1 << shift; }
};
static_assert(kScaleGroup == 1 << 7);

/// 2^(bits - 127) in bfloat16; 255 is NaN.
__device__ __forceinline__ Bf16 bf16_scale(uint32_t bits) {
  const uint32_t number = bits == 0 ? 0x0040u : bits << 7;
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits == 0xffu ? 0x7fc0u : number));
}

/// The scales of a token's sources for the CTA's columns, (N, pitch), by the lanes of a warp.
__device__ __forceinline__ void copy_scales(Bf16* to, int pitch, const ScaleTable& scales,
                                            int64_t t, int first_column, int columns,
                                            int num_sources, int lane) {
  const int first = first_column >> scales.shift;
  const int groups = ((first_column + columns - 1) >> scales.shift) - first + 1;
#pragma unroll 4  // loads of several are in flight at once
  for (int i = lane; i < num_sources * groups; i += 32) {
    const int n = i / groups;
    const int group = i % groups;
    to[n * pitch + group] = bf16_scale(__ldg(scales.data[n] + t * scales.stride + first + group));
  }
}

/// Two e4m3 numbers as bfloat16, divided by 2^120. NaN becomes a number: see NarrowStrips.
__device__ __forceinline__ uint32_t spread_e4m3(uint32_t pair) {
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);  // each on top of 16 bits
  return (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
}

__device__ __forceinline__ uint32_t times_power(uint32_t pair, __nv_bfloat162 scale) {
  const __nv_bfloat162 bias = __bfloat162bfloat162(__ushort_as_bfloat16(0x7b80));  // 2^120
  const __nv_bfloat162 product =
      __hmul2(__hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), bias), scale);
  return reinterpret_cast<const uint32_t&>(product);
}

/// An 8x8 block, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t block) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(block));
  return result;
}

/// A warp's slice of the float8 sources of one token, eight sources at a time.
template <int kSourceGroups>
class NarrowStrips {
 public:
  /// `rows`: the first source's columns of this CTA, `pitch` bytes apart; `scales`: (N,
  /// scale_pitch); `first`: the warp's first column in the CTA, a multiple of 16.
  __device__ __forceinline__ NarrowStrips(const char* rows, int pitch, int num_sources,
                                          const Bf16* scales, int scale_pitch, int scale_shift,
                                          int cta_column, int first, int lane)
      : shift_(scale_shift), column_(cta_column + first), group_(cta_column >> scale_shift) {
#pragma unroll
    for (int g = 0; g < kSourceGroups; ++g) {
      const int n = 8 * g + lane / 4;
      const int row = n < num_sources ? n : 0;
      row_[g] = rows + row * pitch + first + lane % 4 * 2;
      scale_[g] = scales + row * scale_pitch;
      seen_[g] = 0;
    }
  }

  /// Columns [16 j, 16 j + 16) of the slice, of sources [8 g, 8 g + 8).
  __device__ __forceinline__ Strip load(int g, int j) {
    const __nv_bfloat162 scale =
        __bfloat162bfloat162(scale_[g][((column_ + j * 16) >> shift_) - group_]);
    const auto at = [&](int column) {
      return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(row_[g] + column));
    };
    const uint32_t left = spread_e4m3(at(j * 16));
    const uint32_t right = spread_e4m3(at(j * 16 + 8));
    // A NaN, 0x7f of either sign, and it alone, carries into bit 11 of its half.
    seen_[g] |= ((left & 0x7fff7fffu) + 0x00100010u) | ((right & 0x7fff7fffu) + 0x00100010u);
    return {times_power(left, scale), times_power(right, scale)};
  }
  __device__ __forceinline__ Strip load_transposed(int g, int j) {
    const Strip strip = load(g, j);
    return {transpose(strip.left), transpose(strip.right)};
  }

  /// Whether `load` has met a NaN in source 8 g + lane / 4.
  __device__ __forceinline__ bool met_nan(int g) const {
    uint32_t seen = seen_[g] & 0x08000800u;
    seen |= __shfl_xor_sync(0xffffffffu, seen, 1);
    seen |= __shfl_xor_sync(0xffffffffu, seen, 2);
    return seen != 0;
  }

 private:
  const char* row_[kSourceGroups];
  const Bf16* scale_[kSourceGroups];
  uint32_t seen_[kSourceGroups];
  int shift_, column_, group_;
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_
