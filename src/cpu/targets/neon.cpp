// The kernels for AArch64, whose baseline has everything that they use.

#define FLASH_ATTN_RES_TARGET neon
#include "cpu/simd/neon.h"
// The vector header comes first: the kernels are written in its terms.
#include "cpu/targets/define_table.h"
