// Vectors of 4 floats on AArch64. The contract of these functions is in simd/target.h.

#ifndef FLASH_ATTN_RES_CPU_SIMD_NEON_H_
#define FLASH_ATTN_RES_CPU_SIMD_NEON_H_

#include <arm_neon.h>

#include "cpu/simd/target.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 32;
inline constexpr int kStreamAlign = 16;  // bytes; streaming stores are plain stores here

struct Vec {
  float32x4_t v;
};
struct IntVec {
  int32x4_t v;
};

FLASH_ATTN_RES_INLINE Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
FLASH_ATTN_RES_INLINE Vec load_floats(const float* p) { return {vld1q_f32(p)}; }
FLASH_ATTN_RES_INLINE void store_floats(float* p, Vec a) { vst1q_f32(p, a.v); }
FLASH_ATTN_RES_INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }

// Limits x to [low, high]; fmax and fmin return NaN when an operand is NaN.
FLASH_ATTN_RES_INLINE Vec clamp(Vec x, Vec low, Vec high) {
  return {vminq_f32(high.v, vmaxq_f32(low.v, x.v))};
}

FLASH_ATTN_RES_INLINE IntVec bits(Vec a) { return {vreinterpretq_s32_f32(a.v)}; }
FLASH_ATTN_RES_INLINE Vec floats(IntVec a) { return {vreinterpretq_f32_s32(a.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_broadcast(int x) { return {vdupq_n_s32(x)}; }
FLASH_ATTN_RES_INLINE IntVec int_add(IntVec a, IntVec b) { return {vaddq_s32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_sub(IntVec a, IntVec b) { return {vsubq_s32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec half_of(IntVec a) { return {vshrq_n_s32(a.v, 1)}; }
FLASH_ATTN_RES_INLINE IntVec to_exponent(IntVec a) { return {vshlq_n_s32(a.v, 23)}; }

FLASH_ATTN_RES_INLINE float reduce_add(Vec a) { return vaddvq_f32(a.v); }

struct Pair {
  Vec lo, hi;
};

FLASH_ATTN_RES_INLINE Pair in_registers(Pair a) { return a; }

FLASH_ATTN_RES_INLINE Pair load_f32(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {{vld1q_f32(f)}, {vld1q_f32(f + 4)}};
}
FLASH_ATTN_RES_INLINE void store_f32(void* p, Pair a) {
  float* f = static_cast<float*>(p);
  vst1q_f32(f, a.lo.v);
  vst1q_f32(f + 4, a.hi.v);
}
FLASH_ATTN_RES_INLINE void stream_f32(void* p, Pair a) { store_f32(p, a); }

FLASH_ATTN_RES_INLINE Pair load_bf16(const void* p) {
  // Loaded as bytes: rows may start at any address, and a byte load has no alignment to break.
  const uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16))},
          {vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(h), 16))}};
}

// Round to nearest even on the bits; a NaN is made quiet and keeps the top of its payload, because
// rounding it as a number could carry into Inf.
FLASH_ATTN_RES_INLINE uint16x4_t round_bf16(Vec a) {
  const uint32x4_t x = vreinterpretq_u32_f32(a.v);
  const uint32x4_t top = vshrq_n_u32(x, 16);
  const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
  const uint32x4_t bias = vaddq_u32(odd, vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(x, bias), 16);
  const uint32x4_t quiet = vorrq_u32(top, vdupq_n_u32(0x40));
  const uint32x4_t is_number = vceqq_f32(a.v, a.v);
  return vmovn_u32(vbslq_u32(is_number, rounded, quiet));
}
FLASH_ATTN_RES_INLINE void store_bf16(void* p, Pair a) {
  const uint16x8_t h = vcombine_u16(round_bf16(a.lo), round_bf16(a.hi));
  vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u16(h));
}
FLASH_ATTN_RES_INLINE void stream_bf16(void* p, Pair a) { store_bf16(p, a); }

// Widening and narrowing take one instruction in natural order: that is the split order here.
FLASH_ATTN_RES_INLINE Pair split(Pair a) { return a; }
FLASH_ATTN_RES_INLINE Pair join(Pair a) { return a; }
FLASH_ATTN_RES_INLINE Pair load_bf16_split(const void* p) { return load_bf16(p); }
FLASH_ATTN_RES_INLINE void store_bf16_split(void* p, Pair a) { store_bf16(p, a); }
FLASH_ATTN_RES_INLINE void stream_bf16_split(void* p, Pair a) { store_bf16(p, a); }

FLASH_ATTN_RES_INLINE Pair load_f16(const void* p) {
  const uint8x16_t bytes = vld1q_u8(static_cast<const uint8_t*>(p));
  return {{vcvt_f32_f16(vreinterpret_f16_u8(vget_low_u8(bytes)))},
          {vcvt_f32_f16(vreinterpret_f16_u8(vget_high_u8(bytes)))}};
}
// The magnitude of e4m3 under float32's exponent leaves a factor 2^(127 - 7); a product takes it
// away and normalises subnormal numbers.
FLASH_ATTN_RES_INLINE Vec widen_e4m3(int16x4_t numbers) {
  const uint32x4_t x = vreinterpretq_u32_s32(vshlq_n_s32(vmovl_s16(numbers), 20));
  const uint32x4_t placed = vandq_u32(x, vdupq_n_u32(0x87f00000u));
  const float32x4_t number = vmulq_f32(vreinterpretq_f32_u32(placed), vdupq_n_f32(0x1p120f));
  const uint32x4_t most = vdupq_n_u32(0x07f00000u);
  const uint32x4_t is_nan = vceqq_u32(vandq_u32(placed, most), most);
  const uint32x4_t nan = vorrq_u32(placed, vdupq_n_u32(0x7fc00000u));
  return {vbslq_f32(is_nan, vreinterpretq_f32_u32(nan), number)};
}
FLASH_ATTN_RES_INLINE Pair load_e4m3(const void* p) {
  const int16x8_t x = vmovl_s8(vld1_s8(static_cast<const int8_t*>(p)));
  return {widen_e4m3(vget_low_s16(x)), widen_e4m3(vget_high_s16(x))};
}

FLASH_ATTN_RES_INLINE void store_f16(void* p, Pair a) {
  const uint8x8_t lo = vreinterpret_u8_f16(vcvt_f16_f32(a.lo.v));
  const uint8x8_t hi = vreinterpret_u8_f16(vcvt_f16_f32(a.hi.v));
  vst1q_u8(static_cast<uint8_t*>(p), vcombine_u8(lo, hi));
}
FLASH_ATTN_RES_INLINE void stream_f16(void* p, Pair a) { store_f16(p, a); }

FLASH_ATTN_RES_INLINE void stream_fence() {}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_SIMD_NEON_H_
