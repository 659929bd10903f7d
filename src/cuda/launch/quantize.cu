#include "cuda/kernels/quantize_rows.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {

void launch_quantize(Call& call, const Matrix& rows, const Matrix& x, const Matrix& x_scale,
                     ScaleRounding rounding) {
  QuantizeRowsParams p = {};
  p.rows = static_cast<const float*>(rows.data);
  p.x = static_cast<uint8_t*>(x.data);
  p.x_stride = x.stride;
  p.scale = static_cast<float*>(x_scale.data);
  p.scale_stride = x_scale.stride;
  p.tokens = x.rows;
  p.dim = static_cast<int>(x.cols);
  p.groups = static_cast<int>(x_scale.cols);
  p.width = p.groups == 1 ? p.dim : static_cast<int>(kScaleGroup);
  p.power_of_two = rounding == ScaleRounding::kPowerOfTwo;
  const unsigned blocks =
      call.resident_blocks(quantize_rows_kernel, kQuantizeThreads, 0, p.tokens * p.groups);
  call.launch(quantize_rows_kernel, dim3(blocks), dim3(kQuantizeThreads), 0, p);
}

}  // namespace flash_attn_res::cuda
