// The kernels for any machine, in the compiler's own vectors and the build's baseline instructions.

#define FLASH_ATTN_RES_TARGET portable
#include "cpu/simd/portable.h"
// The vector header comes first: the kernels are written in its terms.
#include "cpu/targets/define_table.h"
