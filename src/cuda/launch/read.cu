// read: one kernel, a token's rows in registers where they fit and are aligned (of many tokens in
// the usual call those of the next on their way), else streamed, with the quantisation of x and the
// snapshot behind it.

#include <cstdint>
#include <span>
#include <utility>

#include "common/validate.h"
#include "cuda/backend.h"
#include "cuda/hopper.h"
#include "cuda/kernels/read_rows.cuh"
#include "cuda/kernels/read_streamed.cuh"
#include "cuda/launch/attend_as_read.h"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"
#include "cuda/launch/read_ahead.h"
#include "cuda/launch/read_forward_params.h"
#include "cuda/launch/read_stored.h"

namespace flash_attn_res::cuda {
namespace {

using RowsKernel = void (*)(ReadRowsParams);

/// The kernel of a policy.
template <class Storage, bool kQuantized>
RowsKernel find_rows_kernel(const ReadRowsPolicy& policy, const ReadVariant& variant) {
  constexpr bool kHalf = sizeof(Packed<Storage>) == 16;
  constexpr std::span<const ReadRowsForm> kForms = read_rows_forms(kHalf);
  RowsKernel found = nullptr;
  const auto look_at = [&]<size_t kIndex>() {
    constexpr int kTerms = kForms[kIndex].terms;
    constexpr int kChunks = kForms[kIndex].chunks;
    const auto choose = [&]<bool kMerge>() {
      found = read_rows_kernel<Storage, kTerms, kChunks, kMerge, kQuantized, AnyRead>;
      if constexpr (kHalf && !kQuantized && kTerms <= 18) {
        if (variant.usual && !variant.norm) {
          found =
              read_rows_kernel<Storage, kTerms, kChunks, kMerge, false, UsualRead<false, false>>;
        } else if (variant.usual && !variant.update) {
          found = read_rows_kernel<Storage, kTerms, kChunks, kMerge, false, UsualRead<true, false>>;
        } else if (variant.usual) {
          found = read_rows_kernel<Storage, kTerms, kChunks, kMerge, false, UsualRead<true, true>>;
        }
      }
    };
    if (kTerms == policy.terms && kChunks == policy.chunks) {
      variant.merge ? choose.template operator()<kTerms == 2>()
                    : choose.template operator()<false>();
    }
  };
  const auto look = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kIndex>(), ...);
  };
  look(std::make_index_sequence<kForms.size()>());
  return found;
}

RowsKernel find_rows_kernel(DType storage, bool quantized, const ReadRowsPolicy& policy,
                            const ReadVariant& variant) {
  switch (storage) {
    case DType::kBFloat16:
      return quantized ? find_rows_kernel<__nv_bfloat16, true>(policy, variant)
                       : find_rows_kernel<__nv_bfloat16, false>(policy, variant);
    case DType::kFloat16:
      return quantized ? find_rows_kernel<__half, true>(policy, variant)
                       : find_rows_kernel<__half, false>(policy, variant);
    default:
      return quantized ? find_rows_kernel<AnyAligned, true>(policy, variant)
                       : find_rows_kernel<AnyAligned, false>(policy, variant);
  }
}

/// Whether rows of float8 can be stored in pieces of eight.
bool is_aligned_to_eight(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 8 == 0 &&
         (matrix.rows <= 1 || matrix.stride % 8 == 0);
}

