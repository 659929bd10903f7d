// Third part of the backward of `attend`: the sources' gradients.
//
//   dv_n = [dv_n +] sum_s grad_weights_sn dout_s
//          + on the key's columns: sum_s query_weights_sn u_s - key_weights_n k_n
//
// in    sources N x [T, D], dout S x [T, D] storage; queries [S, R]; weights of attend_weights
// out   dsources N x [T, D], any dtype, overwritten or added to
// bytes 2N + S units of T * D elements, 3N + S when accumulating
// sums  float32, over s in order
//
// A block keeps the queries of its columns in shared memory and walks over tokens. A thread has one
// chunk of a token and four sources at a time: 32 sums in registers, each gradient chunk loaded
// once for the four. More sources take further turns, gradients then coming from L1.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DSOURCES_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DSOURCES_CUH_

#include "cuda/device/chunk.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kDsourcesTile = 4;   // sources at a time
inline constexpr int kDsourcesBatch = 4;  // gradients loaded before the first is used
inline constexpr int kDsourcesMaxThreads = 256;

struct AttendDsourcesParams {
  ScaledTable<kMaxSources> sources;  // N x [T, D]
  ValueTable<kMaxSources> dsources;  // N x [T, D]
  ValueTable<kMaxQueries> dout;      // S x [T, D]
  FloatView queries;                 // [S, R]
  const float* grad_weights;         // [T, N, Sp]
  const float* query_weights;        // [T, N, Sp]
  const float* key_weights;          // [T, N]
  int64_t tokens;
  int num_sources, num_queries, padded_queries, dim, key_begin;
  bool has_dout, accumulate;
};

// block: (chunks, tokens); grid: (blocks along the tokens, column blocks)
template <class T>
__global__ void __launch_bounds__(kDsourcesMaxThreads)
    attend_dsources_kernel(const __grid_constant__ AttendDsourcesParams p) {
  extern __shared__ float4 shared[];
  // Queries of this block's columns, lower and upper halves of chunks apart: (Sp, 2, chunks).
  float4* const queries = shared;
  const int chunks = static_cast<int>(blockDim.x);
  const int block_col = static_cast<int>(blockIdx.y) * chunks * kChunk;
  const int block_threads = chunks * static_cast<int>(blockDim.y);
  for (int i = static_cast<int>(threadIdx.y) * chunks + static_cast<int>(threadIdx.x);
       i < p.padded_queries * 2 * chunks; i += block_threads) {
    const int s = i / (2 * chunks);
    const int half = i / chunks % 2;
    const int first = block_col + i % chunks * kChunk + half * 4;
    float value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int col = first + k;
      const bool inside = s < p.num_queries && col >= p.key_begin && col < p.dim;
      value[k] = inside ? p.queries.at(s, col - p.key_begin) : 0.0f;
    }
    queries[i] = {value[0], value[1], value[2], value[3]};
  }
  __syncthreads();

  const int col = block_col + static_cast<int>(threadIdx.x) * kChunk;
  if (col >= p.dim) {
    return;
  }
  const bool in_key = col + kChunk > p.key_begin;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < p.tokens;
       t += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    for (int n0 = 0; n0 < p.num_sources; n0 += kDsourcesTile) {
      Packed<T> source[kDsourcesTile];
      Chunk dv[kDsourcesTile];
      int64_t weights[kDsourcesTile];  // offset of (t, n, 0)
#pragma unroll
      for (int i = 0; i < kDsourcesTile; ++i) {
        const int n = min(n0 + i, p.num_sources - 1);
        weights[i] = (t * p.num_sources + n) * p.padded_queries;
        source[i] = load_packed<T>(p.sources.row(n, t), col, p.dim);
        dv[i] = p.accumulate ? load_chunk_as<T>(p.dsources.row(n, t), col, p.dim) : zero_chunk();
      }
      if (in_key) {
#pragma unroll
        for (int i = 0; i < kDsourcesTile; ++i) {
          Chunk key = unpack(source[i]);
          keep_from(key, col, p.key_begin);
          add_scaled(dv[i], -p.key_weights[t * p.num_sources + min(n0 + i, p.num_sources - 1)],
                     key);
        }
      }
      for (int s0 = 0; s0 < p.num_queries; s0 += kDsourcesBatch) {
        if (p.has_dout) {
          Packed<T> grad[kDsourcesBatch];
#pragma unroll
          for (int k = 0; k < kDsourcesBatch; ++k) {
            grad[k] = load_packed<T>(p.dout.row(min(s0 + k, p.num_queries - 1), t), col, p.dim);
          }
          float4 weight[kDsourcesTile];
#pragma unroll
          for (int i = 0; i < kDsourcesTile; ++i) {
            weight[i] = *reinterpret_cast<const float4*>(p.grad_weights + weights[i] + s0);
          }
#pragma unroll
          for (int k = 0; k < kDsourcesBatch; ++k) {
            if (s0 + k < p.num_queries) {
              const Chunk g = unpack(grad[k]);
#pragma unroll
              for (int i = 0; i < kDsourcesTile; ++i) {
                add_scaled(dv[i], reinterpret_cast<const float*>(&weight[i])[k], g);
              }
            }
          }
        }
        if (in_key) {
          float4 weight[kDsourcesTile];
#pragma unroll
          for (int i = 0; i < kDsourcesTile; ++i) {
            weight[i] = *reinterpret_cast<const float4*>(p.query_weights + weights[i] + s0);
          }
#pragma unroll
          for (int k = 0; k < kDsourcesBatch; ++k) {
            const float4* plane = queries + (s0 + k) * 2 * chunks + threadIdx.x;
            const float4 low = plane[0];
            const float4 high = plane[chunks];
            const Chunk u = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int i = 0; i < kDsourcesTile; ++i) {
              add_scaled(dv[i], reinterpret_cast<const float*>(&weight[i])[k], u);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kDsourcesTile; ++i) {
        if (n0 + i < p.num_sources) {
          store_chunk_as<T>(p.dsources.row(n0 + i, t), col, p.dim, dv[i]);
        }
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_DSOURCES_CUH_
