#include "cuda/launch/hopper_launch.h"

namespace flash_attn_res::cuda::hopper {
namespace {

/// Fills in a launch of `clusters` clusters and runs `function` with it.
template <class Function>
cudaError_t with_configuration(const void* kernel, const Plan& plan, int shared_bytes,
                               cudaStream_t stream, int clusters, Function&& function) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = plan.cluster > 1 ? 1 : 0;
  return function(configuration);
}

}  // namespace

cudaError_t launch_clusters(const void* kernel, const Plan& plan, int shared_bytes,
                            cudaStream_t stream, void** arguments) {
  return with_configuration(kernel, plan, shared_bytes, stream, plan.clusters,
                            [&](const cudaLaunchConfig_t& configuration) {
                              return cudaLaunchKernelExC(&configuration, kernel, arguments);
                            });
}

cudaError_t share_out(const void* kernel, int shared_bytes, int64_t tokens, Plan& plan) {
  int resident = 0;
  cudaError_t error = cudaSuccess;
  if (plan.cluster == 1) {
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&resident, cudaDevAttrMultiProcessorCount, device);
    }
  } else {
    // GPUs of one model differ in how their multiprocessors are grouped, so this is asked for.
    error = with_configuration(
        kernel, plan, shared_bytes, nullptr, 1, [&](const cudaLaunchConfig_t& configuration) {
          return cudaOccupancyMaxActiveClusters(&resident, kernel, &configuration);
        });
  }
  const int64_t steps = ceil_div(tokens, plan.batch);
  const int64_t most = std::min<int64_t>(resident, kMultiprocessorsMax / plan.cluster);
  const int64_t clusters = std::clamp<int64_t>(most, 1, std::max<int64_t>(steps, 1));
  plan.clusters = static_cast<int>(clusters);
  plan.rounds = static_cast<int>(steps / clusters);
  plan.extra = static_cast<int>(steps % clusters);
  if (plan.rounds < kWindowRounds) {
    plan.window = 0;
  }
  return error;
}

Status launch_status(const char* op, const std::string& shapes, cudaError_t error) {
  if (error == cudaSuccess) {
    return {};
  }
  cudaGetLastError();  // so that the caller's next check does not meet it again
  return {StatusCode::kCudaError, std::string(op) + " (" + shapes +
                                      "): the kernel launch failed: " + cudaGetErrorString(error)};
}

}  // namespace flash_attn_res::cuda::hopper
