// How a call made from PyTorch runs: on PyTorch's threads, PyTorch's current CUDA stream and memory
// of its caching allocator.

#ifndef FLASH_ATTN_RES_BINDINGS_TORCH_CONTEXT_H_
#define FLASH_ATTN_RES_BINDINGS_TORCH_CONTEXT_H_

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>

#include "bindings/torch/convert.h"
#include "flash_attn_res/types.h"

// The symbol lives in libtorch_cuda.so, which a CPU build of PyTorch does not have: a weak
// reference is null there instead of making the whole library unloadable.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace flash_attn_res::torch_binding {

inline Device device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? Device{DeviceType::kCuda, tensor.get_device()} : Device{};
}

/// Context of one call, with its scratch memory.
class CallContext {
 public:
  CallContext(const Tensor& like, int64_t workspace_bytes)
      : CallContext(like, workspace_bytes > 0
                              ? std::optional(empty(like, {workspace_bytes}, ScalarType::Byte))
                              : std::nullopt) {}

  /// With scratch memory of the caller's, or none: nothing is allocated.
  CallContext(const Tensor& like, std::optional<Tensor> workspace)
      : workspace_(std::move(workspace)) {
    context_.device = device_of(like);
    if (workspace_.has_value()) {
      context_.workspace = workspace_->mutable_data_ptr();
      context_.workspace_bytes = workspace_->numel();
    }
    context_.executor = &kTorchThreads;
    if (context_.device.type == DeviceType::kCuda) {
      STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                      "flash_attn_res: a CUDA tensor arrived but this PyTorch has no CUDA");
      STD_TORCH_CHECK(
          aoti_torch_get_current_cuda_stream(context_.device.index, &context_.stream) == 0,
          "flash_attn_res: PyTorch gave no current stream for CUDA device ", context_.device.index);
    }
  }

  const Context& get() const { return context_; }

 private:
  /// PyTorch cuts [0, count) into one range a thread, in advance. Only the number of ranges is
  /// taken from it; tasks are handed out one by one, since cores do not all run at one speed.
  static void run_on_torch_threads(void*, int64_t count, void (*task)(void*, int64_t),
                                   void* task_context) {
    std::atomic<int64_t> next = 0;
    torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) {
        task(task_context, i);
      }
    });
  }

  static constexpr Executor kTorchThreads = {&run_on_torch_threads, nullptr};

  std::optional<Tensor> workspace_;
  Context context_;
};

}  // namespace flash_attn_res::torch_binding

#endif  // FLASH_ATTN_RES_BINDINGS_TORCH_CONTEXT_H_
