#include "cuda/backend.h"
#include "cuda/kernels/stochastic_add.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {

Status stochastic_add(const StochasticAddArgs& args, const Context& context) {
  const int64_t tokens = args.out.rows;
  const int64_t dim = args.out.cols;
  if (tokens == 0) {
    return {};
  }
  if (Status status = check_dim("stochastic_add", dim); !status.ok()) {
    return status;
  }
  Call call("stochastic_add", shape_text({{"T", tokens}, {"D", dim}}), context);
  StochasticAddParams p = {};
  for (const ConstMatrix& term : args.terms) {
    p.terms.set(p.num_terms++, value_view(term));
  }
  p.out = value_view(args.out);
  p.seed = args.seed;
  p.tokens = tokens;
  p.site = static_cast<uint32_t>(args.site);
  p.dim = static_cast<int>(dim);
  p.chunks = static_cast<int>(ceil_div(dim, kChunk));
  call.launch(stochastic_add_kernel,
              dim3(grid_blocks(ceil_div(tokens * p.chunks, kStochasticThreads))),
              dim3(kStochasticThreads), 0, p);
  return call.status();
}

}  // namespace flash_attn_res::cuda
