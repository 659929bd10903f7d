// The formulas that attend and read share, for one token, in double precision.

#ifndef FLASH_ATTN_RES_REFERENCE_FORMULAS_H_
#define FLASH_ATTN_RES_REFERENCE_FORMULAS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/element.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::reference {

/// Most terms of one softmax: phase 1, the sources, the partial sum.
inline constexpr int64_t kMaxTerms = kMaxSources + 2;

/// k[r]: the key of a value is its last R coordinates.
inline double key_at(const ScaledView& value, int64_t t, int64_t r, int64_t key_dim) {
  return load(value, t, value.values.cols - key_dim + r);
}

/// rsqrt(mean(k^2) + eps)
inline double inverse_rms(const ScaledView& value, int64_t t, int64_t key_dim, double eps) {
  double sum = 0;
  for (int64_t r = 0; r < key_dim; ++r) {
    const double k = key_at(value, t, r, key_dim);
    sum += k * k;
  }
  return 1 / std::sqrt(sum / static_cast<double>(key_dim) + eps);
}

/// <u, k>
inline double query_dot_key(const ConstMatrix& queries, int64_t s, const ScaledView& value,
                            int64_t t) {
  double sum = 0;
  for (int64_t r = 0; r < queries.cols; ++r) {
    sum += load(queries, s, r) * key_at(value, t, r, queries.cols);
  }
  return sum;
}

/// <a, b> over a row of D elements
inline double row_dot(const ConstMatrix& a, const ScaledView& b, int64_t t) {
  double sum = 0;
  for (int64_t d = 0; d < a.cols; ++d) {
    sum += load(a, t, d) * load(b, t, d);
  }
  return sum;
}

/// logsumexp over `count` logits. A NaN anywhere gives NaN.
inline double log_sum_exp(const double* logits, int64_t count) {
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < count; ++j) {
    largest = std::max(largest, logits[j]);
  }
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    sum += std::exp(logits[j] - largest);
  }
  return largest + std::log(sum);
}

}  // namespace flash_attn_res::reference

#endif  // FLASH_ATTN_RES_REFERENCE_FORMULAS_H_
