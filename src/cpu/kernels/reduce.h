// Sums the chunks' parts of a parameter gradient.
//
//   result[row, c] = [held +] parts[0, row, c] + parts[1, row, c] + ...
//
// in float32: runs of kPartsPerSum parts in order, then the runs in order.
// The number of parts depends on the number of tokens alone, hence so do the bits of the result.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_
#define FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_

#include "cpu/kernels/params.h"
#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

inline constexpr int64_t kPartsPerSum = 12;  // the root of the most parts that there are

inline void reduce(const ReduceParams& p, int64_t row, int64_t piece) {
  const int64_t begin = piece * kPiece;
  const int64_t left = p.result.cols - begin;
  const Writer<AnyFloat> out = writer<AnyFloat>(p.result, row, false).from(begin);
  const Reader<AnyFloat> before = held<AnyFloat>(p.result, row).from(begin);
  const float* parts = p.parts + (piece * p.result.rows + row) * kPiece;
  for_steps(0, left < kPiece ? left : kPiece, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair sum = zero_pair();
    for (int64_t first = 0; first < p.num_parts; first += kPartsPerSum) {
      const int64_t left_over = p.num_parts - first;
      const int64_t count = left_over < kPartsPerSum ? left_over : kPartsPerSum;
      Pair run = zero_pair();
      for (int64_t c = first; c < first + count; ++c) {
        const void* data = parts + c * p.part_stride;
        const Reader<Float32> in = {static_cast<const unsigned char*>(data), 0};
        run = add(run, in.get(i, part));
      }
      sum = add(sum, run);
    }
    if (p.accumulate) {
      sum = add(before.get(i, part), sum);
    }
    out.put(i, sum, part);
  });
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_REDUCE_H_
