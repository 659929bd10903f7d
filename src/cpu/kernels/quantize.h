// A row of float32 as float8 e4m3 with scales: the quantised x of read.
//
//   scale     = max(amax / 448, 2^-126), with powers of two up to the next one
//   stored_d  = e4m3(x_d * (1 / scale))            nearest even, saturating at +-448
//
// Absolute values are compared as integers, in which NaN > Inf > every number: a NaN in a group
// reaches its scale. Loops are written for the compiler to vectorise.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_QUANTIZE_H_
#define FLASH_ATTN_RES_CPU_KERNELS_QUANTIZE_H_

#include <stdint.h>

#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

FLASH_ATTN_RES_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
FLASH_ATTN_RES_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

/// The bits of one e4m3 value. Both roundings are computed and one is chosen, without branches.
FLASH_ATTN_RES_INLINE uint8_t e4m3_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t limited = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;  // 448
  const uint32_t normal = (limited + 0x7ffffu + ((limited >> 20) & 1u) - 0x3c000000u) >> 20;
  // Below 2^-6 adding 2^14 aligns the last bit of a subnormal, 2^-9.
  const uint32_t subnormal = bits_of(float_of(limited) + 0x1p14f) - 0x46800000u;
  const uint32_t number = limited < 0x3c800000u ? subnormal : normal;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : number));
}

/// The scale of a group whose largest absolute value has these bits.
FLASH_ATTN_RES_INLINE float scale_of(uint32_t largest, bool power_of_two) {
  const float ratio = float_of(largest) / 448.0f;
  const float scale = ratio < 0x1p-126f ? 0x1p-126f : ratio;
  const uint32_t bits = bits_of(scale);
  const bool finite = bits < 0x7f800000u;
  return power_of_two && finite ? float_of((bits + 0x7fffffu) & 0x7f800000u) : scale;
}

/// Row t of a [T, D] result and its scales from the D floats of `row`.
inline void quantize_row(const float* row, int64_t D, const Matrix& x, const Matrix& x_scale,
                         bool power_of_two, int64_t t) {
  uint8_t* const out = static_cast<uint8_t*>(x.data) + t * x.stride;
  const int64_t width = x_scale.cols == 1 ? D : kScaleGroup;
  for (int64_t group = 0; group < x_scale.cols; ++group) {
    const int64_t begin = group * width;
    const int64_t end = begin + width < D ? begin + width : D;
    uint32_t largest = 0;
    for (int64_t d = begin; d < end; ++d) {
      const uint32_t magnitude = bits_of(row[d]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = scale_of(largest, power_of_two);
    const float inverse = 1.0f / scale;
    for (int64_t d = begin; d < end; ++d) {
      out[d] = e4m3_bits(row[d] * inverse);
    }
    put_float(x_scale, t, group, scale);
  }
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_QUANTIZE_H_
