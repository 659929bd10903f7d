// The CPU: products by a BLAS, the small operations in loops.

#include <cblas.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "device.h"

namespace decoder {
namespace {

class CpuDevice : public Device {
 public:
  std::shared_ptr<void> allocate(int64_t bytes) override {
    constexpr size_t kLine = 64;
    const size_t rounded_up = (static_cast<size_t>(bytes) / kLine + 1) * kLine;
    void* const memory = std::aligned_alloc(kLine, rounded_up);
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    return {memory, std::free};
  }

  void upload(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void download(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  far::DType weight_dtype(far::DType) const override { return far::DType::kFloat32; }

  void linear(const far::Matrix& x, const Tensor& weight, const far::Matrix& y) override {
    const auto multiply = [&](const float* from, float* to) {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<int>(x.rows),
                  static_cast<int>(weight.rows), static_cast<int>(x.cols), 1.0F, from,
                  static_cast<int>(x.cols), static_cast<const float*>(weight.data.get()),
                  static_cast<int>(weight.cols), 0.0F, to, static_cast<int>(y.cols));
    };
    if (x.dtype == far::DType::kFloat32) {
      return multiply(static_cast<const float*>(x.data), static_cast<float*>(y.data));
    }
    std::vector<float> wide(static_cast<size_t>(x.rows * x.cols));
    std::vector<float> product(static_cast<size_t>(y.rows * y.cols));
    for (size_t i = 0; i < wide.size(); ++i) {
      wide[i] = get<BFloat16>(x.data, static_cast<int64_t>(i));
    }
    multiply(wide.data(), product.data());
    for (size_t i = 0; i < product.size(); ++i) {
      put<BFloat16>(y.data, static_cast<int64_t>(i), product[i]);
    }
  }

  void run(const Embed& op, int64_t count, far::DType dtype) override { loop(op, count, dtype); }
  void run(const RotateAndFile& op, int64_t count, far::DType dtype) override {
    loop(op, count, dtype);
  }
  void run(const CausalAttention& op, int64_t count, far::DType dtype) override {
    loop(op, count, dtype);
  }
  void run(const SwiGlu& op, int64_t count, far::DType dtype) override { loop(op, count, dtype); }

  far::Device library_device() const override { return {}; }
  void* library_stream() const override { return nullptr; }

 private:
  template <class Op>
  static void loop(const Op& op, int64_t count, far::DType dtype) {
    for (int64_t i = 0; i < count; ++i) {
      dtype == far::DType::kFloat32 ? apply<float>(op, i) : apply<BFloat16>(op, i);
    }
  }
};

}  // namespace

std::unique_ptr<Device> make_cpu_device() { return std::make_unique<CpuDevice>(); }

}  // namespace decoder
