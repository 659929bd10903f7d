// attend on Hopper: one kernel, N + S units of traffic.

#include "cuda/hopper.h"
#include "cuda/kernels/hopper_attend.cuh"
#include "cuda/launch/hopper_launch.h"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda::hopper {
namespace {

/// A compiled kernel: room for queries, 16-column tiles of a warp, eights of sources.
struct Variant {
  int room, tiles, source_groups;
  const void* kernel;
};

template <class Source, int kRoom, int kTiles, int kSourceGroups>
Variant variant() {
  return {kRoom, kTiles, kSourceGroups,
          reinterpret_cast<const void*>(&attend_kernel<kRoom, kTiles, kSourceGroups, Source>)};
}

int room_for(int64_t num_queries) {
  return num_queries <= kFewQueries ? kFewQueries : 8 * groups_of_eight(num_queries);
}

template <class Source>
const void* find_kernel(int room, int tiles, int source_groups) {
  static const Variant kVariants[] = {
      variant<Source, 4, 8, 1>(),  variant<Source, 4, 9, 1>(),  variant<Source, 4, 16, 1>(),
      variant<Source, 8, 8, 1>(),  variant<Source, 8, 9, 1>(),  variant<Source, 8, 16, 1>(),
      variant<Source, 16, 8, 1>(), variant<Source, 16, 9, 1>(), variant<Bf16, 16, 16, 1>(),
      variant<Source, 24, 8, 1>(), variant<Source, 4, 8, 2>(),  variant<Source, 4, 9, 2>(),
      variant<Source, 4, 16, 2>(), variant<Source, 8, 8, 2>(),  variant<Source, 8, 9, 2>(),
      variant<Source, 8, 16, 2>(), variant<Source, 16, 8, 2>(), variant<Source, 16, 9, 2>(),
      variant<Source, 24, 8, 2>(),
  };
  for (const Variant& v : kVariants) {
    if (v.room == room && v.tiles == tiles && v.source_groups == source_groups) {
      return v.kernel;
    }
  }
  return nullptr;
}

/// Tiles of a warp that there are kernels for and that suit the sources: a slice begins with a
/// group of columns that share a scale.
std::span<const int> tile_choices(int query_groups, int source_groups, SourceLayout layout) {
  static constexpr int kAll[] = {8, 9, 16};
  static constexpr int kNarrow[] = {8, 9};
  static constexpr int kNarrowest[] = {8};
  static constexpr int kGrouped[] = {8, 16};
  const bool grouped = layout.scale_columns == kScaleGroup;
  if (query_groups == 1) {
    return grouped ? std::span<const int>(kGrouped) : std::span<const int>(kAll);
  }
  if (query_groups == 3 || grouped) {
    return kNarrowest;
  }
  return source_groups == 1 && layout.kind == SourceKind::kBFloat16 ? std::span<const int>(kAll)
                                                                    : std::span<const int>(kNarrow);
}

}  // namespace

Plan choose_attend(int64_t num_sources, int64_t num_queries, int64_t dim, SourceLayout layout) {
  if (num_sources > kSourcesMax || num_queries > kQueriesMax || dim % 8 != 0) {
    return {};
  }
  AttendParams sizes = {};
  sizes.num_sources = static_cast<int>(num_sources);
  sizes.num_queries = static_cast<int>(num_queries);
  set_layout(sizes, layout);
  // float8, N, S, D of 16, 4, 2048: two CTAs with eight tiles a warp take 258 us, one with sixteen
  // 281 (H200).
  const bool halved =
      layout.kind == SourceKind::kFloat8 && num_sources > 8 && dim > kColumnsOfEightTiles;
  Plan plan = choose_plan(
      dim, tile_choices(groups_of_eight(num_queries), groups_of_eight(num_sources), layout),
      sizes.extents(), num_sources * layout.bytes() + num_queries * 2,
      /*most_slots=*/3, {.stages = 3, .slots = 1}, halved ? 2 : 1, kStepBytes);
  plan.store_hint = CacheHint::kEvictLast;  // 0.3 % at N, S, D of 4, 8, 2048 and 8, 24, 7168
  return plan;
}

