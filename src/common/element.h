// One element of a view as a double, whatever its dtype: for the reference and for small host work.

#ifndef FLASH_ATTN_RES_COMMON_ELEMENT_H_
#define FLASH_ATTN_RES_COMMON_ELEMENT_H_

#include <cstdint>
#include <span>

#include "common/float_types.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// view[row, col], exactly.
inline double load(const ConstMatrix& view, int64_t row, int64_t col) {
  const int64_t i = row * view.stride + col;
  switch (view.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(view.data)[i];
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[i];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(view.data)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(view.data)[i]);
    case DType::kFloat8E4M3:
      return to_float(static_cast<const Float8E4M3*>(view.data)[i]);
    case DType::kFloat8E8M0:
      return to_float(static_cast<const Float8E8M0*>(view.data)[i]);
    case DType::kNone:
      break;
  }
  return 0;
}

/// view[row, col] = value, rounded to the view's dtype (through float32 for the 16-bit ones, as
/// every kernel does).
inline void store(const Matrix& view, int64_t row, int64_t col, double value) {
  const int64_t i = row * view.stride + col;
  switch (view.dtype) {
    case DType::kFloat64:
      static_cast<double*>(view.data)[i] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(view.data)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(view.data)[i] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      static_cast<Float16*>(view.data)[i] = to_float16(static_cast<float>(value));
      break;
    case DType::kFloat8E4M3:
      static_cast<Float8E4M3*>(view.data)[i] = to_float8_e4m3(static_cast<float>(value));
      break;
    case DType::kFloat8E8M0:
      static_cast<Float8E8M0*>(view.data)[i] = to_float8_e8m0(static_cast<float>(value));
      break;
    case DType::kNone:
      break;
  }
}

/// value rounded to a dtype and back.
inline double round_to(DType dtype, double value) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<float>(value);
    case DType::kBFloat16:
      return to_float(to_bfloat16(static_cast<float>(value)));
    case DType::kFloat16:
      return to_float(to_float16(static_cast<float>(value)));
    case DType::kFloat8E4M3:
      return to_float(to_float8_e4m3(static_cast<float>(value)));
    case DType::kFloat8E8M0:
      return to_float(to_float8_e8m0(static_cast<float>(value)));
    case DType::kFloat64:
    case DType::kNone:
      break;
  }
  return value;
}

/// A [T, D] value as kernels read it: with a scale for every `kScaleGroup` columns or every row, or
/// as it stands.
struct ScaledView {
  ConstMatrix values;
  ConstMatrix scale = {};  // [T, 1] or [T, groups], optional
};

/// Source n of a list with its scales, if there are any.
inline ScaledView source_at(std::span<const ConstMatrix> sources,
                            std::span<const ConstMatrix> scales, int64_t n) {
  const auto i = static_cast<size_t>(n);
  return {sources[i], scales.empty() ? ConstMatrix{} : scales[i]};
}

inline double load(const ScaledView& view, int64_t row, int64_t col) {
  const double value = load(view.values, row, col);
  if (!view.scale.present()) {
    return value;
  }
  return value * load(view.scale, row, view.scale.cols == 1 ? 0 : col / kScaleGroup);
}

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_COMMON_ELEMENT_H_
