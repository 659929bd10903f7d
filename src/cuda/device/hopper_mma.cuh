// Tensor-core building blocks of the Hopper kernels, from CuTe's atoms.
//
// Everything is made of 8x8 blocks of 16-bit values. Of a block, lane l holds the pair of elements
// (l / 4, 2 * (l % 4)) and the next one, as one 32-bit register. A `Strip` is 8 rows by 16 columns
// of shared memory, two blocks side by side. Loaded as it lies it is the operand of a product that
// runs along the columns; loaded transposed it is the operand of a product along the rows.
//
// mma m16n8k16: A (16,16) is four blocks, B (16,8) two, C (16,8) four floats a lane: rows l / 4 and
// l / 4 + 8, columns 2 * (l % 4) and the next. A product over 8 instead of 16 (m16n8k8) takes half
// the blocks.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_MMA_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>

namespace flash_attn_res::cuda::hopper {

using Bf16 = __nv_bfloat16;

/// An 8 x 16 strip: its left and right block.
struct Strip {
  uint32_t left, right;
};

/// An accumulator tile of 16 x 8.
struct Accum {
  float c[4];

  static __device__ __forceinline__ Accum zero() { return {{0.0f, 0.0f, 0.0f, 0.0f}}; }
};

// ------------------------------------------------------------------------------- shared memory

// Lanes 0-7 give the rows of the first block, 8-15 those of the second, and so on: `row_in_strip`
// and `column_in_strip` say which row and which half a lane must point at.
__device__ __forceinline__ int row_in_strip(int lane) { return lane % 8; }
__device__ __forceinline__ int column_in_strip(int lane) { return lane / 8 % 2 * 8; }

__device__ __forceinline__ const cute::uint128_t& as_vector(const void* shared) {
  return *static_cast<const cute::uint128_t*>(shared);
}

/// Two strips; lanes 0-15 point at the first, 16-31 at the second.
__device__ __forceinline__ void load_strips(const void* shared, Strip& first, Strip& second) {
  cute::SM75_U32x4_LDSM_N::copy(as_vector(shared), first.left, first.right, second.left,
                                second.right);
}
__device__ __forceinline__ void load_strip(const void* shared, Strip& strip) {
  cute::SM75_U32x2_LDSM_N::copy(as_vector(shared), strip.left, strip.right);
}

/// Two strips as the rows 0-7 and 8-15 of a left operand, in the registers that it takes; lanes 0-7
/// and 16-23 point at the first, the others at the second, and lanes 0-15 at the left blocks.
__device__ __forceinline__ void load_rows(const void* shared, Strip& top, Strip& bottom) {
  cute::SM75_U32x4_LDSM_N::copy(as_vector(shared), top.left, bottom.left, top.right, bottom.right);
}

/// The same as load_strips and load_strip with every block transposed.
__device__ __forceinline__ void load_strips_transposed(const void* shared, Strip& first,
                                                       Strip& second) {
  cute::SM75_U16x8_LDSM_T::copy(as_vector(shared), first.left, first.right, second.left,
                                second.right);
}
__device__ __forceinline__ void load_strip_transposed(const void* shared, Strip& strip) {
  cute::SM75_U16x4_LDSM_T::copy(as_vector(shared), strip.left, strip.right);
}

/// Stores a strip that is held transposed.
__device__ __forceinline__ void store_strip_transposed(void* shared, Strip strip) {
  cute::SM90_U16x4_STSM_T::copy(strip.left, strip.right, *static_cast<cute::uint128_t*>(shared));
}

// ------------------------------------------------------------------------------------ products

/// c (16,8) += a (16,16) * b (16,8), bfloat16. `a_top` and `a_bottom` are two strips as loaded:
/// rows 0-7 and 8-15 of a.
__device__ __forceinline__ void mma_rows(Accum& c, Strip a_top, Strip a_bottom, Strip b) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a_top.left,
                                            a_bottom.left, a_top.right, a_bottom.right, b.left,
                                            b.right, c.c[0], c.c[1], c.c[2], c.c[3]);
}

/// The same in float16.
__device__ __forceinline__ void mma_rows_half(Accum& c, Strip a_top, Strip a_bottom, Strip b) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a_top.left, a_bottom.left,
                                          a_top.right, a_bottom.right, b.left, b.right, c.c[0],
                                          c.c[1], c.c[2], c.c[3]);
}

/// c (16,8) += a (16,16) * b (16,8), bfloat16. `a0` and `a1` are two strips loaded transposed:
/// columns 0-7 and 8-15 of a; `b0` and `b1` are the rows 0-7 and 8-15 of b.
__device__ __forceinline__ void mma_columns(Accum& c, Strip a0, Strip a1, uint32_t b0,
                                            uint32_t b1) {
  cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a0.left, a0.right,
                                            a1.left, a1.right, b0, b1, c.c[0], c.c[1], c.c[2],
                                            c.c[3]);
}

/// The same over 8 only.
__device__ __forceinline__ void mma_columns(Accum& c, Strip a0, uint32_t b0) {
  cute::SM80_16x8x8_F32BF16BF16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a0.left, a0.right, b0,
                                           c.c[0], c.c[1], c.c[2], c.c[3]);
}

/// The same in float16.
__device__ __forceinline__ void mma_columns_half(Accum& c, Strip a0, Strip a1, uint32_t b0,
                                                 uint32_t b1) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a0.left, a0.right,
                                          a1.left, a1.right, b0, b1, c.c[0], c.c[1], c.c[2],
                                          c.c[3]);
}
__device__ __forceinline__ void mma_columns_half(Accum& c, Strip a0, uint32_t b0) {
  cute::SM80_16x8x8_F32F16F16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a0.left, a0.right, b0,
                                         c.c[0], c.c[1], c.c[2], c.c[3]);
}

// ------------------------------------------------------------------------------------- numbers

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

/// Two floats as two bfloat16 each: the value rounded, and its remainder rounded, which leaves
/// 2^-17 of the value.
struct SplitPair {
  uint32_t high, low;

  static __device__ __forceinline__ SplitPair of(float x, float y) {
    const uint32_t high = pack_bf16(x, y);
    return {high, pack_bf16(x - low_bf16(high), y - high_bf16(high))};
  }
};

/// The same in float16, which leaves 2^-22 of the value, but no less than 2^-25.
struct SplitHalfPair {
  uint32_t high, low;

  static __device__ __forceinline__ SplitHalfPair of(float x, float y) {
    const __half2 high = __floats2half2_rn(x, y);
    const float2 rounded = __half22float2(high);
    return {reinterpret_cast<const uint32_t&>(high), pack_half(x - rounded.x, y - rounded.y)};
  }
};

/// The power of two at or below a magnitude, and its inverse; clamped so that both are normal.
struct PowerOfTwo {
  float value, inverse;

  static __device__ __forceinline__ PowerOfTwo of(float magnitude) {
    const uint32_t exponent = min(max(__float_as_uint(magnitude) >> 23 & 0xffu, 1u), 253u);
    return {__uint_as_float(exponent << 23), __uint_as_float((254u - exponent) << 23)};
  }
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_MMA_CUH_
