// attend_backward: <dout, v>, weights, gradients of the sources, gradients of the queries. Five
// kernels; 4N + 2S units of traffic, 5N + 2S when accumulating.

#include <algorithm>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/hopper.h"
#include "cuda/kernels/attend_dots.cuh"
#include "cuda/kernels/attend_dqueries.cuh"
#include "cuda/kernels/attend_dsources.cuh"
#include "cuda/kernels/attend_weights.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {
namespace {

struct AttendBackwardShape {
  int64_t T, N, S, D, R, Sp;

  explicit AttendBackwardShape(const AttendBackwardArgs& args)
      : T(args.sources[0].rows),
        N(static_cast<int64_t>(args.sources.size())),
        S(args.queries.rows),
        D(args.sources[0].cols),
        R(args.queries.cols),
        Sp(padded_queries(S)) {}
};

/// Pieces of the workspace.
struct AttendBackwardScratch {
  float* grad_weights;   // [T, N, Sp]
  float* query_weights;  // [T, N, Sp]
  float* key_weights;    // [T, N]
  float* partials;       // [splits, S, R]

  AttendBackwardScratch(Workspace& workspace, const AttendBackwardShape& shape, bool has_dqueries)
      : grad_weights(workspace.floats(shape.T * shape.N * shape.Sp)),
        query_weights(workspace.floats(shape.T * shape.N * shape.Sp)),
        key_weights(workspace.floats(shape.T * shape.N)),
        partials(workspace.floats(has_dqueries
                                      ? choose_dqueries(shape.T, shape.S, shape.D, shape.R).splits *
                                            shape.S * shape.R
                                      : 0)) {}
};

}  // namespace

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args) {
  Workspace workspace;
  const AttendBackwardScratch scratch(workspace, AttendBackwardShape(args),
                                      args.dqueries.present());
  return std::max(workspace.used(), hopper::attend_backward_workspace_bytes(args));
}

