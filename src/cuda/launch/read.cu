// read: one kernel, staged in shared memory where a token's rows fit and are aligned, else
// streamed.

#include <algorithm>
#include <cstdint>

#include "common/validate.h"
#include "cuda/backend.h"
#include "cuda/kernels/read_staged.cuh"
#include "cuda/kernels/read_streamed.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {
namespace {

constexpr int kMaxStreamedRows = kMaxReadRows;

/// Adds a row behind those that the table holds.
template <int kRows>
void append(ReadParams<kRows>& params, const ConstMatrix& matrix) {
  params.rows.set(params.num_rows++, value_view(matrix));
}

template <int kRows>
ReadParams<kRows> make_params(const ReadArgs& args) {
  const int64_t D = args.x.cols;
  const int64_t R = args.query.present() ? args.query.cols : D;
  ReadParams<kRows> p = {};
  p.first_key = args.phase1_out.present() ? 1 : 0;
  p.has_partial = args.partial.present() || !args.updates.empty();
  if (args.phase1_out.present()) {
    append(p, args.phase1_out);
  }
  for (const ConstMatrix& source : args.sources) {
    append(p, source);
  }
  if (args.partial.present()) {
    append(p, args.partial);
  }
  p.num_terms = static_cast<int>(read_terms(args));
  for (const ConstMatrix& update : args.updates) {
    append(p, update);
  }
  p.phase1_lse = float_view(args.phase1_lse);
  p.query = float_view(args.query);
  p.scale = static_cast<float>(args.scale);
  p.eps = static_cast<float>(args.eps);
  p.inv_key_dim = 1.0f / static_cast<float>(R);
  p.dim = static_cast<int>(D);
  p.key_begin = static_cast<int>(D - R);
  p.norm = args.norm == OutputNorm::kRms;
  p.round_mix = args.mix_rounding == MixRounding::kStorage;
  p.norm_weight = value_view(args.norm_weight);
  p.norm_eps = static_cast<float>(args.norm_eps);
  p.x = value_view(args.x);
  p.partial_out = value_view(args.partial_out);
  p.mix = value_view(args.mix);
  p.logits = float_view(args.logits);
  p.inv_rms = float_view(args.inv_rms);
  p.probs = float_view(args.probs);
  p.mix_inv_rms = float_view(args.mix_inv_rms);
  p.tokens = args.x.rows;
  return p;
}

/// Which storage type serves the rows, and whether all of them can be staged.
template <int kRows>
UniformType storage_of(const ReadParams<kRows>& p) {
  UniformType storage(p.dim);
  for (int j = 0; j < p.num_rows; ++j) {
    storage.add({p.rows.data[j], p.rows.stride_bytes[j], static_cast<DType>(p.rows.dtype[j]),
                 p.rows.vectorized[j] != 0});
  }
  // The new partial sum takes the place of a staged row, or is read back.
  storage.add(p.partial_out);
  return storage;
}

ReadPolicy choose_read(const ReadArgs& args, const ReadParams<kMaxStreamedRows>& p,
                       const UniformType& storage, const DeviceLimits& limits) {
  if (p.num_rows > kMaxStagedRows || p.num_terms > kMaxStagedTerms || !storage.vectorized() ||
      p.dim % kChunk != 0) {
    return {};
  }
  const bool half = is_half(storage.get());
  const auto shared_bytes = [&](int threads, int stages) {
    return ReadStagedLayout(args.query.present(), stages, p.num_rows, half ? 1 : 2, p.dim / kChunk,
                            threads / kWarp, p.num_terms)
        .total;
  };
  // Two chunks a thread wherever they reach; four serve rows of 8192 to 16384 columns.
  const StagedKernel two = {2, kReadMaxThreads, read_registers(half, 2)};
  const StagedKernel four = {4, kReadMaxThreads, read_registers(half, 4)};
  return half ? choose_ring(p.dim, {two, four}, limits, shared_bytes)
              : choose_ring(p.dim, {two}, limits, shared_bytes);
}

using StagedParams = ReadParams<kMaxStagedRows>;

template <class Storage>
auto staged_kernel(int chunks_per_thread) -> void (*)(StagedParams) {
  if constexpr (kHasManyChunks<Storage>) {
    if (chunks_per_thread == 4) {
      return read_staged_kernel<Storage, 4, kMaxStagedRows>;
    }
  }
  return read_staged_kernel<Storage, 2, kMaxStagedRows>;
}

void run_staged(Call& call, StagedParams params, DType storage, const ReadPolicy& policy) {
  params.stages = policy.stages;
  dispatch_storage(storage, [&]<class Storage>() {
    const auto kernel = staged_kernel<Storage>(policy.chunks_per_thread);
    const unsigned blocks =
        call.resident_blocks(kernel, policy.threads, policy.shared_bytes, params.tokens);
    call.launch(kernel, dim3(blocks), dim3(static_cast<unsigned>(policy.threads)),
                policy.shared_bytes, params);
  });
}

void run_streamed(Call& call, ReadParams<kMaxStreamedRows> params, DType storage) {
  ValueView first_partial = {};
  if (params.partial_out.present()) {
    const int last = params.num_terms - 1;
    first_partial = {params.rows.data[last], params.rows.stride_bytes[last],
                     static_cast<DType>(params.rows.dtype[last]),
                     params.rows.vectorized[last] != 0};
    params.rows.set(last, params.partial_out);
  }
  const int64_t shared_bytes = streamed_shared_bytes(params.num_terms);
  const auto kernel = storage == DType::kBFloat16
                          ? read_streamed_kernel<__nv_bfloat16, kMaxStreamedRows>
                          : read_streamed_kernel<AnyType, kMaxStreamedRows>;
  const unsigned blocks =
      call.resident_blocks(kernel, kStreamedThreads, shared_bytes, params.tokens);
  call.launch(kernel, dim3(blocks), dim3(kStreamedThreads), shared_bytes, params, first_partial);
}

}  // namespace

