// stochastic_add: a float32 sum of up to four terms, rounded to bfloat16 stochastically.
//
// A thread owns a chunk: it loads the terms, sums them from left to right, calls the generator once
// and stores. Bytes: the terms read, 2 a value written. Seed and step are read from global memory,
// so that a captured graph sees what they hold when it is replayed.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_STOCHASTIC_ADD_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_STOCHASTIC_ADD_CUH_

#include <cstdint>

#include "common/philox.h"
#include "cuda/device/chunk.cuh"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res::cuda {

inline constexpr int kStochasticThreads = 256;

struct StochasticAddParams {
  ValueTable<kMaxStochasticTerms> terms;
  ValueView out;
  const int64_t* seed;
  int64_t tokens;
  uint32_t site;
  int num_terms, dim, chunks;  // D, chunks of a row
};

__global__ void __launch_bounds__(kStochasticThreads)
    stochastic_add_kernel(const __grid_constant__ StochasticAddParams p) {
  const int64_t seed = p.seed[0];
  const int64_t step = p.seed[1];
  const int64_t count = p.tokens * p.chunks;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kStochasticThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kStochasticThreads + threadIdx.x; i < count;
       i += stride) {
    const int64_t t = i / p.chunks;
    const int col = static_cast<int>(i % p.chunks) * kChunk;
    Chunk sum = load_chunk(p.terms.row(0, t), col, p.dim);
    for (int k = 1; k < p.num_terms; ++k) {
      add(sum, load_chunk(p.terms.row(k, t), col, p.dim));
    }
    const PhiloxWords words = chunk_words(seed, step, p.site, i);
    // Back in float32 the values are bfloat16 exactly: the store rounds nothing.
#pragma unroll
    for (int lane = 0; lane < kChunk; ++lane) {
      const uint32_t bits =
          round_stochastically(__float_as_uint(sum.v[lane]), lane_bits(words, lane));
      sum.v[lane] = __uint_as_float(bits << 16);
    }
    store_any<__nv_bfloat16>(p.out.row(t), col, p.dim, sum);
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_STOCHASTIC_ADD_CUH_
