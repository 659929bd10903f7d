// The kernels for x86-64 with AVX2, FMA and F16C. Compiled with those instructions enabled.

#define FLASH_ATTN_RES_TARGET avx2
#include "cpu/simd/avx2.h"
// The vector header comes first: the kernels are written in its terms.
#include "cpu/targets/define_table.h"
