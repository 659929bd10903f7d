// Fourth part of the backward of `attend`: the queries' gradients, split over tokens.
//
//   partials[split, s, r] = sum over the split's tokens and n of query_weights_sn k_n[r]
//
// in    sources N x [T, D] storage; query_weights [T, N, Sp] float32 of attend_weights
// out   partials [splits, S, R] float32, in the workspace; summed by reduce_partials
// bytes N units of T * D elements
// sums  float32; the number of splits and every order depend on the shapes alone
//
// A lane has one chunk of columns and eight queries: 64 sums in registers over all rows of its
// share. Warps of a block differ in queries (sharing rows through L1) and in rows; the latter are
// added up in shared memory, in order.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DQUERIES_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DQUERIES_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kDqueriesTile = 8;   // queries of a lane
inline constexpr int kDqueriesBatch = 4;  // rows loaded before the first is used
inline constexpr int kDqueriesMaxThreads = 384;

struct AttendDqueriesParams {
  ScaledTable<kMaxSources> sources;  // N x [T, D]
  const float* query_weights;        // [T, N, Sp]
  float* partials;                   // [splits, S, R]
  int64_t tokens, tokens_per_split;
  int num_sources, num_queries, padded_queries, dim, key_begin;
  int first_col;  // columns before it, a multiple of kChunk, are not of the key
};

// block: (32 chunks, query tiles, row shares); grid: (column blocks, splits, groups of query tiles)
template <class T>
__global__ void __launch_bounds__(kDqueriesMaxThreads)
    attend_dqueries_kernel(const __grid_constant__ AttendDqueriesParams p) {
  extern __shared__ float4 shared[];
  float* const sums = reinterpret_cast<float*>(shared);  // (query tiles, 8, 256)

  const int lane = static_cast<int>(threadIdx.x);
  const int s0 = static_cast<int>(blockIdx.z * blockDim.y + threadIdx.y) * kDqueriesTile;
  const int col = p.first_col + (static_cast<int>(blockIdx.x) * kWarp + lane) * kChunk;
  const int64_t split = blockIdx.y;
  const int64_t rows =
      (min(p.tokens, (split + 1) * p.tokens_per_split) - split * p.tokens_per_split) *
      p.num_sources;
  const int64_t share = (rows + blockDim.z - 1) / blockDim.z;
  const int64_t begin = min(rows, share * threadIdx.z);
  const int64_t end = min(rows, begin + share);

  Chunk sum[kDqueriesTile];
#pragma unroll
  for (int s = 0; s < kDqueriesTile; ++s) {
    sum[s] = zero_chunk();
  }
  if (col < p.dim && s0 < p.padded_queries) {
    int64_t t = split * p.tokens_per_split + begin / p.num_sources;
    int n = static_cast<int>(begin % p.num_sources);
    for (int64_t row = begin; row < end; row += kDqueriesBatch) {
      Packed<T> packed[kDqueriesBatch];
      const float* weights[kDqueriesBatch];
#pragma unroll
      for (int i = 0; i < kDqueriesBatch; ++i) {
        packed[i] = load_packed<T>(p.sources.row(n, t), col, p.dim);
        weights[i] = p.query_weights + (t * p.num_sources + n) * p.padded_queries + s0;
        if (row + i + 1 < end && ++n == p.num_sources) {  // past the end, the last row repeats
          n = 0;
          ++t;
        }
      }
#pragma unroll
      for (int i = 0; i < kDqueriesBatch; ++i) {
        if (row + i < end) {
          Chunk key = unpack(packed[i]);
          keep_from(key, col, p.key_begin);
          const float4 low = *reinterpret_cast<const float4*>(weights[i]);
          const float4 high = *reinterpret_cast<const float4*>(weights[i] + 4);
          const float weight[kDqueriesTile] = {low.x,  low.y,  low.z,  low.w,
                                               high.x, high.y, high.z, high.w};
#pragma unroll
          for (int s = 0; s < kDqueriesTile; ++s) {
            add_scaled(sum[s], weight[s], key);
          }
        }
      }
    }
  }

  for (unsigned z = 0; z < blockDim.z; ++z) {
    if (threadIdx.z == z) {
#pragma unroll
      for (int s = 0; s < kDqueriesTile; ++s) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          float& total = sums[((threadIdx.y * kDqueriesTile + s) * kChunk + i) * kWarp + lane];
          total = z == 0 ? sum[s].v[i] : total + sum[s].v[i];
        }
      }
    }
    __syncthreads();
  }
  if (threadIdx.z == 0 && col < p.dim) {
    const int key_dim = p.dim - p.key_begin;
#pragma unroll
    for (int s = 0; s < kDqueriesTile; ++s) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (s0 + s < p.num_queries && col + i >= p.key_begin && col + i < p.dim) {
          p.partials[(split * p.num_queries + s0 + s) * key_dim + col + i - p.key_begin] =
              sums[((threadIdx.y * kDqueriesTile + s) * kChunk + i) * kWarp + lane];
        }
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DQUERIES_CUH_
