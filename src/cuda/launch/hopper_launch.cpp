#include "cuda/launch/hopper_launch.h"

namespace flash_attn_res::cuda::hopper {

void share_out(Call& call, const void* kernel, int shared_bytes, int64_t tokens, Plan& plan) {
  const int64_t steps = ceil_div(tokens, plan.batch);
  const int64_t limit =
      std::max<int64_t>(std::min<int64_t>(steps, kMultiprocessorsMax / plan.cluster), 1);
  const int64_t clusters =
      plan.cluster == 1
          ? std::min<int64_t>(limit, call.limits().multiprocessors)
          : call.resident_clusters(kernel, plan.cluster, kThreads, shared_bytes, limit);
  plan.clusters = static_cast<int>(clusters);
  plan.rounds = static_cast<int>(steps / std::max<int64_t>(clusters, 1));
  plan.extra = static_cast<int>(steps % std::max<int64_t>(clusters, 1));
  plan.prefetch = prefetch_pays(call.limits());
  if (plan.rounds < kWindowRounds) {
    plan.window = 0;
  }
}

void launch_clusters(Call& call, const void* kernel, const Plan& plan, int shared_bytes,
                     void** arguments, bool overlap) {
  call.launch_kernel({.cluster = plan.cluster, .overlap = overlap}, kernel,
                     dim3(static_cast<unsigned>(plan.clusters * plan.cluster)), dim3(kThreads),
                     shared_bytes, arguments);
}

}  // namespace flash_attn_res::cuda::hopper
