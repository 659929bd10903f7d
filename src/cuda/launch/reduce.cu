#include "cuda/kernels/reduce_partials.cuh"

#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {

void launch_reduce(Call& call, const float* partials, int64_t count, int64_t stride,
                   const Matrix& result, bool accumulate) {
  const int64_t elements = result.rows * result.cols;
  const ReducePartialsParams params = {partials, stride,      count,     value_view(result),
                                       elements, result.cols, accumulate};
  call.launch(reduce_partials_kernel, dim3(grid_blocks(ceil_div(elements, kWarp))),
              dim3(kWarp, kReduceShares), 0, params);
}

}  // namespace flash_attn_res::cuda
