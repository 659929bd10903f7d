// Scalar conversions between the storage dtypes and float32, round to nearest even.
//
// bfloat16: the upper half of a float32 (8 exponent bits, 7 fraction bits).
// float16:  IEEE 754 binary16 (5 exponent bits, 10 fraction bits, subnormals kept).
// float8:   e4m3fn of the OCP 8-bit specification (4 exponent bits, 3 fraction bits, subnormals
//           kept, no Inf, largest 448).
//
// e8m0:     an exponent alone, 2^(bits - 127); 255 is NaN. Only powers of two are ever stored.
//
// Overflow gives Inf, in float8 the largest value of that sign; NaN stays NaN (quiet). Every SIMD
// store must give the same bits; tests hold it to that.

#ifndef FLASH_ATTN_RES_COMMON_FLOAT_TYPES_H_
#define FLASH_ATTN_RES_COMMON_FLOAT_TYPES_H_

#include <bit>
#include <cstdint>

namespace flash_attn_res {

/// Storage of one bfloat16.
struct BFloat16 {
  uint16_t bits;
};

/// Storage of one IEEE binary16.
struct Float16 {
  uint16_t bits;
};

/// Storage of one float8 e4m3fn.
struct Float8E4M3 {
  uint8_t bits;
};

/// Storage of one float8 e8m0.
struct Float8E8M0 {
  uint8_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf and NaN: the exponent becomes all ones
    return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Placing the 15 bits under float32's exponent leaves a factor 2^(127 - 15), which also
  // normalises subnormals exactly.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline float to_float(Float8E4M3 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
  const uint32_t magnitude = value.bits & 0x7fu;
  if (magnitude == 0x7fu) {
    return std::bit_cast<float>(sign | 0x7fc00000u);
  }
  // As for float16: the missing exponent bias is a factor 2^(127 - 7).
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline float to_float(Float8E8M0 value) {
  if (value.bits == 0xffu) {
    return std::bit_cast<float>(0x7fc00000u);
  }
  // 2^-127 is subnormal in float32.
  return std::bit_cast<float>(value.bits == 0 ? 0x00400000u
                                              : static_cast<uint32_t>(value.bits) << 23);
}

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: truncating could clear every fraction bit
    return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline Float16 to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

inline Float8E4M3 to_float8_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint8_t>(sign | 0x7fu)};
  }
  if (magnitude >= 0x43e00000u) {  // 448 and above: saturate
    return {static_cast<uint8_t>(sign | 0x7eu)};
  }
  if (magnitude < 0x3c800000u) {  // below 2^-6: adding 2^14 aligns the subnormal's last bit, 2^-9
    const float aligned = std::bit_cast<float>(magnitude) + 0x1p14f;
    return {static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x46800000u))};
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - 0x3c000000u;
  return {static_cast<uint8_t>(sign | (rounded >> 20))};
}

/// The exponent of a power of two from 2^-126 on; what is not finite becomes NaN.
inline Float8E8M0 to_float8_e8m0(float value) {
  return {static_cast<uint8_t>((std::bit_cast<uint32_t>(value) >> 23) & 0xffu)};
}

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_COMMON_FLOAT_TYPES_H_
