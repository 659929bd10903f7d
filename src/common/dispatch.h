// The one dispatch idiom: a run-time dtype becomes a compile-time storage type.
//
//   dispatch_dtype(view.dtype, [&]<class T>() { launch<T>(...); });
//
// Validation has run before, so that dtypes outside the list do not arrive here; the call returns
// false for them and does nothing.

#ifndef FLASH_ATTN_RES_COMMON_DISPATCH_H_
#define FLASH_ATTN_RES_COMMON_DISPATCH_H_

#include "common/float_types.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

template <class Function>
bool dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      function.template operator()<float>();
      return true;
    case DType::kBFloat16:
      function.template operator()<BFloat16>();
      return true;
    case DType::kFloat16:
      function.template operator()<Float16>();
      return true;
    case DType::kFloat64:     // the reference's dtype: no kernel is compiled for it
    case DType::kFloat8E4M3:  // quantised rows have their own conversions
    case DType::kFloat8E8M0:
    case DType::kNone:
      break;
  }
  return false;
}

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_COMMON_DISPATCH_H_
