// The kernels for x86-64 with AVX-512 F, BW, VL and DQ. Compiled with those instructions enabled.

#define FLASH_ATTN_RES_TARGET avx512
#include "cpu/simd/avx512.h"
// The vector header comes first: the kernels are written in its terms.
#include "cpu/targets/define_table.h"
