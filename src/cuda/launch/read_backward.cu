// read_backward: one kernel over the tokens, staged or streamed like the forward, then the sums of
// the query's and the norm weight's gradients.

#include <algorithm>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/hopper.h"
#include "cuda/kernels/read_backward_staged.cuh"
#include "cuda/kernels/read_streamed.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"
#include "cuda/launch/read_backward_params.h"

namespace flash_attn_res::cuda {
namespace {

constexpr int kMaxStreamedRows = kMaxReadRows;

/// Rows that a tile of the staged kernel holds.
template <int kRows>
int staged_rows(const ReadBackwardParams<kRows>& p) {
  return p.num_terms + (p.dx.present() ? 1 : 0) + (p.dmix.present() ? 1 : 0) +
         (p.dpartial_out.present() ? 1 : 0);
}

/// Storage of the rows that come in: `terms` alone for the streamed kernel, which reads the
/// gradients by their own dtypes.
template <int kRows>
UniformType storage_of(const ReadBackwardParams<kRows>& p, bool with_gradients) {
  UniformType storage(p.dim);
  for (int j = 0; j < p.num_terms; ++j) {
    storage.add({p.rows.data[j], p.rows.stride_bytes[j], static_cast<DType>(p.rows.dtype[j]),
                 p.rows.vectorized[j] != 0});
    if constexpr (kRows == kMaxStreamedRows) {
      if (p.rows.scale[j] != nullptr) {
        storage.add_scaled();
      }
    }
  }
  if (with_gradients) {
    storage.add(p.dx);
    storage.add(p.dmix);
    storage.add(p.dpartial_out);
  }
  return storage;
}

ReadPolicy choose_read_backward(const ReadBackwardParams<kMaxStreamedRows>& p,
                                const UniformType& storage, const DeviceLimits& limits) {
  const int rows = staged_rows(p);
  if (rows > kMaxStagedRows || p.num_terms > kMaxStagedTerms || !storage.vectorized() ||
      p.dim % kChunk != 0) {
    return {};
  }
  const int planes = is_half(storage.get()) ? 1 : 2;
  // Three and four chunks a thread were no faster at any shape: sums of gradients take their
  // registers, and with them the blocks that hide the barriers.
  constexpr StagedKernel kTwo = {2, kReadBackwardMaxThreads, kReadBackwardRegisters};
  return choose_ring(p.dim, {kTwo}, limits, [&](int threads, int stages) {
    return ReadBackwardStagedLayout(p.query.present(), stages, rows, planes, p.dim / kChunk,
                                    threads / kWarp, p.num_terms)
        .total;
  });
}

using StagedParams = ReadBackwardParams<kMaxStagedRows>;

/// Both runners return the number of blocks, each of which leaves a row of partial sums.
unsigned run_staged(Call& call, StagedParams params, DType storage, const ReadPolicy& policy,
                    int64_t max_blocks) {
  params.stages = policy.stages;
  unsigned blocks = 0;
  dispatch_storage(storage, [&]<class Storage>() {
    const auto kernel = params.norm
                            ? read_backward_staged_kernel<Storage, 2, true, kMaxStagedRows>
                            : read_backward_staged_kernel<Storage, 2, false, kMaxStagedRows>;
    blocks = call.resident_blocks(kernel, policy.threads, policy.shared_bytes, max_blocks);
    call.launch(kernel, dim3(blocks), dim3(static_cast<unsigned>(policy.threads)),
                policy.shared_bytes, params);
  });
  return blocks;
}

unsigned run_streamed(Call& call, const ReadBackwardParams<kMaxStreamedRows>& params, DType storage,
                      int64_t max_blocks) {
  const int64_t shared_bytes = streamed_shared_bytes(params.num_terms);
  const auto kernel = storage == DType::kBFloat16
                          ? read_backward_streamed_kernel<__nv_bfloat16, kMaxStreamedRows>
                          : read_backward_streamed_kernel<AnyType, kMaxStreamedRows>;
  const unsigned blocks = call.resident_blocks(kernel, kStreamedThreads, shared_bytes, max_blocks);
  call.launch(kernel, dim3(blocks), dim3(kStreamedThreads), shared_bytes, params);
  return blocks;
}

}  // namespace

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args) {
  Workspace workspace;
  const ReadBackwardScratch scratch(workspace, ReadBackwardShape(args), args);
  return workspace.used();
}

Status read_backward(const ReadBackwardArgs& args, const Context& context) {
  const ReadBackwardShape shape(args);
  const auto [T, D, R, K, padded_dim, max_blocks] = shape;
  if (Status status = check_dim("read_backward", D); !status.ok()) {
    return status;
  }
  Call call("read_backward", shape_text({{"K", K}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }
  Workspace workspace(context.workspace);
  const ReadBackwardScratch scratch(workspace, shape, args);

  unsigned blocks = 0;
  if (T > 0) {
    const auto params = make_read_backward_params<kMaxStreamedRows>(args, shape, scratch);
    const UniformType storage = storage_of(params, /*with_gradients=*/true);
    if (hopper::serves(args, call.limits())) {
      blocks = hopper::run_read_backward(call, args, shape, scratch);
    } else if (const ReadPolicy policy = choose_read_backward(params, storage, call.limits());
               policy.staged) {
      blocks = run_staged(call, make_read_backward_params<kMaxStagedRows>(args, shape, scratch),
                          storage.get(), policy, max_blocks);
    } else {
      blocks = run_streamed(call, params, storage_of(params, /*with_gradients=*/false).get(),
                            max_blocks);
    }
  }
  // Without a query no key is met: the kernels leave zeros.
  const float* const dquery = scratch.dquery == nullptr ? nullptr : scratch.dquery + (D - R);
  launch_reduce(call, blocks, {dquery, padded_dim, args.dquery, args.accumulate_dquery},
                {scratch.dweight, padded_dim, args.dnorm_weight, args.accumulate_dnorm_weight});
  return call.status();
}

}  // namespace flash_attn_res::cuda
