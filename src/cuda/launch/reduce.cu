#include <algorithm>

#include "cuda/kernels/reduce_partials.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {
namespace {

ReducePartialsTask make_task(const Reduction& reduction) {
  return {reduction.partials,           reduction.stride,
          value_view(reduction.result), reduction.result.rows * reduction.result.cols,
          reduction.result.cols,        reduction.accumulate};
}

}  // namespace

void launch_reduce(Call& call, int64_t count, const Reduction& first, const Reduction& second) {
  ReducePartialsParams params = {};
  params.count = count;
  int64_t elements = 0;
  unsigned tasks = 0;
  for (const Reduction* reduction : {&first, &second}) {
    if (reduction->result.present()) {
      params.tasks[tasks++] = make_task(*reduction);
      elements = std::max(elements, reduction->result.rows * reduction->result.cols);
    }
  }
  if (tasks > 0) {
    call.launch_with({.overlap = true}, reduce_partials_kernel,
                     dim3(grid_blocks(ceil_div(elements, kWarp)), tasks),
                     dim3(kWarp, kReduceShares), 0, params);
  }
}

}  // namespace flash_attn_res::cuda
