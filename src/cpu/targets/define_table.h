// Compiles the kernels for FLASH_ATTN_RES_TARGET and lists them: the last lines of a target file.

#ifndef FLASH_ATTN_RES_CPU_TARGETS_DEFINE_TABLE_H_
#define FLASH_ATTN_RES_CPU_TARGETS_DEFINE_TABLE_H_

#include "cpu/kernels/attend.h"
#include "cpu/kernels/attend_backward.h"
#include "cpu/kernels/params.h"
#include "cpu/kernels/quantize.h"
#include "cpu/kernels/read.h"
#include "cpu/kernels/read_backward.h"
#include "cpu/kernels/reduce.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

extern const KernelTable kKernels;
const KernelTable kKernels = {attend, attend_backward, read, read_backward, reduce, quantize};

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_TARGETS_DEFINE_TABLE_H_
