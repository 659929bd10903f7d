// The public entry points: check the arguments, then hand them to the backend that serves them.
// float64 goes to the reference, which is the specification; everything else to the kernels of the
// device.

#include <cstdint>
#include <string>

#include "common/validate.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/stochastic.h"
#include "reference/reference.h"

namespace flash_attn_res {
namespace {

/// How one backend serves an operation.
template <class Args>
struct Kernel {
  int64_t (*workspace_bytes)(const Args&);
  Status (*run)(const Args&, const Context&);
};

/// An operation and who serves it. Operations differ in nothing but this table.
template <class Args>
struct Operation {
  const char* name;
  Kernel<Args> reference;
  Kernel<Args> cpu;
  Kernel<Args> cuda;
};

constexpr Operation<AttendArgs> kAttend = {
    "attend",
    {reference::attend_workspace_bytes, reference::attend},
    {cpu::attend_workspace_bytes, cpu::attend},
    {cuda::attend_workspace_bytes, cuda::attend},
};

constexpr Operation<AttendBackwardArgs> kAttendBackward = {
    "attend_backward",
    {reference::attend_backward_workspace_bytes, reference::attend_backward},
    {cpu::attend_backward_workspace_bytes, cpu::attend_backward},
    {cuda::attend_backward_workspace_bytes, cuda::attend_backward},
};

constexpr Operation<ReadArgs> kRead = {
    "read",
    {reference::read_workspace_bytes, reference::read},
    {cpu::read_workspace_bytes, cpu::read},
    {cuda::read_workspace_bytes, cuda::read},
};

constexpr Operation<ReadBackwardArgs> kReadBackward = {
    "read_backward",
    {reference::read_backward_workspace_bytes, reference::read_backward},
    {cpu::read_backward_workspace_bytes, cpu::read_backward},
    {cuda::read_backward_workspace_bytes, cuda::read_backward},
};

template <class Args>
const Kernel<Args>& choose(const Operation<Args>& operation, const Args& args, Device device) {
  if (device.type == DeviceType::kCuda) {
    return operation.cuda;
  }
  return precision_of(args) == Precision::kWide ? operation.reference : operation.cpu;
}

template <class Args>
int64_t workspace_bytes(const Operation<Args>& operation, const Args& args, Device device) {
  // The call itself reports what is wrong with the arguments; here they just need no scratch.
  return validate(args).ok() ? choose(operation, args, device).workspace_bytes(args) : 0;
}

Status check_device_type(const char* name, Device device) {
  if (device.type != DeviceType::kCpu && device.type != DeviceType::kCuda) {
    return {StatusCode::kUnsupportedDevice, std::string(name) + ": unknown device type " +
                                                std::to_string(static_cast<int>(device.type)) +
                                                ", expected kCpu (0) or kCuda (1)"};
  }
  return {};
}

template <class Args>
Status check_device(const char* name, const Args& args, Device device) {
  if (Status status = check_device_type(name, device); !status.ok()) {
    return status;
  }
  if (device.type == DeviceType::kCuda && precision_of(args) == Precision::kWide) {
    return {StatusCode::kInvalidArgument,
            std::string(name) +
                ": float64 is computed on the CPU alone, expected float32, bfloat16 or float16"};
  }
  return {};
}

template <class Args>
Status run(const Operation<Args>& operation, const Args& args, const Context& context) {
  if (Status status = check_device(operation.name, args, context.device); !status.ok()) {
    return status;
  }
  if (Status status = validate(args); !status.ok()) {
    return status;
  }
  const Kernel<Args>& kernel = choose(operation, args, context.device);
  if (Status status = validate_workspace(operation.name, context, kernel.workspace_bytes(args));
      !status.ok()) {
    return status;
  }
  return kernel.run(args, context);
}

/// An operation without float64 and without workspace.
template <class Args>
Status run_simple(const char* name, const Args& args, const Context& context,
                  Status (*cpu)(const Args&, const Context&),
                  Status (*cuda)(const Args&, const Context&)) {
  if (Status status = check_device_type(name, context.device); !status.ok()) {
    return status;
  }
  if (Status status = validate(args); !status.ok()) {
    return status;
  }
  return context.device.type == DeviceType::kCuda ? cuda(args, context) : cpu(args, context);
}

}  // namespace

int64_t attend_workspace_bytes(const AttendArgs& args, Device device) {
  return workspace_bytes(kAttend, args, device);
}

Status attend(const AttendArgs& args, const Context& context) {
  return run(kAttend, args, context);
}

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args, Device device) {
  return workspace_bytes(kAttendBackward, args, device);
}

Status attend_backward(const AttendBackwardArgs& args, const Context& context) {
  return run(kAttendBackward, args, context);
}

int64_t read_workspace_bytes(const ReadArgs& args, Device device) {
  return workspace_bytes(kRead, args, device);
}

Status read(const ReadArgs& args, const Context& context) { return run(kRead, args, context); }

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args, Device device) {
  return workspace_bytes(kReadBackward, args, device);
}

Status read_backward(const ReadBackwardArgs& args, const Context& context) {
  return run(kReadBackward, args, context);
}

Status stochastic_add(const StochasticAddArgs& args, const Context& context) {
  return run_simple("stochastic_add", args, context, cpu::stochastic_add, cuda::stochastic_add);
}

Status quantize(const QuantizeArgs& args, const Context& context) {
  return run_simple("quantize", args, context, cpu::quantize, cuda::quantize);
}

}  // namespace flash_attn_res
