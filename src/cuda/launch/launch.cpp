#include "cuda/launch/launch.h"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <string>
#include <tuple>
#include <utility>

namespace flash_attn_res::cuda {

namespace {

/// What the CUDA runtime answers to a question about the current device, asked once by each thread:
/// an answer costs microseconds of the host, and a training step asks hundreds of times.
template <class Key, class Value>
class Remembered {
 public:
  /// The value of `key`, or what `ask(value)` says if this thread meets the key for the first time.
  template <class Ask>
  cudaError_t get(const Key& key, Value& value, Ask&& ask) {
    if (const auto known = values_.find(key); known != values_.end()) {
      value = known->second;
      return cudaSuccess;
    }
    const cudaError_t error = ask(value);
    if (error == cudaSuccess) {
      values_.emplace(key, value);
    }
    return error;
  }

 private:
  std::map<Key, Value> values_;
};

using OnDevice = std::pair<const void*, int>;  // kernel, device
/// What decides how many blocks of a kernel run at once.
using Occupancy = std::tuple<const void*, int, int, int, int64_t>;  // kernel, device, cluster,
                                                                    // threads, shared bytes

cudaError_t device_limits(int device, DeviceLimits& limits) {
  thread_local Remembered<int, DeviceLimits> remembered;
  return remembered.get(device, limits, [device](DeviceLimits& asked) {
    cudaError_t error = cudaSuccess;
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&value, which, device);
      }
      return value;
    };
    asked.major = attribute(cudaDevAttrComputeCapabilityMajor);
    asked.minor = attribute(cudaDevAttrComputeCapabilityMinor);
    asked.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    asked.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    asked.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    asked.memory_bytes_per_us = int64_t{2} * attribute(cudaDevAttrMemoryClockRate) *
                                attribute(cudaDevAttrGlobalMemoryBusWidth) / 8 / 1000;
    return error;
  });
}

cudaError_t function_attributes(const void* kernel, int device, cudaFuncAttributes& attributes) {
  thread_local Remembered<OnDevice, cudaFuncAttributes> remembered;
  return remembered.get({kernel, device}, attributes, [kernel](cudaFuncAttributes& asked) {
    return cudaFuncGetAttributes(&asked, kernel);
  });
}

/// Lets a kernel have all the shared memory that a block may ask for. One number for all launches:
/// another thread may be between setting its own and launching.
cudaError_t allow_all_shared(const void* kernel, int device, const DeviceLimits& limits) {
  thread_local Remembered<OnDevice, int> remembered;
  int bytes = 0;
  return remembered.get({kernel, device}, bytes, [&](int& allowed) {
    cudaFuncAttributes attributes = {};
    if (const cudaError_t error = function_attributes(kernel, device, attributes);
        error != cudaSuccess) {
      return error;
    }
    allowed =
        static_cast<int>(limits.shared_per_block) - static_cast<int>(attributes.sharedSizeBytes);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
  });
}

}  // namespace

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
  device_ = context.device.index;
  check(guard_.error(), "selecting the device");
  check(device_limits(device_, limits_), "reading the device's attributes");
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
    check(allow_all_shared(kernel, device_, limits_), "reserving shared memory");
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

void Call::launch_kernel(const LaunchOptions& options, const void* kernel, dim3 grid, dim3 block,
                         int64_t shared_bytes, void** arguments) {
  if (!ok() || grid.x == 0 || !allow_shared(kernel, shared_bytes)) {
    return;
  }
  const Configuration configuration(options, limits_.major >= 9, grid, block, shared_bytes,
                                    stream_);
  check(cudaLaunchKernelExC(&configuration.config, kernel, arguments), "the kernel launch");
}

unsigned Call::resident_clusters(const void* kernel, int cluster, int threads, int64_t shared_bytes,
                                 int64_t limit) {
  if (cluster == 1) {
    return resident_blocks_erased(kernel, threads, shared_bytes, limit);
  }
  if (!allow_shared(kernel, shared_bytes)) {
    return 0;
  }
  // GPUs of one model differ in how their multiprocessors are grouped, so this is asked for.
  thread_local Remembered<Occupancy, int> remembered;
  int resident = 0;
  const auto ask = [&](int& clusters) {
    const Configuration configuration({.cluster = cluster}, false,
                                      dim3(static_cast<unsigned>(cluster)),
                                      dim3(static_cast<unsigned>(threads)), shared_bytes, stream_);
    return cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config);
  };
  check(remembered.get({kernel, device_, cluster, threads, shared_bytes}, resident, ask),
        "asking for the occupancy");
  return static_cast<unsigned>(std::clamp<int64_t>(resident, 1, std::max<int64_t>(limit, 1)));
}

void Call::zero(void* memory, int64_t bytes) {
  if (ok()) {
    check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_), "zeroing memory");
  }
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
  check(function_attributes(kernel, device_, attributes), "reading a kernel's attributes");
  return ok() && attributes.ptxVersion >= 10 * major;
}

unsigned Call::resident_blocks_erased(const void* kernel, int threads, int64_t shared_bytes,
                                      int64_t limit) {
  if (limit <= limits_.multiprocessors || !allow_shared(kernel, shared_bytes)) {
    return static_cast<unsigned>(std::max<int64_t>(limit, 0));
  }
  thread_local Remembered<Occupancy, int> remembered;
  int per_multiprocessor = 1;
  const auto ask = [&](int& blocks) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                         static_cast<size_t>(shared_bytes));
  };
  check(remembered.get({kernel, device_, 1, threads, shared_bytes}, per_multiprocessor, ask),
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
