// The CUDA backend: what src/common/api.cpp calls for tensors on a CUDA device. Arguments have been
// validated; T may be 0. A build without CUDA links unavailable.cpp instead, which says so.

#ifndef FLASH_ATTN_RES_CUDA_BACKEND_H_
#define FLASH_ATTN_RES_CUDA_BACKEND_H_

#include <cstdint>

#include "flash_attn_res/attend.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res::cuda {

int64_t attend_workspace_bytes(const AttendArgs& args);
Status attend(const AttendArgs& args, const Context& context);

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args);
Status attend_backward(const AttendBackwardArgs& args, const Context& context);

int64_t read_workspace_bytes(const ReadArgs& args);
Status read(const ReadArgs& args, const Context& context);

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args);
Status read_backward(const ReadBackwardArgs& args, const Context& context);

Status stochastic_add(const StochasticAddArgs& args, const Context& context);
Status quantize(const QuantizeArgs& args, const Context& context);

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_BACKEND_H_
