// float32 rows as float8 e4m3 with scales (device/quantize.cuh): the quantised x of reads that do
// not quantise it themselves.
//
// A block owns one token's group of columns: it reads them for the largest absolute value, and
// again, from the caches, to store them. Bytes: 4 a value read, 1 written.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_ROWS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_ROWS_CUH_

#include <cstdint>

#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kQuantizeThreads = 128;

struct QuantizeRowsParams {
  const float* rows;     // [T, D]
  uint8_t* x;            // [T, D]
  int64_t x_stride;      // elements
  float* scale;          // [T, groups]
  int64_t scale_stride;  // elements
  int64_t tokens;
  int dim, groups, width;  // D, groups of a row, columns of a group
  bool power_of_two;
};

__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  __shared__ uint32_t warp_largest[kQuantizeThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t unit = blockIdx.x; unit < p.tokens * p.groups; unit += gridDim.x) {
    const int64_t t = unit / p.groups;
    const int group = static_cast<int>(unit % p.groups);
    const int begin = group * p.width;
    const int end = min(p.dim, begin + p.width);
    const float* const row = p.rows + t * p.dim;
    uint32_t largest = 0;
    for (int d = begin + static_cast<int>(threadIdx.x); d < end; d += kQuantizeThreads) {
      largest = max(largest, absolute_bits(row[d]));
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) {
      warp_largest[threadIdx.x / kWarp] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kQuantizeThreads / kWarp; ++w) {
      largest = max(largest, warp_largest[w]);
    }
    __syncthreads();  // before the next unit's warps write theirs

    const float scale = group_scale(largest, p.power_of_two);
    const float inverse = __frcp_rn(scale);
    for (int d = begin + static_cast<int>(threadIdx.x); d < end; d += kQuantizeThreads) {
      p.x[t * p.x_stride + d] = __nv_cvt_float_to_fp8(row[d] * inverse, __NV_SATFINITE, __NV_E4M3);
    }
    if (threadIdx.x == 0) {
      p.scale[t * p.scale_stride + group] = scale;
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_QUANTIZE_ROWS_CUH_