/// A quantised x is computed as float32 rows in the workspace, and quantised by a second launch.
int64_t read_workspace_bytes(const ReadArgs& args) {
  return args.x_scale.present() ? args.x.rows * args.x.cols * size_of(DType::kFloat32) : 0;
}

Status read(const ReadArgs& given, const Context& context) {
  const int64_t T = given.x.rows;
  const int64_t D = given.x.cols;
  ReadArgs args = given;
  if (!args.partial_out.present()) {
    args.partial_out = args.snapshot;  // the only place where the sum goes, if anywhere
  }
  const bool quantized = given.x_scale.present();
  if (quantized) {
    if (given.mix_rounding == MixRounding::kStorage && mix_dtype(given) != DType::kFloat32) {
      return {StatusCode::kUnsupportedDevice,
              "read: mix_rounding kStorage with x in float8_e4m3 is computed on the CPU alone, "
              "expected kFloat32 on CUDA"};
    }
    args.x = {context.workspace, T, D, D, DType::kFloat32};
  }
  if (Status status = check_dim("read", D); !status.ok() || T == 0) {
    return status;
  }
  Call call("read", shape_text({{"K", read_terms(args)}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }
  const auto params = make_params<kMaxStreamedRows>(args);
  const UniformType storage = storage_of(params);
  const ReadPolicy policy = choose_read(args, params, storage, call.limits());
  if (policy.staged) {
    run_staged(call, make_params<kMaxStagedRows>(args), storage.get(), policy);
  } else {
    run_streamed(call, params, storage.get());
  }
  if (quantized) {
    launch_quantize(call, args.x, given.x, given.x_scale, given.scale_rounding);
  }
  if (given.partial_out.present() && given.snapshot.present()) {
    call.copy(given.partial_out, given.snapshot);
  }
  return call.status();
}

}  // namespace flash_attn_res::cuda
