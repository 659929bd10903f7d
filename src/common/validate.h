// The one place that checks arguments. Every public call passes through here before anything is
// written, on every device; backends rely on what is checked and check nothing again.

#ifndef FLASH_ATTN_RES_COMMON_VALIDATE_H_
#define FLASH_ATTN_RES_COMMON_VALIDATE_H_

#include "flash_attn_res/attend.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/status.h"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res {

/// Element types of a call: float64 throughout (`wide`), or the storage dtypes with float32
/// statistics.
enum class Precision { kStorage, kWide };

Status validate(const AttendArgs& args);
Status validate(const AttendBackwardArgs& args);
Status validate(const ReadArgs& args);
Status validate(const ReadBackwardArgs& args);
Status validate(const StochasticAddArgs& args);
Status validate(const QuantizeArgs& args);
Status validate_fold(const ConstMatrix& queries, const ConstMatrix& key_weight,
                     const ConstMatrix& folded);
Status validate_fold_backward(const ConstMatrix& queries, const ConstMatrix& key_weight,
                              const ConstMatrix& dfolded, const ConstMatrix& dqueries,
                              const ConstMatrix& dkey_weight);

/// Checks scratch memory against what the call needs.
Status validate_workspace(const char* op, const Context& context, int64_t bytes_needed);

/// The precision of a call whose arguments have passed `validate`.
Precision precision_of(const AttendArgs& args);
Precision precision_of(const AttendBackwardArgs& args);
Precision precision_of(const ReadArgs& args);
Precision precision_of(const ReadBackwardArgs& args);

/// The dtype that MixRounding::kStorage rounds to: that of x, or of the first value where x is
/// quantised; kFloat32 where both are.
DType mix_dtype(const ReadArgs& args);

/// "float32", "bfloat16", ... for messages.
const char* name_of(DType dtype);

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_COMMON_VALIDATE_H_
