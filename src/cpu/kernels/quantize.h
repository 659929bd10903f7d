// Rows with scales: the quantised x of read, and quantize (include/flash_attn_res/quantize.h).
//
// The x of read is float8 e4m3 with float32 scales:
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

/// Bits of the power of two that a group is divided by, from the bits of its largest absolute
/// value: with it the largest lies in [2^14, 2^15) for float16, and is at most 448 for float8.
FLASH_ATTN_RES_INLINE uint32_t exponent_of(uint32_t largest, DType storage) {
  if (largest >= 0x7f800000u) {
    return 0xffu;  // NaN
  }
  const int exponent = static_cast<int>(largest >> 23);  // 0 for subnormals
  // 448 is 1.75 2^8.
  const int shift = storage == DType::kFloat16 ? 14 : (largest & 0x7fffffu) > 0x600000u ? 7 : 8;
  return exponent - shift < 1 ? 1u : static_cast<uint32_t>(exponent - shift);
}

/// Sums of `width` columns from `begin` on, at most a piece.
inline void load_piece(const Reader<AnyFloat>* terms, int num_terms, int64_t begin, int64_t width,
                       float* held) {
  for_steps(0, width, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair sum = terms[0].get(begin + i, part);
    for (int k = 1; k < num_terms; ++k) {
      sum = add(sum, terms[k].get(begin + i, part));
    }
    store_f32(held + i, sum);
  });
}

inline void quantize(const QuantizeParams& p, int64_t begin, int64_t end) {
  alignas(64) float held[kPiece];
  const int64_t columns = p.scale.cols == 1 ? p.D : kScaleGroup;
  const bool half = p.out.dtype == DType::kFloat16;
  for (int64_t t = begin; t < end; ++t) {
    Reader<AnyFloat> terms[kMaxQuantizeTerms];  // rows of D
    for (int k = 0; k < p.num_terms; ++k) {
      terms[k] = reader<AnyFloat>(p.terms[k], t);
    }
    uint8_t* const scale = static_cast<uint8_t*>(p.scale.data) + t * p.scale.stride;
    for (int64_t group = 0; group < p.scale.cols; ++group) {
      const int64_t first = group * columns;
      const int64_t last = first + columns < p.D ? first + columns : p.D;
      uint32_t largest = 0;
      for (int64_t d = first; d < last; d += kPiece) {
        const int64_t width = last - d < kPiece ? last - d : kPiece;
        load_piece(terms, p.num_terms, d, width, held);
        for (int64_t i = 0; i < width; ++i) {
          const uint32_t magnitude = bits_of(held[i]) & 0x7fffffffu;
          largest = magnitude > largest ? magnitude : largest;
        }
      }
      const uint32_t exponent = exponent_of(largest, p.out.dtype);
      scale[group] = static_cast<uint8_t>(exponent);
      const float inverse = 1.0f / scale_from_bits(exponent);
      for (int64_t d = first; d < last; d += kPiece) {
        const int64_t width = last - d < kPiece ? last - d : kPiece;
        load_piece(terms, p.num_terms, d, width, held);
        if (half) {
          const Writer<Float16> out = writer<Float16>(p.out, t, false).from(d);
          for_steps(0, width, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
            out.put(i, mul(broadcast(inverse), load_f32(held + i)), part);
          });
        } else {
          uint8_t* const out = static_cast<uint8_t*>(p.out.data) + t * p.out.stride + d;
          for (int64_t i = 0; i < width; ++i) {
            out[i] = e4m3_bits(held[i] * inverse);
          }
        }
      }
    }
  }
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_QUANTIZE_H_