bool serves(const AttendArgs& args, int major, int minor) {
  const int64_t dim = args.sources[0].cols;
  const SourceLayout layout = layout_of(args.sources, args.source_scales);
  return major == 9 && minor == 0 && args.queries.cols == dim && !args.probs.present() &&
         layout.kind != SourceKind::kNone &&
         rows_can_be_copied<ConstMatrix>(args.sources, args.sources[0].dtype) &&
         (rows_can_be_copied<Matrix>(args.out, DType::kBFloat16) ||
          (layout.kind != SourceKind::kBFloat16 &&
           rows_can_be_copied<Matrix>(args.out, DType::kFloat16))) &&
         choose_attend(static_cast<int64_t>(args.sources.size()), args.queries.rows, dim, layout)
                 .columns > 0;
}

int64_t attend_workspace_bytes(const AttendArgs&) { return kCounterBytes; }

Status attend(const AttendArgs& args, const Context& context, const Plan* other_plan) {
  const int64_t N = static_cast<int64_t>(args.sources.size());
  const int64_t S = args.queries.rows;
  const int64_t T = args.sources[0].rows;
  const int64_t D = args.sources[0].cols;
  Call call("attend", shape_text({{"S", S}, {"N", N}, {"T", T}, {"D", D}}), context);
  if (!call.ok()) {
    return call.status();
  }

  AttendParams params = {};
  for (int64_t n = 0; n < N; ++n) {
    params.sources.set(n, args.sources[n]);
  }
  const SourceLayout layout = layout_of(args.sources, args.source_scales);
  set_layout(params, layout, args.source_scales);
  params.half_out = args.out[0].dtype == DType::kFloat16;
  for (int64_t s = 0; s < S; ++s) {
    params.out.set(s, args.out[s]);
  }
  params.queries = static_cast<const float*>(args.queries.data);
  params.lse = static_cast<float*>(args.lse.data);
  params.logits = static_cast<float*>(args.logits.data);
  params.inv_rms = static_cast<float*>(args.inv_rms.data);
  params.issued = static_cast<int*>(context.workspace);
  params.queries_stride = args.queries.stride;
  params.lse_stride = args.lse.stride;
  params.logits_stride = args.logits.stride;
  params.inv_rms_stride = args.inv_rms.stride;
  params.tokens = T;
  params.num_sources = static_cast<int>(N);
  params.num_queries = static_cast<int>(S);
  params.dim = static_cast<int>(D);
  params.scale = static_cast<float>(args.scale);
  params.eps = static_cast<float>(args.eps);
  params.plan = other_plan != nullptr ? *other_plan : choose_attend(N, S, D, layout);
  params.map = shared_map(params.plan, params.extents());

  const auto find = layout.kind == SourceKind::kFloat8    ? find_kernel<Fp8>
                    : layout.kind == SourceKind::kFloat16 ? find_kernel<__half>
                                                          : find_kernel<Bf16>;
  const void* const kernel = find(room_for(S), params.plan.tiles, groups_of_eight(N));
  share_out(call, kernel, params.map.bytes, T, params.plan);
  const int64_t column_bytes = N * layout.bytes() + S * 2;
  const int64_t step_bytes = column_bytes * params.plan.columns * params.plan.batch;
  if (!window_pays(step_bytes, layout.kind == SourceKind::kFloat8, call.limits())) {
    params.plan.window = 0;
  }
  if (params.plan.window > 0) {
    call.zero(params.issued, sizeof(int));
  }
  void* arguments[] = {&params};
  // Zeroing the counter comes between this grid and the one before.
  const bool overlap = params.plan.window == 0;
  launch_clusters(call, kernel, params.plan, params.map.bytes, arguments, overlap);
  return call.status();
}

}  // namespace flash_attn_res::cuda::hopper
