// Adds up partial sums of a gradient in a fixed order.
//
//   result[row, col] = [result[row, col] +] sum over i of partials[i, row * cols + col]
//
// in    partials [count, rows * cols] float32, rows `stride` elements apart
// out   result [rows, cols], any dtype, overwritten or added to
// bytes count * rows * cols floats; small beside what made them
// sums  float32: 32 shares of the partials in order, then the shares in order
//
// Two gradients with equal counts of partial sums are reduced side by side. A block has 32 columns
// and 32 shares, so that even one row of 2048 fills 64 blocks.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_REDUCE_PARTIALS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_REDUCE_PARTIALS_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kReduceShares = 32;

struct ReducePartialsTask {
  const float* partials;  // [count, elements], rows `stride` apart
  int64_t stride;
  ValueView result;  // [rows, cols]
  int64_t elements;  // rows * cols
  int64_t cols;
  bool accumulate;
};

struct ReducePartialsParams {
  ReducePartialsTask tasks[2];  // one for each block index along y
  int64_t count;
};

// block: (32 elements, 32 shares)
static __global__ void __launch_bounds__(kWarp* kReduceShares)
    reduce_partials_kernel(const __grid_constant__ ReducePartialsParams params) {
  const ReducePartialsTask& p = params.tasks[blockIdx.y];
  wait_for_previous_grid();  // which makes the partial sums: this was launched while it ran
  __shared__ float sums[kReduceShares][kWarp];
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t share = (params.count + kReduceShares - 1) / kReduceShares;
  const int64_t begin = min(params.count, share * threadIdx.y);
  const int64_t end = min(params.count, begin + share);
  float sum = 0.0f;
  if (element < p.elements) {
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) {
      sum += p.partials[i * p.stride + element];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && element < p.elements) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kReduceShares; ++i) {
      total += sums[i][threadIdx.x];
    }
    const RowRef row = p.result.row(element / p.cols);
    const int64_t col = element % p.cols;
    switch (row.dtype) {
      case DType::kBFloat16: {
        __nv_bfloat16& held = reinterpret_cast<__nv_bfloat16*>(row.data)[col];
        held = __float2bfloat16_rn(p.accumulate ? __bfloat162float(held) + total : total);
        break;
      }
      case DType::kFloat16: {
        __half& held = reinterpret_cast<__half*>(row.data)[col];
        held = __float2half_rn(p.accumulate ? __half2float(held) + total : total);
        break;
      }
      default: {
        float& held = reinterpret_cast<float*>(row.data)[col];
        held = p.accumulate ? held + total : total;
        break;
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_REDUCE_PARTIALS_CUH_
