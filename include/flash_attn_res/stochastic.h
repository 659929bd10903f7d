// stochastic_add: a sum of values, rounded to bfloat16 stochastically. For a running partial sum,
// or a gradient that many sites add to, in 16 bits without the drift of nearest rounding.
//
// Source: Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
//   total[t, d] = terms[0][t, d] + terms[1][t, d] + ...      in float32, from left to right
//   out[t, d]   = one of the two bfloat16 values next to total, the one farther from zero with
//                 probability (|total| - low) / (high - low); total itself where it is one of them
//
// so that the expectation of out is total. In bits: a random 16-bit number is added to the lower
// half of the float32, and the upper half is kept. For element (t, d), with chunk = t ceil(D / 8) +
// d / 8, the number is half d % 2 (0: low) of word (d % 8) / 2 of
//
//   philox(counter = {chunk, chunk >> 32, site, step}, key = {seed, seed >> 32})
//
// (32 bits of each). The bits of out follow from the terms, seed, step, site and shape alone: they
// are the same on every device, instruction set, number of threads and launch shape, whatever the
// strides. Finite totals beyond the largest bfloat16 may become Inf; Inf stays, NaN stays NaN.

#ifndef FLASH_ATTN_RES_STOCHASTIC_H_
#define FLASH_ATTN_RES_STOCHASTIC_H_

#include <cstdint>
#include <span>

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// Most terms of one `stochastic_add`.
inline constexpr int64_t kMaxStochasticTerms = 4;

/// Arguments of `stochastic_add`.
struct StochasticAddArgs {
  std::span<const ConstMatrix> terms = {};  // 1..4 x [T, D], float32, bfloat16 or float16, mixed
  const int64_t* seed = nullptr;  // {seed, step}: two numbers in the memory of the call's device,
                                  // read when the call runs, so that a captured graph can advance
                                  // the step. 32 bits of step count. May be null when T == 0.
  int64_t site = 0;               // 0 <= site < 2^32: sums of one step take different sites
  Matrix out = {};                // [T, D] bfloat16. May be the memory of a term with its strides.
};

/// Computes out. Needs no workspace. Minimum traffic: the terms and out.
/// Errors: kInvalidArgument naming the argument and both shapes; kUnsupportedDevice; kCudaError.
Status stochastic_add(const StochasticAddArgs& args, const Context& context = {});

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_STOCHASTIC_H_
