// Vectors of 8 floats on AVX2 + FMA + F16C. The contract of these functions is in simd/target.h.

#ifndef FLASH_ATTN_RES_CPU_SIMD_AVX2_H_
#define FLASH_ATTN_RES_CPU_SIMD_AVX2_H_

#include <immintrin.h>

#include "cpu/simd/target.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
inline constexpr int kStreamAlign = 32;  // bytes; what a non-temporal store asks of its address

struct Vec {
  __m256 v;
};
struct IntVec {
  __m256i v;
};

FLASH_ATTN_RES_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
FLASH_ATTN_RES_INLINE Vec load_floats(const float* p) { return {_mm256_loadu_ps(p)}; }
FLASH_ATTN_RES_INLINE void store_floats(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FLASH_ATTN_RES_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// Limits x to [low, high]; NaN stays NaN because the second operand wins when unordered.
FLASH_ATTN_RES_INLINE Vec clamp(Vec x, Vec low, Vec high) {
  return {_mm256_min_ps(high.v, _mm256_max_ps(low.v, x.v))};
}

FLASH_ATTN_RES_INLINE IntVec bits(Vec a) { return {_mm256_castps_si256(a.v)}; }
FLASH_ATTN_RES_INLINE Vec floats(IntVec a) { return {_mm256_castsi256_ps(a.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_broadcast(int x) { return {_mm256_set1_epi32(x)}; }
FLASH_ATTN_RES_INLINE IntVec int_add(IntVec a, IntVec b) { return {_mm256_add_epi32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec int_sub(IntVec a, IntVec b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FLASH_ATTN_RES_INLINE IntVec half_of(IntVec a) { return {_mm256_srai_epi32(a.v, 1)}; }
FLASH_ATTN_RES_INLINE IntVec to_exponent(IntVec a) { return {_mm256_slli_epi32(a.v, 23)}; }

FLASH_ATTN_RES_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_movehdup_ps(s));
  return _mm_cvtss_f32(s);
}

struct Pair {
  Vec lo, hi;
};

FLASH_ATTN_RES_INLINE Pair in_registers(Pair a) {
  asm("" : "+x"(a.lo.v), "+x"(a.hi.v));
  return a;
}

FLASH_ATTN_RES_INLINE Pair load_f32(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {{_mm256_loadu_ps(f)}, {_mm256_loadu_ps(f + 8)}};
}
FLASH_ATTN_RES_INLINE void store_f32(void* p, Pair a) {
  float* f = static_cast<float*>(p);
  _mm256_storeu_ps(f, a.lo.v);
  _mm256_storeu_ps(f + 8, a.hi.v);
}
FLASH_ATTN_RES_INLINE void stream_f32(void* p, Pair a) {
  float* f = static_cast<float*>(p);
  _mm256_stream_ps(f, a.lo.v);
  _mm256_stream_ps(f + 8, a.hi.v);
}

// bf16 in natural order: elements 0-7 and 8-15.
FLASH_ATTN_RES_INLINE Vec widen_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
FLASH_ATTN_RES_INLINE Pair load_bf16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(h)), widen_bf16(_mm_loadu_si128(h + 1))};
}

// The split order: the even elements of 16, then the odd ones.
FLASH_ATTN_RES_INLINE Pair split(Pair a) {
  const __m256 even = _mm256_shuffle_ps(a.lo.v, a.hi.v, 0x88);  // 0 2 8 10 | 4 6 12 14
  const __m256 odd = _mm256_shuffle_ps(a.lo.v, a.hi.v, 0xdd);
  return {{_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8))},
          {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8))}};
}
FLASH_ATTN_RES_INLINE Pair join(Pair a) {
  const __m256 low = _mm256_unpacklo_ps(a.lo.v, a.hi.v);   // 0 1 2 3 | 8 9 10 11
  const __m256 high = _mm256_unpackhi_ps(a.lo.v, a.hi.v);  // 4 5 6 7 | 12 13 14 15
  return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
}
FLASH_ATTN_RES_INLINE Pair load_bf16_split(const void* p) {
  const __m256i x = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}, {_mm256_castsi256_ps(odd)}};
}

