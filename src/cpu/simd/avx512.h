// Vectors of 16 floats on AVX-512 (F, BW, VL, DQ), with the bf16 conversion instruction where the
// target has it. The contract of these functions is in simd/target.h.

#ifndef FLASH_ATTN_RES_CPU_SIMD_AVX512_H_
#define FLASH_ATTN_RES_CPU_SIMD_AVX512_H_

#include <immintrin.h>

#include "cpu/simd/target.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
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

FLASH_ATTN_RES_INLINE Pair in_registers(Pair a) {
  asm("" : "+v"(a.lo.v), "+v"(a.hi.v));
  return a;
}

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

// bf16 in natural order: elements 0-15 and 16-31.
FLASH_ATTN_RES_INLINE Vec widen_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
FLASH_ATTN_RES_INLINE Pair load_bf16(const void* p) {
  const __m256i* h = static_cast<const __m256i*>(p);
  return {widen_bf16(_mm256_loadu_si256(h)), widen_bf16(_mm256_loadu_si256(h + 1))};
}

// The split order: the even elements of 32, then the odd ones.
FLASH_ATTN_RES_INLINE Pair split(Pair a) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {{_mm512_permutex2var_ps(a.lo.v, even, a.hi.v)},
          {_mm512_permutex2var_ps(a.lo.v, odd, a.hi.v)}};
}
FLASH_ATTN_RES_INLINE Pair join(Pair a) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {{_mm512_permutex2var_ps(a.lo.v, low, a.hi.v)},
          {_mm512_permutex2var_ps(a.lo.v, high, a.hi.v)}};
}
FLASH_ATTN_RES_INLINE Pair load_bf16_split(const void* p) {
  const __m512i x = _mm512_loadu_si512(p);
  const __m512i odd = _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))}, {_mm512_castsi512_ps(odd)}};
}

// Round to nearest even on the bits; the result is the upper half of each lane, what is below it is
// garbage. A NaN is made quiet and keeps the top of its payload, because rounding it as a number
// could carry into Inf.
FLASH_ATTN_RES_INLINE __m512i round_bf16(Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i biased = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_add_epi32(biased, odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, x, _mm512_set1_epi32(0x400000));
}
FLASH_ATTN_RES_INLINE __m512i narrow_bf16_split(Pair a) {
#if defined(FLASH_ATTN_RES_SIMD_AVX512_BF16)
  // The instruction rounds to nearest even and keeps NaN, but takes subnormal inputs as zero. Those
  // go through the integer path, so that every instruction set stores the same bits.
  constexpr int kSubnormal = 0x20;
  const __mmask16 lo = _mm512_fpclass_ps_mask(a.lo.v, kSubnormal);
  const __mmask16 hi = _mm512_fpclass_ps_mask(a.hi.v, kSubnormal);
  if (__builtin_expect((lo | hi) == 0, 1)) {
    const Pair natural = join(a);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(natural.hi.v, natural.lo.v));
  }
#endif
  const __m512i even = _mm512_srli_epi32(round_bf16(a.lo), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_bf16(a.hi));
}
FLASH_ATTN_RES_INLINE void store_bf16_split(void* p, Pair a) {
  _mm512_storeu_si512(p, narrow_bf16_split(a));
}
FLASH_ATTN_RES_INLINE void stream_bf16_split(void* p, Pair a) {
  _mm512_stream_si512(static_cast<__m512i*>(p), narrow_bf16_split(a));
}
FLASH_ATTN_RES_INLINE void store_bf16(void* p, Pair a) { store_bf16_split(p, split(a)); }
FLASH_ATTN_RES_INLINE void stream_bf16(void* p, Pair a) { stream_bf16_split(p, split(a)); }

FLASH_ATTN_RES_INLINE Pair load_f16(const void* p) {
  const __m256i* h = static_cast<const __m256i*>(p);
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(h))}, {_mm512_cvtph_ps(_mm256_loadu_si256(h + 1))}};
}
// The magnitude of e4m3 under float32's exponent leaves a factor 2^(127 - 7); a product takes it
// away and normalises subnormal numbers.
FLASH_ATTN_RES_INLINE Vec widen_e4m3(__m128i bytes) {
  const __m512i x = _mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 20);
  const __m512i placed = _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
  const __m512 number = _mm512_mul_ps(_mm512_castsi512_ps(placed), _mm512_set1_ps(0x1p120f));
  const __m512i most = _mm512_set1_epi32(0x07f00000);
  const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(placed, most), most);
  const __m512i nan = _mm512_or_si512(placed, _mm512_set1_epi32(0x7fc00000));
  return {_mm512_mask_mov_ps(number, is_nan, _mm512_castsi512_ps(nan))};
}
FLASH_ATTN_RES_INLINE Pair load_e4m3(const void* p) {
  const __m128i* b = static_cast<const __m128i*>(p);
  return {widen_e4m3(_mm_loadu_si128(b)), widen_e4m3(_mm_loadu_si128(b + 1))};
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
