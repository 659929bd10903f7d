// flash_attn_res: Attention Residuals (arXiv 2603.15031), forward and backward. Umbrella header.

#ifndef FLASH_ATTN_RES_FLASH_ATTN_RES_H_
#define FLASH_ATTN_RES_FLASH_ATTN_RES_H_

#include "flash_attn_res/attend.h"      // IWYU pragma: export
#include "flash_attn_res/fold.h"        // IWYU pragma: export
#include "flash_attn_res/quantize.h"    // IWYU pragma: export
#include "flash_attn_res/read.h"        // IWYU pragma: export
#include "flash_attn_res/status.h"      // IWYU pragma: export
#include "flash_attn_res/stochastic.h"  // IWYU pragma: export
#include "flash_attn_res/types.h"       // IWYU pragma: export
#include "flash_attn_res/version.h"     // IWYU pragma: export

#endif  // FLASH_ATTN_RES_FLASH_ATTN_RES_H_