// Round to nearest even on the bits; the result is the upper half of each lane, what is below it is
// garbage. A NaN is made quiet and keeps the top of its payload, because rounding it as a number
// could carry into Inf; `with_nan` says whether there may be one.
FLASH_ATTN_RES_INLINE __m256i round_bf16(Vec a, bool with_nan) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i biased = _mm256_add_epi32(x, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_add_epi32(biased, odd);
  if (!with_nan) {
    return rounded;
  }
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
}
FLASH_ATTN_RES_INLINE __m256i narrow_bf16_split(Pair a, bool with_nan) {
  const __m256i even = _mm256_srli_epi32(round_bf16(a.lo, with_nan), 16);
  return _mm256_blend_epi16(even, round_bf16(a.hi, with_nan), 0xaa);
}
FLASH_ATTN_RES_INLINE __m256i narrow_bf16_split(Pair a) {
  // One comparison finds a NaN in either vector; there hardly ever is one.
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a.lo.v, a.hi.v, _CMP_UNORD_Q)) != 0, 0)) {
    return narrow_bf16_split(a, true);
  }
  return narrow_bf16_split(a, false);
}
FLASH_ATTN_RES_INLINE void store_bf16_split(void* p, Pair a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), narrow_bf16_split(a));
}
FLASH_ATTN_RES_INLINE void stream_bf16_split(void* p, Pair a) {
  _mm256_stream_si256(static_cast<__m256i*>(p), narrow_bf16_split(a));
}
FLASH_ATTN_RES_INLINE void store_bf16(void* p, Pair a) { store_bf16_split(p, split(a)); }
FLASH_ATTN_RES_INLINE void stream_bf16(void* p, Pair a) { stream_bf16_split(p, split(a)); }

FLASH_ATTN_RES_INLINE Pair load_f16(const void* p) {
  const __m128i* h = static_cast<const __m128i*>(p);
  return {{_mm256_cvtph_ps(_mm_loadu_si128(h))}, {_mm256_cvtph_ps(_mm_loadu_si128(h + 1))}};
}
// The magnitude of e4m3 under float32's exponent leaves a factor 2^(127 - 7); a product takes it
// away and normalises subnormal numbers.
FLASH_ATTN_RES_INLINE Vec widen_e4m3(__m128i bytes) {
  const __m256i x = _mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 20);
  const __m256i placed = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
  const __m256 number = _mm256_mul_ps(_mm256_castsi256_ps(placed), _mm256_set1_ps(0x1p120f));
  const __m256i most = _mm256_set1_epi32(0x07f00000);
  const __m256i is_nan = _mm256_cmpeq_epi32(_mm256_and_si256(placed, most), most);
  const __m256i nan = _mm256_or_si256(placed, _mm256_set1_epi32(0x7fc00000));
  return {_mm256_blendv_ps(number, _mm256_castsi256_ps(nan), _mm256_castsi256_ps(is_nan))};
}
FLASH_ATTN_RES_INLINE Pair load_e4m3(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {widen_e4m3(bytes), widen_e4m3(_mm_unpackhi_epi64(bytes, bytes))};
}

FLASH_ATTN_RES_INLINE __m256i narrow_f16(Pair a) {
  const __m128i lo = _mm256_cvtps_ph(a.lo.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i hi = _mm256_cvtps_ph(a.hi.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1);
}
FLASH_ATTN_RES_INLINE void store_f16(void* p, Pair a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), narrow_f16(a));
}
FLASH_ATTN_RES_INLINE void stream_f16(void* p, Pair a) {
  _mm256_stream_si256(static_cast<__m256i*>(p), narrow_f16(a));
}

FLASH_ATTN_RES_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_SIMD_AVX2_H_
