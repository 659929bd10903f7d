// `read` of many tokens on Hopper: one kernel, a block for each multiprocessor.

#include <algorithm>
#include <cstdint>

#include "cuda/hopper.h"
#include "cuda/kernels/hopper_read.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda::hopper {
namespace {

template <class T>
auto find_kernel(int terms) {
  switch (terms_together(terms)) {
    case 2:
      return read_kernel<T, 2>;
    case 4:
      return read_kernel<T, 4>;
    default:
      return read_kernel<T, 8>;
  }
}

}  // namespace

bool run_read(Call& call, const ReadRowsParams& read, DType storage, int* issued) {
  const DeviceLimits& limits = call.limits();
  HopperReadParams params = {};
  params.read = read;
  params.plan =
      choose_read(read.num_terms, read.num_rows, read.dim, read.norm, limits.shared_per_block);
  if (params.plan.warps == 0) {
    return false;
  }
  params.map = read_map(params.plan, read.num_terms, read.dim);
  params.issued = issued;
  const auto kernel = storage == DType::kBFloat16 ? find_kernel<__nv_bfloat16>(read.num_terms)
                                                  : find_kernel<__half>(read.num_terms);
  const unsigned blocks = grid_blocks(std::min<int64_t>(read.tokens, limits.multiprocessors));
  call.launch_with({.overlap = true}, kernel, dim3(blocks),
                   dim3(static_cast<unsigned>(params.plan.threads())), params.map.bytes, params);
  return true;
}

}  // namespace flash_attn_res::cuda::hopper
