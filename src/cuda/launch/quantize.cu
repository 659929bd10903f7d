#include "cuda/backend.h"
#include "cuda/kernels/quantize_rows.cuh"
#include "cuda/kernels/quantize_terms.cuh"
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

Status quantize(const QuantizeArgs& args, const Context& context) {
  const int64_t tokens = args.out.rows;
  const int64_t dim = args.out.cols;
  if (Status status = check_dim("quantize", dim); !status.ok() || tokens == 0) {
    return status;
  }
  Call call("quantize", shape_text({{"T", tokens}, {"D", dim}}), context);
  QuantizeTermsParams p = {};
  for (const ConstMatrix& term : args.terms) {
    p.terms.set(p.num_terms++, value_view(term));
  }
  p.out = value_view(args.out);
  p.scale = static_cast<uint8_t*>(args.scale.data);
  p.scale_stride = args.scale.stride;
  p.tokens = tokens;
  p.dim = static_cast<int>(dim);
  p.groups = static_cast<int>(args.scale.cols);
  if (args.scale.cols == 1 && dim > kScaleGroup) {
    call.launch(quantize_tokens_kernel, dim3(grid_blocks(tokens)), dim3(kQuantizeTermsThreads), 0,
                p);
  } else {
    call.launch(quantize_groups_kernel,
                dim3(grid_blocks(ceil_div(tokens * p.groups * kGroupLanes, kQuantizeTermsThreads))),
                dim3(kQuantizeTermsThreads), 0, p);
  }
  return call.status();
}

}  // namespace flash_attn_res::cuda
