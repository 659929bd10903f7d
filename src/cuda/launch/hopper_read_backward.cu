// read_backward on Hopper: one kernel over the tokens; the general launcher adds up its partial
// sums.

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/hopper.h"
#include "cuda/kernels/hopper_read_backward.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"
#include "cuda/launch/read_backward_params.h"

namespace flash_attn_res::cuda::hopper {
namespace {

ReadBackwardExtents extents_of(const ReadBackwardArgs& args) {
  const bool norm = args.norm == OutputNorm::kRms;
  const int terms = static_cast<int>(args.logits.cols);
  ReadBackwardExtents extents = {
      .terms = terms,
      .narrow_rows = terms + (args.dx.present() ? 1 : 0) + (args.dmix.present() ? 1 : 0),
      .wide_rows = 0,
      .sums = norm ? SumMap<true>::count(terms) : SumMap<false>::count(terms)};
  const auto count_held = [&](DType dtype, int rows) {
    (dtype == DType::kFloat32 ? extents.wide_rows : extents.narrow_rows) += rows;
  };
  count_held(args.dpartial_out.dtype, args.dpartial_out.present() ? 1 : 0);
  if (args.accumulate_dsources && !args.dsources.empty()) {
    count_held(args.dsources[0].dtype, static_cast<int>(args.dsources.size()));
  }
  return extents;
}

ReadBackwardInputs make_inputs(const ReadBackwardArgs& args, const ReadBackwardExtents& extents) {
  ReadBackwardInputs inputs = {};
  inputs.narrow = extents.narrow_rows;
  inputs.wide = extents.wide_rows;
  int narrow = 0;
  int wide = extents.narrow_rows;
  const auto append = [&](const ConstMatrix& matrix) {
    const ValueView view = value_view(matrix);
    int& next = view.dtype == DType::kFloat32 ? wide : narrow;
    const int place = next;
    if (view.present()) {
      inputs.data[place] = view.data;
      inputs.stride_bytes[place] = view.stride_bytes;
      ++next;
    }
    return place;
  };
  append(args.phase1_out);
  for (const ConstMatrix& source : args.sources) {
    append(source);
  }
  append(args.partial);
  inputs.dx = append(args.dx);
  inputs.dmix = append(args.dmix);
  inputs.dpartial = append(args.dpartial_out);
  if (args.accumulate_dsources && !args.dsources.empty()) {
    inputs.dsources = append(args.dsources[0]);
    for (const Matrix& matrix : args.dsources.subspan(1)) {
      append(matrix);
    }
  }
  return inputs;
}

/// Whether every chunk of the rows is whole, aligned to 16 bytes and of this dtype; absent is fine.
bool is_whole(const ConstMatrix& matrix, DType dtype) {
  return !matrix.present() || (matrix.dtype == dtype && value_view(matrix).vectorized);
}

/// Whether this is what kernels of the usual backward take for granted: of a site in a block, or of
/// sources alone.
bool is_usual(const ReadBackwardArgs& args, const ReadBackwardShape& shape,
              const ReadBackwardPlan& plan) {
  const bool norm = args.norm == OutputNorm::kRms;
  const bool whole = args.query.present() && shape.R == shape.D &&
                     int64_t{plan.columns} * plan.cluster == shape.D &&
                     plan.columns % (plan.chunks * kReadWarpColumns) == 0;
  const bool plain = args.dx.present() && !args.dmix.present() && !args.dphase1_out.present() &&
                     !(norm && args.mix_rounding == MixRounding::kStorage);
  const DType dtype = args.dx.dtype;
  const bool site = shape.K == 2 && args.phase1_out.present() && args.partial.present() &&
                    args.dh.present() == norm && args.dpartial.dtype == dtype &&
                    args.dpartial_out.dtype == dtype;
  const bool sources = shape.K != 2 && !args.phase1_out.present() && !args.partial.present() &&
                       !args.dh.present() && !args.dsources.empty() && !args.accumulate_dsources &&
                       args.dsources[0].present() && args.dsources[0].dtype == dtype;
  return whole && plain && (site || sources);
}

}  // namespace

bool serves(const ReadBackwardArgs& args, const DeviceLimits& limits) {
  const ReadBackwardShape shape(args);
  const bool norm = args.norm == OutputNorm::kRms;
  if (limits.major != 9 || shape.K > kReadTermsMax || shape.D % kChunk != 0 ||
      (shape.D - shape.R) % kChunk != 0 || (norm && !args.dx.present()) ||
      !args.source_scales.empty()) {
    return false;
  }
  const DType dtype = args.phase1_out.present() ? args.phase1_out.dtype
                      : args.sources.empty()    ? args.partial.dtype
                                                : args.sources[0].dtype;
  const auto all_whole = [](const auto& list, DType wanted) {
    return std::ranges::all_of(list,
                               [&](const ConstMatrix& matrix) { return is_whole(matrix, wanted); });
  };
  const bool one_stride = std::ranges::all_of(args.dsources, [&](const Matrix& matrix) {
    return matrix.stride == args.dsources[0].stride;
  });
  const DType gradient = args.dsources.empty() ? dtype : args.dsources[0].dtype;
  const ConstMatrix values[] = {args.phase1_out, args.partial,     args.dx,
                                args.dmix,       args.dphase1_out, args.dh};
  const auto is_gradient = [&](const ConstMatrix& matrix) {
    return is_whole(matrix, dtype) || is_whole(matrix, DType::kFloat32);
  };
  return one_stride && is_half(dtype) && all_whole(values, dtype) &&
         all_whole(args.sources, dtype) && is_gradient(args.dpartial_out) &&
         is_gradient(args.dpartial) && (gradient == dtype || gradient == DType::kFloat32) &&
         all_whole(args.dsources, gradient) &&
         choose_read_backward(extents_of(args), shape.D, limits).columns > 0;
}

unsigned run_read_backward(Call& call, const ReadBackwardArgs& args, const ReadBackwardShape& shape,
                           const ReadBackwardScratch& scratch, const ReadBackwardPlan* plan) {
  const ReadBackwardExtents extents = extents_of(args);
  HopperReadBackwardParams params = {};
  params.read = make_read_backward_params<kReadTermsMax>(args, shape, scratch);
  params.inputs = make_inputs(args, extents);
  params.plan = plan != nullptr ? *plan : choose_read_backward(extents, shape.D, call.limits());
  // Every group leaves a row of partial sums, for which few tokens have no room.
  constexpr int64_t kManyRows = 512;
  if (shape.max_blocks < kManyRows) {
    params.plan.groups = 1;
  }
  params.map = read_backward_map(params.plan, extents);
  params.inv_dim = 1.0f / static_cast<float>(shape.D);
  params.num_sources = static_cast<int>(args.sources.size());
  params.issued = scratch.issued;
  if (!args.dsources.empty()) {
    params.dsources_stride_bytes = params.read.dsources.stride_bytes[0];
    params.wide_dsources = args.dsources[0].dtype == DType::kFloat32;
  }
  params.wide_dpartial_out = args.dpartial_out.dtype == DType::kFloat32;
  params.wide_dpartial = args.dpartial.dtype == DType::kFloat32;

  const auto launch = [&](auto kernel) {
    const unsigned clusters =
        call.resident_clusters(kernel, params.plan.cluster, params.plan.threads(), params.map.bytes,
                               shape.max_blocks / params.plan.groups);
    params.plan.clusters = static_cast<int>(clusters);
    params.cluster_shift = std::countr_zero(static_cast<unsigned>(params.plan.cluster));
    params.steps = static_cast<int>(shape.T / clusters);
    params.longer = static_cast<int>(shape.T % clusters);
    call.launch_with({.cluster = params.plan.cluster}, kernel,
                     dim3(clusters * static_cast<unsigned>(params.plan.cluster)),
                     dim3(static_cast<unsigned>(params.plan.threads())), params.map.bytes, params);
  };
  // Two terms, as every merge and advance has, are worth kernels of their own: all loops unrolled.
  const auto launch_kernel = [&]<class T, bool kNorm, bool kUsual>() {
    if (params.plan.chunks == 2) {
      launch(read_backward_kernel<T, kNorm, 2, 2, 1, kUsual>);
    } else if (params.read.num_terms == 2) {
      launch(read_backward_kernel<T, kNorm, 2, 1, 1, kUsual>);
    } else if (params.plan.groups == 2) {
      launch(read_backward_kernel<T, kNorm, 0, 1, 2, kUsual>);
    } else {
      launch(read_backward_kernel<T, kNorm, 0, 1, 1, kUsual>);
    }
  };
  const bool usual = is_usual(args, shape, params.plan);
  const auto launch_usual = [&]<class T, bool kNorm>() {
    usual ? launch_kernel.template operator()<T, kNorm, true>()
          : launch_kernel.template operator()<T, kNorm, false>();
  };
  const auto launch_for = [&]<class T>() {
    params.read.norm ? launch_usual.template operator()<T, true>()
                     : launch_usual.template operator()<T, false>();
  };
  if (params.read.rows.dtype[0] == static_cast<uint8_t>(DType::kBFloat16)) {
    launch_for.template operator()<__nv_bfloat16>();
  } else {
    launch_for.template operator()<__half>();
  }
  return static_cast<unsigned>(params.plan.clusters * params.plan.groups);
}

}  // namespace flash_attn_res::cuda::hopper