Status attend_backward(const AttendBackwardArgs& args, const Context& context) {
  const AttendBackwardShape shape(args);
  const auto [T, N, S, D, R, Sp] = shape;
  if (Status status = check_dim("attend_backward", D); !status.ok()) {
    return status;
  }
  Call call("attend_backward", shape_text({{"S", S}, {"N", N}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }
  if (T == 0) {
    if (args.dqueries.present()) {
      launch_reduce(call, 0, {nullptr, 0, args.dqueries, args.accumulate_dqueries});
    }
    return call.status();
  }
  if (hopper::serves(args, call.limits().major, call.limits().minor)) {
    return hopper::attend_backward(args, context);
  }
  Workspace workspace(context.workspace);
  const AttendBackwardScratch scratch(workspace, shape, args.dqueries.present());
  const bool has_dout = !args.dout.empty();

  AttendDotsParams dots_params = {};
  AttendDsourcesParams dsources_params = {};
  AttendDqueriesParams dqueries_params = {};
  UniformType storage(D);
  for (int64_t n = 0; n < N; ++n) {
    const ValueView view = value_view(args.sources[n]);
    storage.add(view);
    dots_params.sources.set(static_cast<int>(n), view);
    dsources_params.sources.set(static_cast<int>(n), view);
    dqueries_params.sources.set(static_cast<int>(n), view);
    if (!args.source_scales.empty()) {
      storage.add_scaled();
      dots_params.sources.set_scale(static_cast<int>(n), args.source_scales[n]);
      dsources_params.sources.set_scale(static_cast<int>(n), args.source_scales[n]);
      dqueries_params.sources.set_scale(static_cast<int>(n), args.source_scales[n]);
    }
  }
  for (size_t s = 0; s < args.dout.size(); ++s) {
    const ValueView view = value_view(args.dout[s]);
    storage.add(view);
    dots_params.dout.set(static_cast<int>(s), view);
    dsources_params.dout.set(static_cast<int>(s), view);
  }
  for (size_t n = 0; n < args.dsources.size(); ++n) {
    dsources_params.dsources.set(static_cast<int>(n), value_view(args.dsources[n]));
  }

  dots_params.dots = scratch.grad_weights;
  dots_params.tokens = T;
  dots_params.num_sources = static_cast<int>(N);
  dots_params.num_queries = static_cast<int>(S);
  dots_params.padded_queries = static_cast<int>(Sp);
  dots_params.dim = static_cast<int>(D);

  AttendWeightsParams weights_params = {};
  weights_params.grad_weights = scratch.grad_weights;
  weights_params.query_weights = scratch.query_weights;
  weights_params.key_weights = scratch.key_weights;
  weights_params.logits = float_view(args.logits);
  weights_params.lse = float_view(args.lse);
  weights_params.inv_rms = float_view(args.inv_rms);
  weights_params.gate = float_view(args.gate);
  weights_params.dlse = float_view(args.dlse);
  weights_params.tokens = T;
  weights_params.num_sources = static_cast<int>(N);
  weights_params.num_queries = static_cast<int>(S);
  weights_params.padded_queries = static_cast<int>(Sp);
  weights_params.width = Sp == 8 ? 8 : Sp == 16 ? 16 : kWarp;
  weights_params.has_dout = has_dout;
  weights_params.key_dim = static_cast<float>(R);
  weights_params.scale = static_cast<float>(args.scale);

  const DsourcesPolicy dsources = choose_dsources(S, D);
  dsources_params.queries = float_view(args.queries);
  dsources_params.grad_weights = scratch.grad_weights;
  dsources_params.query_weights = scratch.query_weights;
  dsources_params.key_weights = scratch.key_weights;
  dsources_params.tokens = T;
  dsources_params.num_sources = static_cast<int>(N);
  dsources_params.num_queries = static_cast<int>(S);
  dsources_params.padded_queries = static_cast<int>(Sp);
  dsources_params.dim = static_cast<int>(D);
  dsources_params.key_begin = static_cast<int>(D - R);
  dsources_params.has_dout = has_dout;
  dsources_params.accumulate = args.accumulate_dsources;

  const DqueriesPolicy dqueries = choose_dqueries(T, S, D, R);
  dqueries_params.query_weights = scratch.query_weights;
  dqueries_params.partials = scratch.partials;
  dqueries_params.tokens = T;
  dqueries_params.tokens_per_split = dqueries.tokens_per_split;
  dqueries_params.num_sources = static_cast<int>(N);
  dqueries_params.num_queries = static_cast<int>(S);
  dqueries_params.padded_queries = static_cast<int>(Sp);
  dqueries_params.dim = static_cast<int>(D);
  dqueries_params.key_begin = static_cast<int>(D - R);
  dqueries_params.first_col = static_cast<int>((D - R) / kChunk * kChunk);

  const int64_t multiprocessors = call.limits().multiprocessors;
  dispatch_storage(storage.get(), [&]<class Storage>() {
    if (has_dout) {
      const int64_t tiles = Sp / kDotsQueries * ceil_div(N, kDotsSources);
      call.launch(attend_dots_kernel<Storage>,
                  dim3(grid_blocks(ceil_div(T * tiles, kDotsThreads / kWarp))), dim3(kDotsThreads),
                  0, dots_params);
    }
    call.launch(attend_weights_kernel,
                dim3(grid_blocks(ceil_div(T, kWeightsThreads / weights_params.width))),
                dim3(kWeightsThreads), 0, weights_params);
    if (!args.dsources.empty()) {
      const ElementwisePolicy& block = dsources.block;
      const int64_t resident =
          ceil_div(multiprocessors * dsources.blocks_per_multiprocessor, block.col_blocks);
      call.launch(attend_dsources_kernel<Storage>,
                  dim3(grid_blocks(std::min(ceil_div(T, block.tokens), resident)),
                       static_cast<unsigned>(block.col_blocks)),
                  dim3(static_cast<unsigned>(block.chunks), static_cast<unsigned>(block.tokens)),
                  dsources.shared_bytes, dsources_params);
    }
    if (args.dqueries.present()) {
      call.launch(
          attend_dqueries_kernel<Storage>,
          dim3(static_cast<unsigned>(dqueries.col_blocks), static_cast<unsigned>(dqueries.splits),
               static_cast<unsigned>(dqueries.tile_groups)),
          dim3(kWarp, static_cast<unsigned>(dqueries.tiles),
               static_cast<unsigned>(dqueries.shares)),
          dqueries.shared_bytes, dqueries_params);
      launch_reduce(call, dqueries.splits,
                    {scratch.partials, S * R, args.dqueries, args.accumulate_dqueries});
    }
  });
  return call.status();
}

}  // namespace flash_attn_res::cuda
