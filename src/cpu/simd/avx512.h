// Vectors of 16 floats on AVX-512 (F, BW, VL, DQ), with the bf16 conversion instruction where the
// target has it. The contract of these functions is in simd/target.h.

#ifndef FLASH_ATTN_RES_CPU_SIMD_AVX512_H_
#define FLASH_ATTN_RES_CPU_SIMD_AVX512_H_

#include <immintrin.h>

#include "cpu/simd/target.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int kLanes = 16;
inline constexpr int kStreamAlign = 64;  // bytes; what a non-temporal store asks of its address

struct Vec {
  __m512 v;
};
struct IntVec {
  __m512i v;
};

FLASH_ATTN_RES_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
FLASH_ATTN_RES_INLINE Vec load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
FLASH_ATTN_RES_INLINE void store_floats(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FLASH_ATTN_RES_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Limits x to [low, high]; NaN stays NaN because the second operand wins when unordered.
FLASH_ATTN_RES_INLINE Vec clamp(Vec x, Vec low, Vec high) {
  return {_mm512_min_ps(high.v, _mm512_max_ps(low.v, x.v))};
}

FLASH_ATTN_RES_INLINE IntVec bits(Vec a) { return {_mm512_castps_si512(a.v)}; }
FLASH_ATTN_RES_INLINE Vec floats(IntVec a) { return {_mm512_castsi512_ps(a.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_broadcast(int x) { return {_mm512_set1_epi32(x)}; }
FLASH_ATTN_RES_INLINE IntVec int_add(IntVec a, IntVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_sub(IntVec a, IntVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec half_of(IntVec a) { return {_mm512_srai_epi32(a.v, 1)}; }
FLASH_ATTN_RES_INLINE IntVec to_exponent(IntVec a) { return {_mm512_slli_epi32(a.v, 23)}; }

FLASH_ATTN_RES_INLINE float reduce_add(Vec a) {
  const __m256 low = _mm512_castps512_ps256(a.v);
  const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
  const __m256 t = _mm256_add_ps(low, high);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_movehdup_ps(s));
  return _mm_cvtss_f32(s);
}

struct Pair {
  Vec lo, hi;
};

FLASH_ATTN_RES_INLINE Pair load_f32(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {{_mm512_loadu_ps(f)}, {_mm512_loadu_ps(f + 16)}};
}
FLASH_ATTN_RES_INLINE void store_f32(void* p, Pair a) {
  float* f = static_cast<float*>(p);
  _mm512_storeu_ps(f, a.lo.v);
  _mm512_storeu_ps(f + 16, a.hi.v);
}
FLASH_ATTN_RES_INLINE void stream_f32(void* p, Pair a) {
  float* f = static_cast<float*>(p);
  _mm512_stream_ps(f, a.lo.v);
  _mm512_stream_ps(f + 16, a.hi.v);
}

FLASH_ATTN_RES_INLINE Vec widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FLASH_ATTN_RES_INLINE Pair load_bf16(const void* p) {
  const __m256i* h = static_cast<const __m256i*>(p);
  return {widen_bf16(_mm256_loadu_si256(h)), widen_bf16(_mm256_loadu_si256(h + 1))};
}

// Round to nearest even on the bits; a NaN is made quiet and keeps the top of its payload, because
// rounding it as a number could carry into Inf.
FLASH_ATTN_RES_INLINE __m256i round_bf16(Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i top = _mm512_srli_epi32(x, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, bias), 16);
  const __m512i quiet = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
}
FLASH_ATTN_RES_INLINE __m512i narrow_bf16(Pair a) {
#if defined(FLASH_ATTN_RES_SIMD_AVX512_BF16)
  // The instruction rounds to nearest even and keeps NaN, but takes subnormal inputs as zero. Those
  // go through the integer path, so that every instruction set stores the same bits.
  constexpr int kSubnormal = 0x20;
  const __mmask16 lo = _mm512_fpclass_ps_mask(a.lo.v, kSubnormal);
  const __mmask16 hi = _mm512_fpclass_ps_mask(a.hi.v, kSubnormal);
  if (__builtin_expect((lo | hi) == 0, 1)) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(a.hi.v, a.lo.v));
  }
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(a.lo)), round_bf16(a.hi), 1);
}
FLASH_ATTN_RES_INLINE void store_bf16(void* p, Pair a) { _mm512_storeu_si512(p, narrow_bf16(a)); }
FLASH_ATTN_RES_INLINE void stream_bf16(void* p, Pair a) {
  _mm512_stream_si512(static_cast<__m512i*>(p), narrow_bf16(a));
}

FLASH_ATTN_RES_INLINE Pair load_f16(const void* p) {
  const __m256i* h = static_cast<const __m256i*>(p);
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(h))}, {_mm512_cvtph_ps(_mm256_loadu_si256(h + 1))}};
}
FLASH_ATTN_RES_INLINE __m512i narrow_f16(Pair a) {
  const __m256i lo = _mm512_cvtps_ph(a.lo.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i hi = _mm512_cvtps_ph(a.hi.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}
FLASH_ATTN_RES_INLINE void store_f16(void* p, Pair a) { _mm512_storeu_si512(p, narrow_f16(a)); }
FLASH_ATTN_RES_INLINE void stream_f16(void* p, Pair a) {
  _mm512_stream_si512(static_cast<__m512i*>(p), narrow_f16(a));
}

FLASH_ATTN_RES_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_SIMD_AVX512_H_
