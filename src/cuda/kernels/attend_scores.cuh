// Scores of `attend`: <u_s, k_n> and |k_n|^2, in slices of the key's columns.
//
//   dots[slice, t, n, s]  = sum over the slice's columns of u_s k_n     (S padded to Sp with zeros)
//   squares[slice, t, n]  = sum over the slice's columns of k_n^2
//
// in    sources N x [T, D] storage; queries [S, R] float32
// out   dots [slices, T, N, Sp], squares [slices, T, N] float32, in the workspace
// bytes N units of T * D elements are read; written are slices * T * N * (Sp + 1) floats
// sums  float32, each by one warp in a fixed order; a row's sum depends on no other row
//
// A block keeps the queries of its slice in shared memory and walks over rows (t, n), so that the
// queries, which can be far larger than a token's sources (24 x 7168 floats are 688 KB), are read
// once a block. A warp takes four rows and eight queries at a time: 32 sums a lane, which leave the
// warp in 31 shuffles. More than eight queries take further turns over rows that L1 then holds.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SCORES_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SCORES_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kScoreRows = 4;     // rows of a warp's tile
inline constexpr int kScoreQueries = 8;  // queries of a warp's tile
inline constexpr int kScoreWarps = 8;
inline constexpr int kScoreSpan = kWarp * kChunk;  // columns that a warp covers in one step

struct AttendScoresParams {
  ScaledTable<kMaxSources> sources;  // N x [T, D]
  FloatView queries;                 // [S, R]
  float* dots;                       // [slices, T, N, Sp]
  float* squares;                    // [slices, T, N]
  int64_t tokens;
  int num_sources, num_queries, padded_queries, dim, key_begin;
  int first_col;      // columns before it, a multiple of kChunk, belong to no slice
  int slice_cols;     // columns of a slice, a multiple of kScoreSpan
  int group_queries;  // queries that one block keeps, a multiple of kScoreQueries
};

/// Where queries [s, c] of a slice lie in shared memory: the lower and upper half of each lane's
/// chunk in planes of their own, so that 16-byte reads of a warp meet no bank twice.
__device__ __forceinline__ int score_plane_index(int c) {
  const int span = c / kScoreSpan;
  const int lane = c % kScoreSpan / kChunk;
  const int i = c % kChunk;
  return span * kScoreSpan + i / 4 * (kScoreSpan / 2) + lane * 4 + i % 4;
}

// grid: (blocks along the rows, slices, groups of queries)
template <class T>
__global__ void __launch_bounds__(kScoreWarps* kWarp)
    attend_scores_kernel(const __grid_constant__ AttendScoresParams p) {
  extern __shared__ float4 shared[];
  float* const queries = reinterpret_cast<float*>(shared);  // (group_queries, slice_cols)

  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int slice_begin = p.first_col + static_cast<int>(blockIdx.y) * p.slice_cols;
  const int group_begin = static_cast<int>(blockIdx.z) * p.group_queries;
  const int group_size = min(p.group_queries, p.padded_queries - group_begin);

  for (int i = static_cast<int>(threadIdx.x); i < group_size * p.slice_cols;
       i += kScoreWarps * kWarp) {
    const int s = group_begin + i / p.slice_cols;
    const int c = i % p.slice_cols;
    const int col = slice_begin + c;
    const bool inside = s < p.num_queries && col >= p.key_begin && col < p.dim;
    queries[i / p.slice_cols * p.slice_cols + score_plane_index(c)] =
        inside ? p.queries.at(s, col - p.key_begin) : 0.0f;
  }
  __syncthreads();

  const int64_t rows = p.tokens * p.num_sources;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kScoreWarps * kScoreRows;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kScoreWarps + warp) * kScoreRows;
       first < rows; first += stride) {
    RowRef row[kScoreRows];
    int64_t t = first / p.num_sources;
    int n = static_cast<int>(first - t * p.num_sources);
#pragma unroll
    for (int r = 0; r < kScoreRows; ++r) {
      row[r] = p.sources.row(n, t);
      if (first + r + 1 < rows && ++n == p.num_sources) {  // past the end, the last row repeats
        n = 0;
        ++t;
      }
    }

    for (int s0 = 0; s0 < group_size; s0 += kScoreQueries) {
      const bool with_squares = blockIdx.z == 0 && s0 == 0;
      float dots[kScoreRows * kScoreQueries] = {};  // (rows, queries)
      float squares[kScoreRows] = {};
      for (int c = 0; c < p.slice_cols; c += kScoreSpan) {
        const int col = slice_begin + c + lane * kChunk;
        if (col >= p.dim) {
          break;
        }
        Packed<T> packed[kScoreRows];
#pragma unroll
        for (int r = 0; r < kScoreRows; ++r) {
          packed[r] = load_packed<T>(row[r], col, p.dim);
        }
        Chunk key[kScoreRows];
#pragma unroll
        for (int r = 0; r < kScoreRows; ++r) {
          key[r] = unpack(packed[r]);
          keep_from(key[r], col, p.key_begin);
          if (with_squares) {
            squares[r] = dot_add(key[r], key[r], squares[r]);
          }
        }
#pragma unroll
        for (int s = 0; s < kScoreQueries; ++s) {
          const float4* plane =
              reinterpret_cast<const float4*>(queries + (s0 + s) * p.slice_cols + c) + lane;
          const float4 low = plane[0];
          const float4 high = plane[kWarp];
          const Chunk u = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
#pragma unroll
          for (int r = 0; r < kScoreRows; ++r) {
            dots[r * kScoreQueries + s] = dot_add(u, key[r], dots[r * kScoreQueries + s]);
          }
        }
      }
      const float dot = warp_sum_scatter(dots);
      const int64_t dot_row = first + lane / kScoreQueries;
      const int64_t slice = blockIdx.y;
      if (dot_row < rows) {
        p.dots[(slice * rows + dot_row) * p.padded_queries + group_begin + s0 +
               lane % kScoreQueries] = dot;
      }
      if (with_squares) {
        const float square = warp_sum_scatter(squares);
        constexpr int kLanes = kWarp / kScoreRows;
        if (lane % kLanes == 0 && first + lane / kLanes < rows) {
          p.squares[slice * rows + first + lane / kLanes] = square;
        }
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SCORES_CUH_
