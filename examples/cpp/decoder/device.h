// Where a model runs: memory, matrix products and the small operations of operations.h.

#ifndef DECODER_DEVICE_H_
#define DECODER_DEVICE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "flash_attn_res/types.h"
#include "operations.h"

namespace decoder {

namespace far = flash_attn_res;

/// A matrix [rows, cols] on a device.
struct Tensor {
  std::shared_ptr<void> data;
  int64_t rows = 0;
  int64_t cols = 0;
  far::DType dtype = far::DType::kNone;

  far::Matrix view() const { return {data.get(), rows, cols, cols, dtype}; }

  /// The first `count` rows.
  far::Matrix first(int64_t count) const { return {data.get(), count, cols, cols, dtype}; }

  /// `count` rows from row `begin` on.
  far::Matrix slice(int64_t begin, int64_t count) const {
    char* const start = static_cast<char*>(data.get()) + begin * cols * far::size_of(dtype);
    return {start, count, cols, cols, dtype};
  }
};

class Device {
 public:
  virtual ~Device() = default;

  /// 64-byte aligned.
  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;
  virtual void upload(void* to, const void* from, int64_t bytes) = 0;
  virtual void download(void* to, const void* from, int64_t bytes) = 0;

  /// The dtype in which `linear` wants the weights of activations of this dtype.
  virtual far::DType weight_dtype(far::DType activations) const = 0;

  /// y [T, out] = x [T, in] * weight [out, in]^T, accumulated in float32.
  virtual void linear(const far::Matrix& x, const Tensor& weight, const far::Matrix& y) = 0;

  /// Runs an operation for `count` indices on tensors of this dtype.
  virtual void run(const Embed& op, int64_t count, far::DType dtype) = 0;
  virtual void run(const RotateAndFile& op, int64_t count, far::DType dtype) = 0;
  virtual void run(const CausalAttention& op, int64_t count, far::DType dtype) = 0;
  virtual void run(const SwiGlu& op, int64_t count, far::DType dtype) = 0;

  /// For calls of the library.
  virtual far::Device library_device() const = 0;
  virtual void* library_stream() const = 0;

  Tensor tensor(int64_t rows, int64_t cols, far::DType dtype) {
    return {allocate(rows * cols * far::size_of(dtype)), rows, cols, dtype};
  }

  /// A tensor with these values, rounded to `rounding` and stored as `dtype`.
  Tensor tensor(const std::vector<float>& values, int64_t rows, int64_t cols, far::DType dtype,
                far::DType rounding) {
    Tensor result = tensor(rows, cols, dtype);
    std::vector<float> floats = values;
    std::vector<BFloat16> halves(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      halves[i] = from_float<BFloat16>(values[i]);
      floats[i] = rounding == far::DType::kBFloat16 ? to_float(halves[i]) : values[i];
    }
    const bool half = dtype == far::DType::kBFloat16;
    upload(result.data.get(), half ? static_cast<const void*>(halves.data()) : floats.data(),
           rows * cols * far::size_of(dtype));
    return result;
  }
};

std::unique_ptr<Device> make_cpu_device();

/// Null in a build without CUDA.
std::unique_ptr<Device> make_cuda_device();

}  // namespace decoder

#endif  // DECODER_DEVICE_H_
