// Which instruction set the CPU kernels use: the best that the machine and the build have, unless
// the environment or a test asks for less.

#ifndef FLASH_ATTN_RES_CPU_ISA_H_
#define FLASH_ATTN_RES_CPU_ISA_H_

#include "cpu/kernels/params.h"

namespace flash_attn_res::cpu {

/// In order of preference, best last.
enum class Isa : int { kPortable = 0, kNeon, kAvx2, kAvx512, kAvx512Bf16 };

/// How many instruction sets there are: kPortable..kAvx512Bf16.
inline constexpr int kNumIsas = 5;

/// "portable", "neon", "avx2", "avx512", "avx512_bf16".
const char* name_of(Isa isa);

/// Whether this build has the kernels and this machine can run them.
bool available(Isa isa);

/// What calls use: the best one available, or the one that the environment variable
/// FLASH_ATTN_RES_CPU_ISA names (read once; names that are unknown or not available are ignored).
Isa active_isa();

/// Makes all calls from now on use `isa`, which must be available. For tests; not while calls run.
void use_isa(Isa isa);

/// The kernels of the active instruction set.
const KernelTable& kernels();

}  // namespace flash_attn_res::cpu

#endif  // FLASH_ATTN_RES_CPU_ISA_H_
