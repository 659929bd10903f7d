// What both kinds of compute warps of phase 1 on Hopper share: the call, and where their sums go.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_

#include <cstdint>

#include "cuda/kernels/hopper_pipeline.cuh"

namespace flash_attn_res::cuda::hopper {

struct AttendParams {
  RowTable<kSourcesMax> sources;  // N x [T, D]
  ScaleTable scales;              // of sources that have them
  RowTable<kQueriesMax> out;      // S x [T, D]
  const float* queries;           // [S, D]
  float* lse;                     // [S, T]
  float* logits;                  // [T, S * N], may be null
  float* inv_rms;                 // [T, N], may be null
  int* issued;                    // one counter, zero at the start; null without a window
  int64_t queries_stride, lse_stride, logits_stride, inv_rms_stride;
  int64_t tokens;
  int num_sources, num_queries, dim;
  float scale, eps;
  SourceLayout layout;  // of the sources
  bool half_out;        // out is float16, not bfloat16; the sources are not bfloat16
  Plan plan;
  SharedMap map;  // of plan and extents(); here it takes no registers

  FLASH_ATTN_RES_HOPPER_BOTH bool scaled() const { return layout.scale_columns > 0; }
  FLASH_ATTN_RES_HOPPER_BOTH Extents extents() const {
    return {.input_rows = num_sources,
            .result_rows = num_queries,
            .result_bytes = 2,
            .partial_rows = num_queries + 1,
            .partial_cols = (num_sources + 3) / 4 * 4,
            .weight_floats = weight_map((num_queries + 7) / 8, (num_sources + 7) / 8).forward,
            .narrow_rows = layout.narrow_rows(num_sources),
            .scaled_rows = layout.scaled_rows(num_sources),
            .scale_columns = layout.scale_columns};
  }
};

/// Stores a warp's sums of token b of a step. Row 16 m + i of `sum` is query 16 m + i, and the last
/// eight rows are the sources themselves.
template <int kRowPairs, int kSourceGroups>
__device__ __forceinline__ void store_partials(const AttendParams& p, const Sums& sums, int step,
                                               int warp, int b, int lane,
                                               const Accum (&sum)[kRowPairs][kSourceGroups]) {
  const int rows = p.num_queries + 1;
  const int row = lane / 4;
#pragma unroll
  for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
      const float(&c)[4] = sum[m][n].c;
      const int col = n * 8 + lane % 4 * 2;
      if (col < sums.cols) {
        const auto store = [&](int s, float x, float y) {
          if (s < p.num_queries) {
            *reinterpret_cast<float2*>(sums.partial_row(step, warp, b * rows + s) + col) = {x, y};
          }
        };
        store(16 * m + row, c[0], c[1]);
        if (m < kRowPairs - 1) {
          store(16 * m + 8 + row, c[2], c[3]);
        }
      }
      // The diagonal of v v^T: row and column n * 8 + lane / 4.
      if (m == kRowPairs - 1 && row / 2 == lane % 4 && n * 8 + row < sums.cols) {
        sums.partial_row(step, warp, b * rows + p.num_queries)[n * 8 + row] =
            row % 2 == 0 ? c[2] : c[3];
      }
    }
  }
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_
