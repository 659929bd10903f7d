// Sums the chunks' parts of a parameter gradient.
//
//   result[row, c] = [held +] parts[0, row, c] + parts[1, row, c] + ...      float32, in that order
//
// The number of parts depends on the number of tokens alone, hence so do the bits of the result.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_
#define FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_

#include "cpu/kernels/params.h"
#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline void reduce(const ReduceParams& p, int64_t row, int64_t piece) {
  const int64_t begin = piece * kPiece;
  const int64_t left = p.result.cols - begin;
  const Writer<AnyFloat> out = writer<AnyFloat>(p.result, row, false).from(begin);
  const Reader<AnyFloat> before = held<AnyFloat>(p.result, row).from(begin);
  const float* parts = p.parts + (piece * p.result.rows + row) * kPiece;
  for_steps(0, left < kPiece ? left : kPiece, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair sum = zero_pair();
    for (int64_t c = 0; c < p.num_parts; ++c) {
      const void* data = parts + c * p.part_stride;
      const Reader<Float32> in = {static_cast<const unsigned char*>(data), 0};
      sum = add(sum, in.get(i, part));
    }
    if (p.accumulate) {
      sum = add(before.get(i, part), sum);
    }
    out.put(i, sum, part);
  });
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_
