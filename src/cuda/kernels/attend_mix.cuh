// Mixtures of `attend`: out_s = sum_n p_sn v_n.
//
// in    sources N x [T, D] storage; probs [T, N, Sp] float32
// out   out S x [T, D], any dtype
// bytes N units of T * D elements read, S written
// sums  float32, over n in order
//
// One thread a (token, chunk): eight queries at a time in registers, so that a source's chunk is
// read S / 8 times, the later ones from L1. Probabilities are the same for a whole warp (one
// address, L1). Four sources are loaded before the first is used.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_MIX_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_MIX_CUH_

#include "cuda/device/chunk.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kMixQueries = 8;
inline constexpr int kMixSources = 4;
inline constexpr int kMixMaxThreads = 256;

struct AttendMixParams {
  ScaledTable<kMaxSources> sources;  // N x [T, D]
  ValueTable<kMaxQueries> out;       // S x [T, D]
  const float* probs;                // [T, N, Sp]
  int64_t tokens;
  int num_sources, num_queries, padded_queries, dim;
  int col_blocks;  // blocks that share a token
};

// block: (chunks, tokens)
template <class T>
__global__ void __launch_bounds__(kMixMaxThreads)
    attend_mix_kernel(const __grid_constant__ AttendMixParams p) {
  const int64_t works = (p.tokens + blockDim.y - 1) / blockDim.y * p.col_blocks;
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    const int64_t t = work / p.col_blocks * blockDim.y + threadIdx.y;
    const int chunk = static_cast<int>(work % p.col_blocks * blockDim.x + threadIdx.x);
    const int col = chunk * kChunk;
    if (t >= p.tokens || col >= p.dim) {
      continue;
    }
    const float* const probs = p.probs + t * p.num_sources * p.padded_queries;  // (N,Sp)
    for (int s0 = 0; s0 < p.num_queries; s0 += kMixQueries) {
      Chunk out[kMixQueries];
#pragma unroll
      for (int s = 0; s < kMixQueries; ++s) {
        out[s] = zero_chunk();
      }
      for (int n0 = 0; n0 < p.num_sources; n0 += kMixSources) {
        Packed<T> packed[kMixSources];
#pragma unroll
        for (int i = 0; i < kMixSources; ++i) {
          packed[i] = load_packed<T>(p.sources.row(min(n0 + i, p.num_sources - 1), t), col, p.dim);
        }
#pragma unroll
        for (int i = 0; i < kMixSources; ++i) {
          if (n0 + i < p.num_sources) {
            const Chunk v = unpack(packed[i]);
            const float4* prob = reinterpret_cast<const float4*>(
                probs + static_cast<int64_t>(n0 + i) * p.padded_queries + s0);
            const float4 low = prob[0];
            const float4 high = prob[1];
            const float weight[kMixQueries] = {low.x,  low.y,  low.z,  low.w,
                                               high.x, high.y, high.z, high.w};
#pragma unroll
            for (int s = 0; s < kMixQueries; ++s) {
              add_scaled(out[s], weight[s], v);
            }
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kMixQueries; ++s) {
        if (s0 + s < p.num_queries) {
          store_chunk_as<T>(p.out.row(s0 + s, t), col, p.dim, out[s]);
        }
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_MIX_CUH_
