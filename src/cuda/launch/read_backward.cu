// read_backward: one kernel over the tokens, staged or streamed like the forward, then the sums of
// the query's and the norm weight's gradients.

#include <algorithm>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/kernels/read_backward_staged.cuh"
#include "cuda/kernels/read_streamed.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {
namespace {

constexpr int kMaxStreamedRows = kMaxReadRows;

struct ReadBackwardShape {
  int64_t T, D, R, K;
  int64_t padded_dim;  // floats of a row of partial sums
  int64_t max_blocks;

  explicit ReadBackwardShape(const ReadBackwardArgs& args)
      : T(args.logits.rows),
        D(args.phase1_out.present()
              ? args.phase1_out.cols
              : (args.sources.empty() ? args.partial.cols : args.sources[0].cols)),
        R(args.query.present() ? args.query.cols : D),
        K(args.logits.cols),
        padded_dim(round_up(D, kChunk)),
        max_blocks(std::min(T, max_read_backward_blocks(D))) {}
};

/// Pieces of the workspace.
struct ReadBackwardScratch {
  float* dquery;   // [blocks, padded D]
  float* dweight;  // [blocks, padded D]
  float* dh;       // [blocks, padded D], of the streamed kernel

  ReadBackwardScratch(Workspace& workspace, const ReadBackwardShape& shape,
                      const ReadBackwardArgs& args) {
    const int64_t count = shape.max_blocks * shape.padded_dim;
    dquery = args.dquery.present() ? workspace.floats(count) : nullptr;
    dweight = args.dnorm_weight.present() ? workspace.floats(count) : nullptr;
    dh = workspace.floats(count);
  }
};

template <int kRows>
ReadBackwardParams<kRows> make_params(const ReadBackwardArgs& args, const ReadBackwardShape& shape,
                                      const ReadBackwardScratch& scratch) {
  ReadBackwardParams<kRows> p = {};
  p.first_key = args.phase1_out.present() ? 1 : 0;
  p.has_partial = args.partial.present();
  if (args.phase1_out.present()) {
    p.rows.set(p.num_terms++, value_view(args.phase1_out));
  }
  for (const ConstMatrix& source : args.sources) {
    p.rows.set(p.num_terms++, value_view(source));
  }
  if (args.partial.present()) {
    p.rows.set(p.num_terms++, value_view(args.partial));
  }
  p.query = float_view(args.query);
  p.scale = static_cast<float>(args.scale);
  p.inv_key_dim = 1.0f / static_cast<float>(shape.R);
  p.dim = static_cast<int>(shape.D);
  p.key_begin = static_cast<int>(shape.D - shape.R);
  p.norm = args.norm == OutputNorm::kRms;
  p.round_mix = args.mix_rounding == MixRounding::kStorage;
  p.mix_dtype = args.dx.dtype;
  p.norm_weight = value_view(args.norm_weight);
  p.logits = float_view(args.logits);
  p.inv_rms = float_view(args.inv_rms);
  p.mix_inv_rms = float_view(args.mix_inv_rms);
  p.dx = value_view(args.dx);
  p.dmix = value_view(args.dmix);
  p.dpartial_out = value_view(args.dpartial_out);
  p.dphase1_out = value_view(args.dphase1_out);
  p.dh = value_view(args.dh);
  p.dpartial = value_view(args.dpartial);
  p.dphase1_lse = float_view(args.dphase1_lse);
  p.gate = float_view(args.gate);
  for (size_t n = 0; n < args.dsources.size(); ++n) {
    p.dsources.set(static_cast<int>(n), value_view(args.dsources[n]));
  }
  p.has_dsources = !args.dsources.empty();
  p.accumulate = args.accumulate_dsources;
  p.dquery_partials = scratch.dquery;
  p.dweight_partials = scratch.dweight;
  p.dh_scratch = scratch.dh;
  p.tokens = shape.T;
  return p;
}

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
    const auto params = make_params<kMaxStreamedRows>(args, shape, scratch);
    const UniformType storage = storage_of(params, /*with_gradients=*/true);
    const ReadPolicy policy = choose_read_backward(params, storage, call.limits());
    if (policy.staged) {
      blocks = run_staged(call, make_params<kMaxStagedRows>(args, shape, scratch), storage.get(),
                          policy, max_blocks);
    } else {
      blocks = run_streamed(call, params, storage_of(params, /*with_gradients=*/false).get(),
                            max_blocks);
    }
  }
  if (args.dquery.present()) {
    // Without a query no key is met: the kernels leave zeros.
    launch_reduce(call, T > 0 ? scratch.dquery + (D - R) : nullptr, blocks, padded_dim, args.dquery,
                  args.accumulate_dquery);
  }
  if (args.dnorm_weight.present()) {
    launch_reduce(call, scratch.dweight, blocks, padded_dim, args.dnorm_weight,
                  args.accumulate_dnorm_weight);
  }
  return call.status();
}

}  // namespace flash_attn_res::cuda
