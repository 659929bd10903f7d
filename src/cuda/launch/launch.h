// What every launcher needs: views for kernels, the device of the call, errors as values.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_LAUNCH_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "cuda/device/params.h"
#include "cuda/policy.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cuda {

/// Makes the device of the call current, and the caller's again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = -1;  // -1: nothing to restore
  cudaError_t error_ = cudaSuccess;
};

/// How a kernel is launched beyond its grid.
struct LaunchOptions {
  int cluster = 1;  // CTAs of a cluster, along x (sm_90)
  // The kernel may begin before the one before it in the stream has ended: it waits by itself
  // (griddepcontrol.wait) before it reads what that one writes. Ignored before sm_90.
  bool overlap = false;
};

/// One call of an operation: its name and shapes, for messages, its stream and device.
class Call {
 public:
  Call(const char* op, std::string shapes, const Context& context);

  /// Whether kernels can run; else status() says why not.
  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  const DeviceLimits& limits() const { return limits_; }

  /// Launches `kernel` unless an earlier step of the call failed.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
              const Parameters&... parameters) {
    launch_with({}, kernel, grid, block, shared_bytes, parameters...);
  }

  template <class... Parameters>
  void launch_with(const LaunchOptions& options, void (*kernel)(Parameters...), dim3 grid,
                   dim3 block, int64_t shared_bytes, const Parameters&... parameters) {
    void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    launch_kernel(options, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                  arguments);
  }

  /// The same for a kernel whose type is not known; `arguments` point at its parameters.
  void launch_kernel(const LaunchOptions& options, const void* kernel, dim3 grid, dim3 block,
                     int64_t shared_bytes, void** arguments);

  /// Zeroes memory, behind the launches before it.
  void zero(void* memory, int64_t bytes);

  /// Copies one matrix to another of the same shape and dtype, behind the launches before it.
  void copy(const ConstMatrix& from, const Matrix& to);

  /// Blocks of a grid that stays on the device: as many as run at once, at most `limit`.
  template <class... Parameters>
  unsigned resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes,
                           int64_t limit) {
    return resident_blocks_erased(reinterpret_cast<const void*>(kernel), threads, shared_bytes,
                                  limit);
  }

  /// Clusters of `cluster` CTAs that run at once, at most `limit`.
  template <class... Parameters>
  unsigned resident_clusters(void (*kernel)(Parameters...), int cluster, int threads,
                             int64_t shared_bytes, int64_t limit) {
    return resident_clusters(reinterpret_cast<const void*>(kernel), cluster, threads, shared_bytes,
                             limit);
  }
  unsigned resident_clusters(const void* kernel, int cluster, int threads, int64_t shared_bytes,
                             int64_t limit);

  /// Whether the code that the device runs for `kernel` was compiled for compute capability
  /// `major`.0 or later. Code that the driver makes of older PTX lacks what newer devices have.
  template <class... Parameters>
  bool compiled_for(int major, void (*kernel)(Parameters...)) {
    return compiled_for_erased(major, reinterpret_cast<const void*>(kernel));
  }

 private:
  void check(cudaError_t error, const char* what);
  bool compiled_for_erased(int major, const void* kernel);
  bool allow_shared(const void* kernel, int64_t shared_bytes);
  unsigned resident_blocks_erased(const void* kernel, int threads, int64_t shared_bytes,
                                  int64_t limit);

  const char* op_;
  std::string shapes_;
  DeviceGuard guard_;
  cudaStream_t stream_;
  int device_;
  DeviceLimits limits_;
  Status status_;
};

/// Grid size along x for `count` blocks' worth of work; kernels loop when there is more.
inline unsigned grid_blocks(int64_t count) {
  constexpr int64_t kMaxGridX = 2147483647;
  return static_cast<unsigned>(count < kMaxGridX ? count : kMaxGridX);
}

/// Widest row: columns are counted in 32 bits inside a row, blocks along them in 16.
inline constexpr int64_t kMaxDim = int64_t{1} << 22;
Status check_dim(const char* op, int64_t dim);

/// "name=value" pairs for messages.
std::string shape_text(std::initializer_list<std::pair<const char*, int64_t>> shape);

ValueView value_view(const ConstMatrix& matrix);
FloatView float_view(const ConstMatrix& matrix);

/// The dtype that all present views share, if their chunks are all whole and aligned; else kNone,
/// which stands for AnyType.
class UniformType {
 public:
  explicit UniformType(int64_t dim) : uniform_(dim % kChunk == 0) {}

  void add(const ValueView& view) {
    if (view.present()) {
      vectorized_ = vectorized_ && view.vectorized;
      uniform_ = uniform_ && view.vectorized && (dtype_ == DType::kNone || dtype_ == view.dtype);
      dtype_ = view.dtype;
    }
  }
  /// Values with a scale: of the types that this chooses among, AnyType alone knows them.
  void add_scaled() { uniform_ = vectorized_ = false; }
  DType get() const { return uniform_ ? dtype_ : DType::kNone; }
  bool vectorized() const { return vectorized_; }

 private:
  DType dtype_ = DType::kNone;
  bool uniform_;
  bool vectorized_ = true;
};

/// Hands out pieces of the workspace, 64-byte aligned. Without a base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  float* floats(int64_t count) {
    float* const piece = base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

/// result [rows, cols] = [result +] sum of partial sums, `stride` floats apart.
struct Reduction {
  const float* partials;
  int64_t stride;
  Matrix result;  // absent: nothing to do
  bool accumulate;
};

/// Runs up to two reductions of `count` partial sums each in one launch, which begins while the
/// kernel that made them ends.
void launch_reduce(Call& call, int64_t count, const Reduction& first, const Reduction& second = {});

/// x and x_scale from float32 rows [T, D] that lie one after the other.
void launch_quantize(Call& call, const Matrix& rows, const Matrix& x, const Matrix& x_scale,
                     ScaleRounding rounding);

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_LAUNCH_H_
