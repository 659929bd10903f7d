// attend_backward on Hopper: one kernel and the sum of its partial du. 2N + S units of traffic,
// 3N + S when accumulating.

#include "cuda/hopper.h"
#include "cuda/kernels/hopper_attend_backward.cuh"
#include "cuda/launch/hopper_launch.h"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda::hopper {
namespace {

/// A compiled kernel: eights of queries, 16-column tiles of a warp, eights of sources.
struct Variant {
  int query_groups, tiles, source_groups;
  const void* kernel;
};

template <class Source, class Gradient, int kQueryGroups, int kTiles, int kSourceGroups>
Variant variant() {
  return {kQueryGroups, kTiles, kSourceGroups,
          reinterpret_cast<const void*>(
              &attend_backward_kernel<kQueryGroups, kTiles, kSourceGroups, Source, Gradient>)};
}

template <class Source, class Gradient>
const void* find_kernel(int query_groups, int tiles, int source_groups) {
  static const Variant kVariants[] = {
      variant<Source, Gradient, 1, 8, 1>(),  variant<Source, Gradient, 1, 9, 1>(),
      variant<Source, Gradient, 1, 16, 1>(), variant<Source, Gradient, 2, 8, 1>(),
      variant<Source, Gradient, 2, 9, 1>(),  variant<Source, Gradient, 3, 7, 1>(),
      variant<Source, Gradient, 3, 8, 1>(),  variant<Source, Gradient, 1, 8, 2>(),
      variant<Source, Gradient, 1, 9, 2>(),  variant<Source, Gradient, 1, 16, 2>(),
      variant<Source, Gradient, 2, 8, 2>(),  variant<Source, Gradient, 2, 9, 2>(),
      variant<Source, Gradient, 3, 7, 2>(),
  };
  for (const Variant& v : kVariants) {
    if (v.query_groups == query_groups && v.tiles == tiles && v.source_groups == source_groups) {
      return v.kernel;
    }
  }
  return nullptr;
}

std::span<const int> tile_choices(int query_groups, int source_groups) {
  static constexpr int kOne[] = {8, 9, 16};
  static constexpr int kTwo[] = {8, 9};
  static constexpr int kThree[] = {7, 8};
  static constexpr int kThreeOfMany[] = {7};  // the weights of N > 8 take registers, too
  if (query_groups == 1) {
    return kOne;
  }
  if (query_groups == 2) {
    return kTwo;
  }
  return source_groups == 1 ? std::span<const int>(kThree) : std::span<const int>(kThreeOfMany);
}

template <class Gradient>
Status run(const AttendBackwardArgs& args, const Context& context, const Plan& plan) {
  const int64_t N = static_cast<int64_t>(args.sources.size());
  const int64_t S = args.queries.rows;
  const int64_t T = args.sources[0].rows;
  const int64_t D = args.sources[0].cols;
  Call call("attend_backward", shape_text({{"S", S}, {"N", N}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }

  AttendBackwardParams<Gradient> params = {};
  for (int64_t n = 0; n < N; ++n) {
    params.inputs.set(n, args.sources[n]);
    params.dsources[n] = static_cast<Gradient*>(args.dsources[n].data);
    params.dsources_stride[n] = args.dsources[n].stride;
  }
  set_layout(params, layout_of(args.sources, args.source_scales), args.source_scales);
  for (int64_t s = 0; s < S; ++s) {
    params.inputs.set(N + s, args.dout[s]);
  }
  const auto floats = [](const ConstMatrix& matrix) {
    return static_cast<const float*>(matrix.data);
  };
  params.queries = floats(args.queries);
  params.lse = floats(args.lse);
  params.logits = floats(args.logits);
  params.inv_rms = floats(args.inv_rms);
  params.gate = floats(args.gate);
  params.dlse = floats(args.dlse);
  params.issued = static_cast<int*>(context.workspace);
  params.partials = reinterpret_cast<float*>(static_cast<char*>(context.workspace) + kCounterBytes);
  params.queries_stride = args.queries.stride;
  params.lse_stride = args.lse.stride;
  params.logits_stride = args.logits.stride;
  params.inv_rms_stride = args.inv_rms.stride;
  params.gate_stride = args.gate.stride;
  params.dlse_stride = args.dlse.stride;
  params.tokens = T;
  params.num_sources = static_cast<int>(N);
  params.num_queries = static_cast<int>(S);
  params.dim = static_cast<int>(D);
  params.scale = static_cast<float>(args.scale);
  params.accumulate = args.accumulate_dsources;
  params.plan = plan;
  params.map = shared_map(params.plan, params.extents());

  const auto find = params.layout.kind == SourceKind::kFloat8    ? find_kernel<Fp8, Gradient>
                    : params.layout.kind == SourceKind::kFloat16 ? find_kernel<__half, Gradient>
                                                                 : find_kernel<Bf16, Gradient>;
  const void* const kernel = find(groups_of_eight(S), plan.tiles, groups_of_eight(N));
  share_out(call, kernel, params.map.bytes, T, params.plan);
  if (params.plan.window > 0) {
    call.zero(params.issued, sizeof(int));
  }
  void* arguments[] = {&params};
  launch_clusters(call, kernel, params.plan, params.map.bytes, arguments, /*overlap=*/false);
  launch_reduce(call, params.plan.clusters,
                {params.partials, S * D, args.dqueries, args.accumulate_dqueries});
  return call.status();
}

}  // namespace

Plan choose_attend_backward(int64_t num_sources, int64_t num_queries, int64_t dim,
                            int64_t gradient_bytes, SourceLayout layout) {
  if (num_sources > kSourcesMax || num_queries > kQueriesMax || dim % 8 != 0) {
    return {};
  }
  AttendBackwardParams<Bf16> sizes = {};
  sizes.num_sources = static_cast<int>(num_sources);
  sizes.num_queries = static_cast<int>(num_queries);
  set_layout(sizes, layout);
  Extents extents = sizes.extents();
  extents.result_bytes = static_cast<int>(gradient_bytes);
  // float8, N, S, D of 4, 4, 2048: two CTAs with eight tiles a warp take 729 us, one with sixteen
  // 834 (H200); with eight queries 769 and 833.
  const bool halved = layout.kind == SourceKind::kFloat8 && dim > kColumnsOfEightTiles;
  // One slot costs 5 to 20 %: the next step's gradients cannot come in while this one's go out.
  Plan plan =
      choose_plan(dim, tile_choices(groups_of_eight(num_queries), groups_of_eight(num_sources)),
                  extents, num_sources * (layout.bytes() + 4) + num_queries * 2,
                  /*most_slots=*/2, {.stages = 3, .slots = 2}, halved ? 2 : 1, kBackwardStepBytes);
  if (plan.cluster == 1 && plan.columns > 1024 && num_sources <= 3) {
    plan.window = 0;  // 2 to 3 % faster without at D = 2048, N = 2 and 3; N = 4 is 1 to 2 % slower
  }
  return plan;
}

bool serves(const AttendBackwardArgs& args, int major, int minor) {
  const int64_t dim = args.sources[0].cols;
  if (major != 9 || minor != 0 || args.queries.cols != dim || args.dout.empty() ||
      args.dsources.empty() || !args.dqueries.present()) {
    return false;
  }
  const DType gradient = args.dsources[0].dtype;
  const SourceLayout layout = layout_of(args.sources, args.source_scales);
  return (gradient == DType::kBFloat16 || gradient == DType::kFloat32) &&
         layout.kind != SourceKind::kNone &&
         rows_can_be_copied<ConstMatrix>(args.sources, args.sources[0].dtype) &&
         rows_can_be_copied<ConstMatrix>(args.dout, DType::kBFloat16) &&
         rows_can_be_copied<Matrix>(args.dsources, gradient) &&
         choose_attend_backward(static_cast<int64_t>(args.sources.size()), args.queries.rows, dim,
                                size_of(gradient), layout)
                 .columns > 0;
}

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args) {
  if (args.dsources.empty() || args.sources.size() > kSourcesMax ||
      args.queries.rows > kQueriesMax) {
    return 0;
  }
  const Plan plan = choose_attend_backward(
      static_cast<int64_t>(args.sources.size()), args.queries.rows, args.sources[0].cols,
      size_of(args.dsources[0].dtype), layout_of(args.sources, args.source_scales));
  if (plan.columns == 0) {
    return 0;
  }
  const int64_t clusters = std::min(ceil_div(args.sources[0].rows, plan.batch),
                                    static_cast<int64_t>(kMultiprocessorsMax / plan.cluster));
  return kCounterBytes +
         clusters * args.queries.rows * args.sources[0].cols * static_cast<int64_t>(sizeof(float));
}

Status attend_backward(const AttendBackwardArgs& args, const Context& context,
                       const Plan* other_plan) {
  const int64_t gradient_bytes = size_of(args.dsources[0].dtype);
  const Plan plan =
      other_plan != nullptr
          ? *other_plan
          : choose_attend_backward(static_cast<int64_t>(args.sources.size()), args.queries.rows,
                                   args.sources[0].cols, gradient_bytes,
                                   layout_of(args.sources, args.source_scales));
  return gradient_bytes == 2 ? run<Bf16>(args, context, plan) : run<float>(args, context, plan);
}

}  // namespace flash_attn_res::cuda::hopper
