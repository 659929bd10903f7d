// A CUDA GPU: products by cuBLAS, the small operations one index a thread.

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <string>

#include "device.h"
#include "weights_file.h"

namespace decoder {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw Error(std::string(what) + " failed: " + cudaGetErrorString(error));
  }
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw Error(std::string(what) + " failed: " + cublasGetStatusString(status));
  }
}

template <class E, class Op>
__global__ void for_each_index(Op op, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) {
    apply<E>(op, i);
  }
}

class CudaDevice : public Device {
 public:
  CudaDevice() {
    check(cudaGetDevice(&index_), "finding a GPU");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
    check(cublasCreate(&blas_), "starting cuBLAS");
    check(cublasSetStream(blas_, stream_), "setting the stream of cuBLAS");
  }
  ~CudaDevice() override {
    cublasDestroy(blas_);
    cudaStreamDestroy(stream_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  std::shared_ptr<void> allocate(int64_t bytes) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, static_cast<size_t>(bytes) + 1), "allocating memory");
    return {memory, [](void* p) { cudaFree(p); }};
  }

  void upload(void* to, const void* from, int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void download(void* to, const void* from, int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }

  far::DType weight_dtype(far::DType activations) const override { return activations; }

  void linear(const far::Matrix& x, const Tensor& weight, const far::Matrix& y) override {
    // Row-major y = x w^T is column-major y^T = w x^T.
    const cudaDataType type = x.dtype == far::DType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF;
    const float one = 1;
    const float zero = 0;
    check(cublasGemmEx(blas_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(weight.rows),
                       static_cast<int>(x.rows), static_cast<int>(x.cols), &one, weight.data.get(),
                       type, static_cast<int>(weight.cols), x.data, type, static_cast<int>(x.cols),
                       &zero, y.data, type, static_cast<int>(y.cols), CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT),
          "a matrix product");
  }

  void run(const Embed& op, int64_t count, far::DType dtype) override { launch(op, count, dtype); }
  void run(const RotateAndFile& op, int64_t count, far::DType dtype) override {
    launch(op, count, dtype);
  }
  void run(const CausalAttention& op, int64_t count, far::DType dtype) override {
    launch(op, count, dtype);
  }
  void run(const SwiGlu& op, int64_t count, far::DType dtype) override { launch(op, count, dtype); }

  far::Device library_device() const override { return {far::DeviceType::kCuda, index_}; }
  void* library_stream() const override { return stream_; }

 private:
  void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream_), "a copy");
    check(cudaStreamSynchronize(stream_), "waiting for the GPU");
  }

  template <class Op>
  void launch(const Op& op, int64_t count, far::DType dtype) {
    constexpr int kThreads = 128;
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    if (blocks == 0) {
      return;
    }
    if (dtype == far::DType::kFloat32) {
      for_each_index<float><<<blocks, kThreads, 0, stream_>>>(op, count);
    } else {
      for_each_index<BFloat16><<<blocks, kThreads, 0, stream_>>>(op, count);
    }
    check(cudaGetLastError(), "a kernel launch");
  }

  int index_ = 0;
  cudaStream_t stream_ = nullptr;
  cublasHandle_t blas_ = nullptr;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device() { return std::make_unique<CudaDevice>(); }

}  // namespace decoder
