// The kernels for x86-64 with AVX-512 F, BW, VL, DQ and BF16. Compiled with those enabled.

#define FLASH_ATTN_RES_TARGET avx512_bf16
#define FLASH_ATTN_RES_SIMD_AVX512_BF16
#include "cpu/simd/avx512.h"
// The vector header comes first: the kernels are written in its terms.
#include "cpu/targets/define_table.h"
