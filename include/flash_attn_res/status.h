// What a call returns: nothing went wrong, or what did and with which argument.

#ifndef FLASH_ATTN_RES_STATUS_H_
#define FLASH_ATTN_RES_STATUS_H_

#include <cstdint>
#include <string>
#include <utility>

namespace flash_attn_res {

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // a shape, dtype, stride, count or number that the operation does not take
  kWorkspaceTooSmall = 2,
  kUnsupportedDevice = 3,  // built without CUDA, or a GPU older than sm_80
  kCudaError = 4,          // a launch failed; the message names operation, shapes and CUDA's words
};

/// Outcome of a call. Argument errors are found before anything is written.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }

  /// Names the operation, the argument, its shape and what was expected; empty when ok.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_STATUS_H_
