// First part of the backward of `attend`: dp_sn = <dout_s, v_n>.
//
// in    dout S x [T, D], sources N x [T, D] storage
// out   dots [T, N, Sp] float32, in the workspace; columns S..Sp repeat the last query
// bytes N + S units of T * D elements
// sums  float32, each by one warp in a fixed order
//
// A warp takes a token, four sources and eight gradients; 32 sums a lane leave the warp in 31
// shuffles. Neighbouring warps take the tiles of one token, so that rows which
// several tiles need come from L1.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DOTS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DOTS_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kDotsSources = 4;
inline constexpr int kDotsQueries = 8;
inline constexpr int kDotsBatch = 4;  // gradients loaded before the first is used
inline constexpr int kDotsThreads = 128;

struct AttendDotsParams {
  ScaledTable<kMaxSources> sources;  // N x [T, D]
  ValueTable<kMaxQueries> dout;      // S x [T, D]
  float* dots;                       // [T, N, Sp]
  int64_t tokens;
  int num_sources, num_queries, padded_queries, dim;
};

template <class T>
__global__ void __launch_bounds__(kDotsThreads, 3)
    attend_dots_kernel(const __grid_constant__ AttendDotsParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int query_tiles = p.padded_queries / kDotsQueries;
  const int source_tiles = (p.num_sources + kDotsSources - 1) / kDotsSources;
  const int tiles = query_tiles * source_tiles;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kDotsThreads / kWarp);
  for (int64_t work = (static_cast<int64_t>(blockIdx.x) * kDotsThreads + threadIdx.x) / kWarp;
       work < p.tokens * tiles; work += warps) {
    const int64_t t = work / tiles;
    const int tile = static_cast<int>(work - t * tiles);
    const int n0 = tile / query_tiles * kDotsSources;
    const int s0 = tile % query_tiles * kDotsQueries;

    RowRef source[kDotsSources];
#pragma unroll
    for (int n = 0; n < kDotsSources; ++n) {
      source[n] = p.sources.row(min(n0 + n, p.num_sources - 1), t);
    }

    float dots[kDotsSources * kDotsQueries] = {};  // (sources, queries)
    for (int col = lane * kChunk; col < p.dim; col += kWarp * kChunk) {
      Packed<T> packed_v[kDotsSources];
#pragma unroll
      for (int n = 0; n < kDotsSources; ++n) {
        packed_v[n] = load_packed<T>(source[n], col, p.dim);
      }
      Chunk v[kDotsSources];
#pragma unroll
      for (int n = 0; n < kDotsSources; ++n) {
        v[n] = unpack(packed_v[n]);
      }
#pragma unroll
      for (int s1 = 0; s1 < kDotsQueries; s1 += kDotsBatch) {
        Packed<T> packed_g[kDotsBatch];
#pragma unroll
        for (int s = 0; s < kDotsBatch; ++s) {
          packed_g[s] =
              load_packed<T>(p.dout.row(min(s0 + s1 + s, p.num_queries - 1), t), col, p.dim);
        }
#pragma unroll
        for (int s = 0; s < kDotsBatch; ++s) {
          const Chunk g = unpack(packed_g[s]);
#pragma unroll
          for (int n = 0; n < kDotsSources; ++n) {
            float& dot = dots[n * kDotsQueries + s1 + s];
            dot = dot_add(g, v[n], dot);
          }
        }
      }
    }
    const float dot = warp_sum_scatter(dots);
    const int n = n0 + lane / kDotsQueries;
    if (n < p.num_sources) {
      p.dots[(t * p.num_sources + n) * p.padded_queries + s0 + lane % kDotsQueries] = dot;
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DOTS_CUH_
