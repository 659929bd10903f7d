// Folding the key weight into the query: u = w * g, element by element, in float32.
//
// <w, g * k> = <w * g, k>, so a site's pseudo-query w and the RMSNorm weight g of its keys act
// only through u. Engines fold once when they load weights; training folds once a step.
//
// Backward: dw = du * g, dg = du * w.

#ifndef FLASH_ATTN_RES_FOLD_H_
#define FLASH_ATTN_RES_FOLD_H_

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// folded [S, R] float = queries [S, R] any dtype * key_weight [S, R] or [1, R] any dtype (absent:
/// ones). On the CPU; these are a few kilobytes, so that fusing them with a kernel gains nothing.
Status fold_queries(const ConstMatrix& queries, const ConstMatrix& key_weight,
                    const Matrix& folded);

/// dqueries [S, R] = dfolded * key_weight; dkey_weight [S, R] or [1, R] (then summed over S) =
/// dfolded * queries. Either result may be absent.
Status fold_queries_backward(const ConstMatrix& queries, const ConstMatrix& key_weight,
                             const ConstMatrix& dfolded, const Matrix& dqueries,
                             const Matrix& dkey_weight);

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_FOLD_H_
