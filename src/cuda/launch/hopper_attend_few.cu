// attend on Hopper with few queries over few float8 sources: one kernel, N bytes and S units of
// traffic an element.

#include <iterator>
#include <utility>

#include "cuda/hopper.h"
#include "cuda/kernels/hopper_attend_few.cuh"
#include "cuda/launch/hopper_launch.h"
#include "cuda/launch/launch.h"

namespace flash_attn_res::cuda::hopper {
namespace {

using FewKernel = void (*)(AttendFewParams);

/// Calls `use<kQueries, kChunks>()` for the form with these.
template <class Use>
void with_form(int queries, int chunks, Use&& use) {
  const auto look_at = [&]<int kQueries, int kChunks>() {
    if (kQueries == queries && kChunks == chunks) {
      use.template operator()<kQueries, kChunks>();
    }
  };
  const auto look = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kAttendFew[kIndex].queries, kAttendFew[kIndex].chunks>(), ...);
  };
  look(std::make_index_sequence<std::size(kAttendFew)>());
}

AttendFewPolicy choose(int64_t num_sources, int64_t num_queries, int64_t dim, int64_t tokens,
                       const DeviceLimits& limits) {
  return choose_attend_few(num_queries, dim, tokens, limits,
                           [=](const AttendFewForm& form, int64_t teams, int64_t warps) {
                             int64_t bytes = 0;
                             with_form(form.queries, form.chunks, [&]<int kQueries, int kChunks>() {
                               bytes = attend_few_shared_bytes<kQueries, kChunks>(
                                   teams, warps, static_cast<int>(num_sources));
                             });
                             return bytes;
                           });
}

}  // namespace

bool run_attend_few(Call& call, const AttendArgs& args) {
  const int64_t N = static_cast<int64_t>(args.sources.size());
  const int64_t S = args.queries.rows;
  const int64_t T = args.sources[0].rows;
  const int64_t D = args.sources[0].cols;
  if (N > kFewSources || S > kFewQueries || T != grid_blocks(T) ||
      args.sources[0].dtype != DType::kFloat8E4M3) {
    return false;
  }
  const AttendFewPolicy policy = choose(N, S, D, T, call.limits());
  if (policy.queries == 0) {
    return false;
  }
  AttendFewParams params = {};
  for (int64_t n = 0; n < N; ++n) {
    params.sources.set(n, args.sources[n]);
    params.scales.set(n, args.source_scales[n]);
  }
  params.scales.set_columns(layout_of(args.sources, args.source_scales).scale_columns);
  for (int64_t s = 0; s < S; ++s) {
    params.out.set(s, args.out[s]);
  }
  params.queries = static_cast<const float*>(args.queries.data);
  params.lse = static_cast<float*>(args.lse.data);
  params.logits = static_cast<float*>(args.logits.data);
  params.inv_rms = static_cast<float*>(args.inv_rms.data);
  params.queries_stride = args.queries.stride;
  params.lse_stride = args.lse.stride;
  params.logits_stride = args.logits.stride;
  params.inv_rms_stride = args.inv_rms.stride;
  params.tokens = static_cast<unsigned>(T);
  params.num_sources = static_cast<int>(N);
  params.num_queries = static_cast<int>(S);
  params.dim = static_cast<int>(D);
  params.scale = static_cast<float>(args.scale);
  params.eps = static_cast<float>(args.eps);
  params.inv_dim = 1.0f / static_cast<float>(D);
  params.half_out = args.out[0].dtype == DType::kFloat16;

  FewKernel kernel = nullptr;
  with_form(policy.queries, policy.chunks,
            [&]<int kQueries, int kChunks>() { kernel = attend_few_kernel<kQueries, kChunks>; });
  const int threads = policy.teams * policy.warps * 32;
  params.warps_of_team = static_cast<unsigned>(policy.warps);
  const unsigned blocks =
      call.resident_blocks(kernel, threads, policy.shared_bytes, ceil_div(T, policy.teams));
  call.launch_with({.overlap = true}, kernel, dim3(blocks), dim3(static_cast<unsigned>(threads)),
                   policy.shared_bytes, params);
  return true;
}

}  // namespace flash_attn_res::cuda::hopper
