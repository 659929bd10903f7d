// Vectors of 4 floats in the compiler's own vector types: any machine, no intrinsics. The contract
// of these functions is in simd/target.h.

#ifndef FLASH_ATTN_RES_CPU_SIMD_PORTABLE_H_
#define FLASH_ATTN_RES_CPU_SIMD_PORTABLE_H_

#include <stdint.h>

#include "cpu/simd/target.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int kLanes = 4;
inline constexpr int kRegisters = 16;
inline constexpr int kStreamAlign = 16;  // bytes; streaming stores are plain stores here

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

struct Vec {
  Floats v;
};
struct IntVec {
  Ints v;
};

FLASH_ATTN_RES_INLINE Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
FLASH_ATTN_RES_INLINE Vec load_floats(const float* p) {
  Vec a;
  __builtin_memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FLASH_ATTN_RES_INLINE void store_floats(float* p, Vec a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }
FLASH_ATTN_RES_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
FLASH_ATTN_RES_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
FLASH_ATTN_RES_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
FLASH_ATTN_RES_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

// Limits x to [low, high]; NaN stays NaN because comparisons with it are false.
FLASH_ATTN_RES_INLINE Vec clamp(Vec x, Vec low, Vec high) {
  x.v = x.v < low.v ? low.v : x.v;
  return {x.v > high.v ? high.v : x.v};
}

FLASH_ATTN_RES_INLINE IntVec bits(Vec a) { return {(Ints)a.v}; }
FLASH_ATTN_RES_INLINE Vec floats(IntVec a) { return {(Floats)a.v}; }
FLASH_ATTN_RES_INLINE IntVec int_broadcast(int x) { return {Ints{x, x, x, x}}; }
FLASH_ATTN_RES_INLINE IntVec int_add(IntVec a, IntVec b) {
  return {(Ints)((Words)a.v + (Words)b.v)};
}
FLASH_ATTN_RES_INLINE IntVec int_sub(IntVec a, IntVec b) {
  return {(Ints)((Words)a.v - (Words)b.v)};
}
FLASH_ATTN_RES_INLINE IntVec half_of(IntVec a) { return {a.v >> 1}; }
FLASH_ATTN_RES_INLINE IntVec to_exponent(IntVec a) { return {(Ints)((Words)a.v << 23)}; }

FLASH_ATTN_RES_INLINE float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

struct Pair {
  Vec lo, hi;
};

FLASH_ATTN_RES_INLINE Pair in_registers(Pair a) { return a; }

FLASH_ATTN_RES_INLINE Pair load_f32(const void* p) {
  Pair a;
  __builtin_memcpy(&a, p, sizeof(a));
  return a;
}
FLASH_ATTN_RES_INLINE void store_f32(void* p, Pair a) { __builtin_memcpy(p, &a, sizeof(a)); }
FLASH_ATTN_RES_INLINE void stream_f32(void* p, Pair a) { store_f32(p, a); }

struct HalvesPair {
  Halves lo, hi;
};

FLASH_ATTN_RES_INLINE HalvesPair load_halves(const void* p) {
  HalvesPair h;
  __builtin_memcpy(&h, p, sizeof(h));
  return h;
}
FLASH_ATTN_RES_INLINE void store_halves(void* p, Words lo, Words hi) {
  const HalvesPair h = {__builtin_convertvector(lo, Halves), __builtin_convertvector(hi, Halves)};
  __builtin_memcpy(p, &h, sizeof(h));
}

FLASH_ATTN_RES_INLINE Vec widen_bf16(Halves h) {
  return {(Floats)(__builtin_convertvector(h, Words) << 16)};
}
FLASH_ATTN_RES_INLINE Pair load_bf16(const void* p) {
  const HalvesPair h = load_halves(p);
  return {widen_bf16(h.lo), widen_bf16(h.hi)};
}

// Round to nearest even on the bits; a NaN is made quiet and keeps the top of its payload, because
// rounding it as a number could carry into Inf.
FLASH_ATTN_RES_INLINE Words round_bf16(Vec a) {
  const Words x = (Words)a.v;
  const Words top = x >> 16;
  const Words rounded = (x + (top & 1u) + 0x7fffu) >> 16;
  return a.v != a.v ? top | 0x40u : rounded;
}
FLASH_ATTN_RES_INLINE void store_bf16(void* p, Pair a) {
  store_halves(p, round_bf16(a.lo), round_bf16(a.hi));
}
FLASH_ATTN_RES_INLINE void stream_bf16(void* p, Pair a) { store_bf16(p, a); }

// The compiler knows the natural order best: that is the split order here.
FLASH_ATTN_RES_INLINE Pair split(Pair a) { return a; }
FLASH_ATTN_RES_INLINE Pair join(Pair a) { return a; }
FLASH_ATTN_RES_INLINE Pair load_bf16_split(const void* p) { return load_bf16(p); }
FLASH_ATTN_RES_INLINE void store_bf16_split(void* p, Pair a) { store_bf16(p, a); }
FLASH_ATTN_RES_INLINE void stream_bf16_split(void* p, Pair a) { store_bf16(p, a); }

// The half's exponent and fraction are moved to the float's place; a product with 2^112 corrects
// the bias and normalises subnormal halves. Inf and NaN get the float's largest exponent instead.
FLASH_ATTN_RES_INLINE Vec widen_f16(Halves h) {
  const Words x = __builtin_convertvector(h, Words);
  const Words sign = (x & 0x8000u) << 16;
  const Words magnitude = x & 0x7fffu;
  const Words special = (magnitude << 13) | 0x7f800000u;
  const Words scaled = (Words)((Floats)(magnitude << 13) * 0x1p112f);
  return {(Floats)(sign | (magnitude >= 0x7c00u ? special : scaled))};
}
FLASH_ATTN_RES_INLINE Pair load_f16(const void* p) {
  const HalvesPair h = load_halves(p);
  return {widen_f16(h.lo), widen_f16(h.hi)};
}

// The magnitude of e4m3 under float32's exponent leaves a factor 2^(127 - 7); a product takes it
// away and normalises subnormal numbers.
FLASH_ATTN_RES_INLINE Vec widen_e4m3(const unsigned char* bytes) {
  Words x;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = bytes[i];
  }
  const Words sign = (x & 0x80u) << 24;
  const Words magnitude = x & 0x7fu;
  const Words number = (Words)((Floats)(magnitude << 20) * 0x1p120f);
  return {(Floats)(sign | (magnitude == 0x7fu ? Words{} + 0x7ff00000u : number))};
}
FLASH_ATTN_RES_INLINE Pair load_e4m3(const void* p) {
  const unsigned char* bytes = static_cast<const unsigned char*>(p);
  return {widen_e4m3(bytes), widen_e4m3(bytes + kLanes)};
}

// Round to nearest even. Below 2^-14 the result is subnormal: adding 0.5 makes the float unit
// round at 2^-24, the spacing of subnormal halves. From 65520 on the carry gives Inf by itself.
FLASH_ATTN_RES_INLINE Words round_f16(Vec a) {
  const Words x = (Words)a.v;
  const Words sign = (x >> 16) & 0x8000u;
  const Words magnitude = x & 0x7fffffffu;
  const Words odd = (magnitude >> 13) & 1u;
  const Words normal = (magnitude + odd + 0xc8000fffu) >> 13;  // 0xc8000000: exponent bias - 112
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Words nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const Words inf_or_nan = magnitude > 0x7f800000u ? nan : Words{} + 0x7c00u;
  const Words finite = magnitude < 0x38800000u ? subnormal : normal;
  return sign | (magnitude >= 0x47800000u ? inf_or_nan : finite);
}
FLASH_ATTN_RES_INLINE void store_f16(void* p, Pair a) {
  store_halves(p, round_f16(a.lo), round_f16(a.hi));
}
FLASH_ATTN_RES_INLINE void stream_f16(void* p, Pair a) { store_f16(p, a); }

FLASH_ATTN_RES_INLINE void stream_fence() {}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_SIMD_PORTABLE_H_
