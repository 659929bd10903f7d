// attend: a read where there is one query, on Hopper its kernels, else scores of every row,
// softmax, mixtures: three kernels, 2N + S units of traffic.

#include <algorithm>
#include <cstdint>

#include "cuda/backend.h"
#include "cuda/hopper.h"
#include "cuda/kernels/attend_mix.cuh"
#include "cuda/kernels/attend_scores.cuh"
#include "cuda/kernels/attend_softmax.cuh"
#include "cuda/launch/attend_as_read.h"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda {
namespace {

struct AttendShape {
  int64_t T, N, S, D, R, Sp;

  explicit AttendShape(const AttendArgs& args)
      : T(args.sources[0].rows),
        N(static_cast<int64_t>(args.sources.size())),
        S(args.queries.rows),
        D(args.sources[0].cols),
        R(args.queries.cols),
        Sp(padded_queries(S)) {}
};

/// Pieces of the workspace.
struct AttendScratch {
  float* dots;     // [slices, T, N, Sp]
  float* squares;  // [slices, T, N]

  AttendScratch(Workspace& workspace, const AttendShape& shape, int num_slices)
      : dots(workspace.floats(num_slices * shape.T * shape.N * shape.Sp)),
        squares(workspace.floats(num_slices * shape.T * shape.N)) {}
};

}  // namespace

int64_t attend_workspace_bytes(const AttendArgs& args) {
  const AttendShape shape(args);
  Workspace workspace;
  const AttendScratch scratch(workspace, shape,
                              choose_scores(shape.S, shape.D, shape.R).num_slices);
  return std::max(workspace.used(), hopper::attend_workspace_bytes(args));
}

Status attend(const AttendArgs& args, const Context& context) {
  const AttendShape shape(args);
  const auto [T, N, S, D, R, Sp] = shape;
  if (Status status = check_dim("attend", D); !status.ok() || T == 0) {
    return status;
  }
  Call call("attend", shape_text({{"S", S}, {"N", N}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }
  const bool hopper_serves = hopper::serves(args, call.limits().major, call.limits().minor);
  // One query over 16 sources has 94 % of a copy on tensor cores, 88 as a read (H200, D = 2048);
  // over four 68 and 98.
  constexpr int64_t kMostAsRead = 10;
  if ((!hopper_serves || N <= kMostAsRead) && run_attend_as_read(call, args)) {
    return call.status();
  }
  if (hopper_serves) {
    return hopper::run_attend_few(call, args) ? call.status() : hopper::attend(args, context);
  }
  const ScoresPolicy scores = choose_scores(S, D, R);
  Workspace workspace(context.workspace);
  const AttendScratch scratch(workspace, shape, scores.num_slices);

  AttendScoresParams scores_params = {};
  AttendMixParams mix_params = {};
  UniformType storage(D);
  for (int64_t n = 0; n < N; ++n) {
    const ValueView view = value_view(args.sources[n]);
    storage.add(view);
    scores_params.sources.set(static_cast<int>(n), view);
    mix_params.sources.set(static_cast<int>(n), view);
    if (!args.source_scales.empty()) {
      storage.add_scaled();
      scores_params.sources.set_scale(static_cast<int>(n), args.source_scales[n]);
      mix_params.sources.set_scale(static_cast<int>(n), args.source_scales[n]);
    }
  }
  for (int64_t s = 0; s < S; ++s) {
    mix_params.out.set(static_cast<int>(s), value_view(args.out[s]));
  }

  scores_params.queries = float_view(args.queries);
  scores_params.dots = scratch.dots;
  scores_params.squares = scratch.squares;
  scores_params.tokens = T;
  scores_params.num_sources = static_cast<int>(N);
  scores_params.num_queries = static_cast<int>(S);
  scores_params.padded_queries = static_cast<int>(Sp);
  scores_params.dim = static_cast<int>(D);
  scores_params.key_begin = static_cast<int>(D - R);
  scores_params.first_col = static_cast<int>((D - R) / kChunk * kChunk);
  scores_params.slice_cols = scores.slice_cols;
  scores_params.group_queries = scores.group_queries;

  AttendSoftmaxParams softmax_params = {};
  softmax_params.dots = scratch.dots;
  softmax_params.squares = scratch.squares;
  softmax_params.lse = float_view(args.lse);
  softmax_params.logits = float_view(args.logits);
  softmax_params.inv_rms = float_view(args.inv_rms);
  softmax_params.probs = float_view(args.probs);
  softmax_params.tokens = T;
  softmax_params.num_slices = scores.num_slices;
  softmax_params.num_sources = static_cast<int>(N);
  softmax_params.num_queries = static_cast<int>(S);
  softmax_params.padded_queries = static_cast<int>(Sp);
  softmax_params.key_dim = static_cast<float>(R);
  softmax_params.scale = static_cast<float>(args.scale);
  softmax_params.eps = static_cast<float>(args.eps);

  const ElementwisePolicy mix = choose_elementwise(D, kMixMaxThreads, kMixMaxThreads);
  mix_params.probs = scratch.dots;
  mix_params.tokens = T;
  mix_params.num_sources = static_cast<int>(N);
  mix_params.num_queries = static_cast<int>(S);
  mix_params.padded_queries = static_cast<int>(Sp);
  mix_params.dim = static_cast<int>(D);
  mix_params.col_blocks = mix.col_blocks;

  dispatch_storage(storage.get(), [&]<class Storage>() {
    const int64_t groups = ceil_div(Sp, scores.group_queries);
    const int64_t row_blocks = ceil_div(T * N, kScoreWarps * kScoreRows);
    const int64_t resident = ceil_div(
        static_cast<int64_t>(call.limits().multiprocessors) * scores.blocks_per_multiprocessor,
        scores.num_slices * groups);
    call.launch(attend_scores_kernel<Storage>,
                dim3(grid_blocks(std::min(row_blocks, resident)),
                     static_cast<unsigned>(scores.num_slices), static_cast<unsigned>(groups)),
                dim3(kScoreWarps * kWarp), scores.shared_bytes, scores_params);
    call.launch(attend_softmax_kernel, dim3(grid_blocks(ceil_div(T * S, kSoftmaxThreads))),
                dim3(kSoftmaxThreads), 0, softmax_params);
    call.launch(
        attend_mix_kernel<Storage>, dim3(grid_blocks(ceil_div(T, mix.tokens) * mix.col_blocks)),
        dim3(static_cast<unsigned>(mix.chunks), static_cast<unsigned>(mix.tokens)), 0, mix_params);
  });
  return call.status();
}

}  // namespace flash_attn_res::cuda
