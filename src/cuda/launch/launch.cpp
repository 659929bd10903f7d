#include "cuda/launch/launch.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

namespace flash_attn_res::cuda {

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  error_ = cudaGetDevice(&current);
  if (error_ == cudaSuccess && current != device) {
    error_ = cudaSetDevice(device);
    previous_ = error_ == cudaSuccess ? current : -1;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) {
    cudaSetDevice(previous_);
  }
}

Call::Call(const char* op, std::string shapes, const Context& context)
    : op_(op),
      shapes_(std::move(shapes)),
      guard_(context.device.index),
      stream_(static_cast<cudaStream_t>(context.stream)) {
  const int device = context.device.index;
  check(guard_.error(), "selecting the device");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "reading a device attribute");
    return value;
  };
  limits_.major = attribute(cudaDevAttrComputeCapabilityMajor);
  limits_.minor = attribute(cudaDevAttrComputeCapabilityMinor);
  limits_.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits_.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits_.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (ok() && limits_.major < 8) {
    status_ = Status(StatusCode::kUnsupportedDevice,
                     std::string(op_) + ": the GPU has compute capability " +
                         std::to_string(limits_.major) + "." + std::to_string(limits_.minor) +
                         ", expected 8.0 or later");
  }
}

void Call::check(cudaError_t error, const char* what) {
  if (error != cudaSuccess && ok()) {
    cudaGetLastError();  // so that the caller's next check does not meet it again
    status_ = Status(StatusCode::kCudaError, std::string(op_) + " (" + shapes_ + "): " + what +
                                                 " failed: " + cudaGetErrorString(error));
  }
}

bool Call::allow_shared(const void* kernel, int64_t shared_bytes) {
  constexpr int64_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "reserving shared memory");
  }
  return ok();
}

namespace {

/// The configuration of a launch; its attributes live as long as it does.
struct Configuration {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  Configuration(const LaunchOptions& options, bool can_overlap, dim3 grid, dim3 block,
                int64_t shared_bytes, cudaStream_t stream) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (options.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(options.cluster);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (options.overlap && can_overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

}  // namespace

void Call::launch_erased(const LaunchOptions& options, const void* kernel, dim3 grid, dim3 block,
                         int64_t shared_bytes, void** arguments) {
  if (!allow_shared(kernel, shared_bytes)) {
    return;
  }
  const Configuration configuration(options, limits_.major >= 9, grid, block, shared_bytes,
                                    stream_);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), "the kernel launch");
}

unsigned Call::resident_clusters_erased(const void* kernel, int cluster, int threads,
                                        int64_t shared_bytes, int64_t limit) {
  if (cluster == 1) {
    return resident_blocks_erased(kernel, threads, shared_bytes, limit);
  }
  if (!allow_shared(kernel, shared_bytes)) {
    return 0;
  }
  // GPUs of one model differ in how their multiprocessors are grouped, so this is asked for.
  const Configuration configuration({.cluster = cluster}, false,
                                    dim3(static_cast<unsigned>(cluster)),
                                    dim3(static_cast<unsigned>(threads)), shared_bytes, stream_);
  int resident = 0;
  check(cudaOccupancyMaxActiveClusters(&resident, kernel, &configuration.config),
        "asking for the occupancy");
  return static_cast<unsigned>(std::clamp<int64_t>(resident, 1, std::max<int64_t>(limit, 1)));
}

void Call::copy(const ConstMatrix& from, const Matrix& to) {
  const auto bytes = [&](int64_t elements) {
    return static_cast<size_t>(elements * size_of(to.dtype));
  };
  if (ok()) {
    // The stride of a single row means nothing and may be smaller than the row.
    check(cudaMemcpy2DAsync(to.data, bytes(std::max(to.stride, to.cols)), from.data,
                            bytes(std::max(from.stride, from.cols)), bytes(to.cols),
                            static_cast<size_t>(to.rows), cudaMemcpyDeviceToDevice, stream_),
          "the copy of the snapshot");
  }
}

bool Call::compiled_for_erased(int major, const void* kernel) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), "reading a kernel's attributes");
  return ok() && attributes.ptxVersion >= 10 * major;
}

unsigned Call::resident_blocks_erased(const void* kernel, int threads, int64_t shared_bytes,
                                      int64_t limit) {
  if (limit <= limits_.multiprocessors || !allow_shared(kernel, shared_bytes)) {
    return static_cast<unsigned>(std::max<int64_t>(limit, 0));
  }
  int per_multiprocessor = 1;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads,
                                                      static_cast<size_t>(shared_bytes)),
        "asking for the occupancy");
  const int64_t resident =
      static_cast<int64_t>(std::max(per_multiprocessor, 1)) * limits_.multiprocessors;
  return static_cast<unsigned>(std::min(limit, resident));
}

Status check_dim(const char* op, int64_t dim) {
  if (dim <= kMaxDim) {
    return {};
  }
  return {StatusCode::kInvalidArgument, std::string(op) + ": D is " + std::to_string(dim) +
                                            ", expected at most " + std::to_string(kMaxDim) +
                                            " on CUDA"};
}

std::string shape_text(std::initializer_list<std::pair<const char*, int64_t>> shape) {
  std::string text;
  for (const auto& [name, value] : shape) {
    text += (text.empty() ? "" : ", ") + std::string(name) + "=" + std::to_string(value);
  }
  return text;
}

ValueView value_view(const ConstMatrix& matrix) {
  if (!matrix.present()) {
    return {};
  }
  constexpr uintptr_t kAlignment = 16;
  const int64_t stride_bytes = matrix.stride * size_of(matrix.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % kAlignment == 0 &&
                       (matrix.rows <= 1 || stride_bytes % static_cast<int64_t>(kAlignment) == 0);
  // Kernels write through the views of results alone.
  return {const_cast<char*>(static_cast<const char*>(matrix.data)), stride_bytes, matrix.dtype,
          aligned};
}

FloatView float_view(const ConstMatrix& matrix) {
  return {const_cast<float*>(static_cast<const float*>(matrix.data)), matrix.stride};
}

}  // namespace flash_attn_res::cuda
