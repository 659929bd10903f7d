#include "flash_attn_res/fold.h"

#include <cstdint>

#include "common/element.h"
#include "common/validate.h"

namespace flash_attn_res {
namespace {

/// The row of the key weight that goes with query s: its own, or the only one.
int64_t weight_row(const ConstMatrix& key_weight, int64_t s) {
  return key_weight.rows == 1 ? 0 : s;
}

/// g_s[r], or 1 where there is no key weight.
float weight_at(const ConstMatrix& key_weight, int64_t s, int64_t r) {
  return key_weight.present() ? static_cast<float>(load(key_weight, weight_row(key_weight, s), r))
                              : 1.0F;
}

}  // namespace

Status fold_queries(const ConstMatrix& queries, const ConstMatrix& key_weight,
                    const Matrix& folded) {
  if (Status status = validate_fold(queries, key_weight, folded); !status.ok()) {
    return status;
  }
  for (int64_t s = 0; s < queries.rows; ++s) {
    for (int64_t r = 0; r < queries.cols; ++r) {
      store(folded, s, r, static_cast<float>(load(queries, s, r)) * weight_at(key_weight, s, r));
    }
  }
  return {};
}

Status fold_queries_backward(const ConstMatrix& queries, const ConstMatrix& key_weight,
                             const ConstMatrix& dfolded, const Matrix& dqueries,
                             const Matrix& dkey_weight) {
  if (Status status = validate_fold_backward(queries, key_weight, dfolded, dqueries, dkey_weight);
      !status.ok()) {
    return status;
  }
  if (dqueries.present()) {
    for (int64_t s = 0; s < queries.rows; ++s) {
      for (int64_t r = 0; r < queries.cols; ++r) {
        store(dqueries, s, r,
              static_cast<float>(load(dfolded, s, r)) * weight_at(key_weight, s, r));
      }
    }
  }
  if (dkey_weight.present()) {
    for (int64_t row = 0; row < key_weight.rows; ++row) {
      for (int64_t r = 0; r < queries.cols; ++r) {
        double sum = 0;  // over the queries that share this row
        for (int64_t s = 0; s < queries.rows; ++s) {
          if (weight_row(key_weight, s) == row) {
            sum += load(dfolded, s, r) * load(queries, s, r);
          }
        }
        store(dkey_weight, row, r, sum);
      }
    }
  }
  return {};
}

}  // namespace flash_attn_res