/// Runs the whole call, x quantised and the snapshot taken where that is asked for, with its rows
/// in registers, if a kernel can. `storage` is that of the rows; `lse`: where the call is an
/// `attend` with one query.
bool run_rows(Call& call, const ReadArgs& args, UniformType storage, FloatView lse = {}) {
  const int64_t T = args.x.rows;
  const int64_t D = args.x.cols;
  const bool quantized = args.x_scale.present();
  if (!quantized) {
    storage.add(value_view(args.x));
  }
  storage.add(value_view(args.mix));
  storage.add(value_view(args.snapshot));
  const bool aligned = storage.vectorized() && D % kChunk == 0 &&
                       (!quantized || is_aligned_to_eight(args.x)) &&
                       (!args.norm_weight.present() || value_view(args.norm_weight).vectorized);
  const bool half = is_half(storage.get());
  const ReadRowsPolicy policy =
      choose_read_rows(half, read_terms(args), D, call.limits().major >= 9, T);
  // Tokens and blocks are counted in 32 bits.
  const int64_t blocks =
      policy.terms == 0 ? 0 : ceil_div(T, policy.tokens) * int64_t{policy.cluster};
  if (!aligned || policy.terms == 0 || blocks != grid_blocks(blocks)) {
    return false;
  }
  ReadRowsParams params = make_read_params<kReadRowsMaxTerms + kReadRowsMaxUpdates>(args);
  params.lse = lse;
  const RowsKernel kernel =
      find_rows_kernel(storage.get(), quantized, policy, variant_of(args, storage));
  if (policy.cluster > 1 && !call.compiled_for(9, kernel)) {
    return false;
  }
  place_in_slots(params, policy.terms);
  const int64_t shared_bytes =
      int64_t{policy.tokens} * floats_of_sums(D, policy.terms, quantized) * 4;
  call.launch_with(
      {.cluster = policy.cluster, .overlap = true}, kernel, dim3(grid_blocks(blocks)),
      dim3(static_cast<unsigned>(policy.threads), static_cast<unsigned>(policy.tokens)),
      shared_bytes, params);
  return true;
}

void run_streamed(Call& call, ReadParams<kMaxReadRows> params, DType storage) {
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
                          ? read_streamed_kernel<__nv_bfloat16, kMaxReadRows>
                          : read_streamed_kernel<AnyType, kMaxReadRows>;
  const unsigned blocks =
      call.resident_blocks(kernel, kStreamedThreads, shared_bytes, params.tokens);
  call.launch(kernel, dim3(blocks), dim3(kStreamedThreads), shared_bytes, params, first_partial);
}

/// Of reads that quantise their x in a second launch: rows [T, D].
float* scratch_rows(Workspace& workspace, const ReadArgs& args) {
  return workspace.floats(args.x_scale.present() ? args.x.rows * args.x.cols : 0);
}

}  // namespace

bool run_attend_as_read(Call& call, const AttendArgs& args) {
  if (args.queries.rows != 1) {
    return false;
  }
  ReadArgs read = {};
  read.sources = args.sources;
  read.source_scales = args.source_scales;
  read.query = args.queries;
  read.scale = args.scale;
  read.eps = args.eps;
  read.x = args.out[0];
  read.logits = args.logits;
  read.inv_rms = args.inv_rms;
  read.probs = args.probs;
  const UniformType storage = storage_of_rows(read);
  const FloatView lse = float_view(args.lse);
  return run_read_stored(call, read, lse) || run_read_ahead(call, read, storage, lse) ||
         run_rows(call, read, storage, lse);
}

int64_t read_workspace_bytes(const ReadArgs& args) {
  Workspace workspace;
  scratch_rows(workspace, args);
  return workspace.used();
}

Status read(const ReadArgs& given, const Context& context) {
  const int64_t T = given.x.rows;
  const int64_t D = given.x.cols;
  ReadArgs args = given;
  if (!args.partial_out.present()) {
    std::swap(args.partial_out, args.snapshot);  // the only place where the sum goes, if anywhere
  }
  const bool quantized = given.x_scale.present();
  if (quantized && given.mix_rounding == MixRounding::kStorage &&
      mix_dtype(given) != DType::kFloat32) {
    return {StatusCode::kUnsupportedDevice,
            "read: mix_rounding kStorage with x in float8_e4m3 is computed on the CPU alone, "
            "expected kFloat32 on CUDA"};
  }
  if (Status status = check_dim("read", D); !status.ok() || T == 0) {
    return status;
  }
  Call call("read", shape_text({{"K", read_terms(args)}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }
  const UniformType storage = storage_of_rows(args);
  if (run_read_stored(call, args) || run_read_ahead(call, args, storage) ||
      run_rows(call, args, storage)) {
    return call.status();
  }
  if (quantized) {
    Workspace workspace(context.workspace);
    args.x = {scratch_rows(workspace, args), T, D, D, DType::kFloat32};
  }
  run_streamed(call, make_read_params<kMaxReadRows>(args), storage.get());
  if (quantized) {
    launch_quantize(call, args.x, given.x, given.x_scale, given.scale_rounding);
  }
  if (args.snapshot.present()) {
    call.copy(args.partial_out, args.snapshot);
  }
  return call.status();
}

}  // namespace flash_attn_res::cuda
