// quantize: a float32 sum of up to four terms as float16 or float8 with powers of two as scales.
//
// Formulas: include/flash_attn_res/quantize.h. Bytes: the terms read, 2 or 1 a value written; a
// thousandth of that for the scales.
//
// Groups of 128 columns: sixteen lanes have a group, one chunk each, and nothing is read twice. One
// scale a token: a block has the token and reads it twice, the second time from the caches.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_TERMS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_TERMS_CUH_

#include <cstdint>

#include "cuda/device/chunk.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kQuantizeTermsThreads = 256;
inline constexpr int kGroupLanes = static_cast<int>(kScaleGroup) / kChunk;

struct QuantizeTermsParams {
  ValueTable<kMaxQuantizeTerms> terms;
  ValueView out;
  uint8_t* scale;        // [T, groups]
  int64_t scale_stride;  // elements
  int64_t tokens;
  int num_terms, dim, groups;
};

__device__ __forceinline__ Chunk sum_of_terms(const QuantizeTermsParams& p, int64_t t, int col) {
  Chunk sum = load_chunk(p.terms.row(0, t), col, p.dim);
  for (int k = 1; k < p.num_terms; ++k) {
    add(sum, load_chunk(p.terms.row(k, t), col, p.dim));
  }
  return sum;
}

__device__ __forceinline__ void store_quantized(const QuantizeTermsParams& p, int64_t t, int col,
                                                Chunk c, uint32_t exponent) {
  const float inverse = 1.0f / scale_from_bits(exponent);
  const RowRef row = p.out.row(t);
  if (p.out.dtype == DType::kFloat16) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      c.v[i] *= inverse;
    }
    store_any<__half>(row, col, p.dim, c);
  } else if (row.vectorized && col + kChunk <= p.dim) {
    store_fp8_chunk(row, static_cast<unsigned>(col / kChunk), c, inverse);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (col + i < p.dim) {
        row.data[col + i] =
            static_cast<char>(__nv_cvt_float_to_fp8(c.v[i] * inverse, __NV_SATFINITE, __NV_E4M3));
      }
    }
  }
}

static __global__ void __launch_bounds__(kQuantizeTermsThreads)
    quantize_groups_kernel(const __grid_constant__ QuantizeTermsParams p) {
  const int64_t count = p.tokens * p.groups * kGroupLanes;  // every lane takes part in the shuffles
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kQuantizeTermsThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kQuantizeTermsThreads; first < count;
       first += stride) {
    const int64_t i = min(first + threadIdx.x, count - 1);
    const int64_t unit = i / kGroupLanes;
    const int64_t t = unit / p.groups;
    const int group = static_cast<int>(unit % p.groups);
    const int col =
        group * static_cast<int>(kScaleGroup) + static_cast<int>(i % kGroupLanes) * kChunk;
    const Chunk c = col < p.dim ? sum_of_terms(p, t, col) : zero_chunk();
    uint32_t largest = largest_bits(c);
#pragma unroll
    for (int offset = kGroupLanes / 2; offset > 0; offset /= 2) {
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    const uint32_t exponent = storage_exponent(largest, p.out.dtype == DType::kFloat16);
    if (first + threadIdx.x < count) {
      if (col < p.dim) {
        store_quantized(p, t, col, c, exponent);
      }
      if (i % kGroupLanes == 0) {
        p.scale[t * p.scale_stride + group] = static_cast<uint8_t>(exponent);
      }
    }
  }
}

static __global__ void __launch_bounds__(kQuantizeTermsThreads)
    quantize_tokens_kernel(const __grid_constant__ QuantizeTermsParams p) {
  __shared__ uint32_t warp_largest[kQuantizeTermsThreads / kWarp];
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    uint32_t largest = 0;
    for (int col = static_cast<int>(threadIdx.x) * kChunk; col < p.dim;
         col += kQuantizeTermsThreads * kChunk) {
      largest = max(largest, largest_bits(sum_of_terms(p, t, col)));
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (threadIdx.x % kWarp == 0) {
      warp_largest[threadIdx.x / kWarp] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kQuantizeTermsThreads / kWarp; ++w) {
      largest = max(largest, warp_largest[w]);
    }
    __syncthreads();  // before the next token's warps write theirs
    const uint32_t exponent = storage_exponent(largest, p.out.dtype == DType::kFloat16);
    for (int col = static_cast<int>(threadIdx.x) * kChunk; col < p.dim;
         col += kQuantizeTermsThreads * kChunk) {
      store_quantized(p, t, col, sum_of_terms(p, t, col), exponent);
    }
    if (threadIdx.x == 0) {
      p.scale[t * p.scale_stride] = static_cast<uint8_t>(exponent);
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_TERMS_CUH_
