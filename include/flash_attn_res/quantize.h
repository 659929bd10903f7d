// quantize: a completed block in 16 bits with more precision, or in 8 bits. What `attend` and
// `read` then take as a source with its scales.
//
//   v[t, d] = terms[0][t, d] + terms[1][t, d] + ...      in float32, from left to right
//
// A row of v is cut into groups of W columns (W = D: one scale a token; W = 128). For each group,
// with amax the largest absolute value in it:
//
//   float16      scale = the power of two with   2^14 <= amax / scale < 2^15
//   float8_e4m3  scale = the smallest power of two with   amax / scale <= 448
//   q[t, d]      = v[t, d] / scale, rounded to nearest even (the division is exact)
//
// float16 keeps 11 bits of a value, bfloat16 8: eight times finer in the same bytes, for all values
// of a group down to 2^-28 of its largest. float8_e4m3 keeps 4 bits, down to 2^-13 of the largest.
// No number overflows. A mixture of sources, with one scale or several, is a convex combination,
// bounded by the largest of them: written as float16 without a scale it overflows only where one of
// its sources is larger than 65504.
//
// Exponents of scales stay within [-126, 127]; a group of zeros takes 2^-126. A NaN or an Inf in a
// group makes its scale NaN, and with it every value that the group stands for: nothing is hidden.
// Values next to the largest float32 may round up to 2^128, which is infinite there.

#ifndef FLASH_ATTN_RES_QUANTIZE_H_
#define FLASH_ATTN_RES_QUANTIZE_H_

#include <cstdint>
#include <span>

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// Arguments of `quantize`.
struct QuantizeArgs {
  std::span<const ConstMatrix> terms = {};  // 1..4 x [T, D], float32, bfloat16 or float16, mixed
  Matrix out = {};    // [T, D] float16 or float8_e4m3: q. May not overlap a term.
  Matrix scale = {};  // [T, 1] or [T, ceil(D / 128)] float8_e8m0
};

/// Computes out and scale. Needs no workspace. Minimum traffic: the terms, out and scale.
/// Errors: kInvalidArgument naming the argument and both shapes; kUnsupportedDevice; kCudaError.
Status quantize(const QuantizeArgs& args, const Context& context = {});

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_QUANTIZE_H_
