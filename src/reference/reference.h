// The specification: double-precision scalar code, as close to the formulas of attend.h and read.h
// as code can be. It serves float64 arguments and is the oracle of every test. It takes every
// storage dtype as well (values are widened exactly, results rounded once).
//
// Scratch is one double per (query, source, token) in the backward passes, taken from the caller's
// workspace like everywhere else. No threads: sums run in the order of the formulas.

#ifndef FLASH_ATTN_RES_REFERENCE_REFERENCE_H_
#define FLASH_ATTN_RES_REFERENCE_REFERENCE_H_

#include <cstdint>

#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::reference {

int64_t attend_workspace_bytes(const AttendArgs& args);
Status attend(const AttendArgs& args, const Context& context);

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args);
Status attend_backward(const AttendBackwardArgs& args, const Context& context);

int64_t read_workspace_bytes(const ReadArgs& args);
Status read(const ReadArgs& args, const Context& context);

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args);
Status read_backward(const ReadBackwardArgs& args, const Context& context);

}  // namespace flash_attn_res::reference

#endif  // FLASH_ATTN_RES_REFERENCE_REFERENCE_H_
