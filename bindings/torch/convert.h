// Between PyTorch tensors and the library's views. Stable ABI only: everything here exists in
// PyTorch 2.10 and keeps its binary form afterwards.

#ifndef FLASH_ATTN_RES_BINDINGS_TORCH_CONVERT_H_
#define FLASH_ATTN_RES_BINDINGS_TORCH_CONVERT_H_

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::torch_binding {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Byte:  // exponents: the stable ABI does not know Float8_e8m0fnu yet
      return DType::kFloat8E8M0;
    default:
      STD_TORCH_CHECK(false, "flash_attn_res: dtype ", torch::headeronly::toString(type),
                      " is not supported, expected float32, bfloat16, float16 or float64");
  }
}

/// The dtype of queries and statistics that goes with values of a dtype.
inline ScalarType statistics_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Kernels read rows of consecutive elements; a tensor whose last dimension is strided or expanded
/// is copied.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

/// Row stride of a matrix view; irrelevant (and made valid) where there are no two rows.
inline int64_t row_stride(const Tensor& tensor, int64_t dim, int64_t cols) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : cols;
}

/// Rows of a value [..., D], all leading dimensions counted as one.
inline int64_t count_rows(const Tensor& tensor, int64_t cols) {
  return cols > 0 ? tensor.numel() / cols : 0;
}

/// Whether the rows of a value [..., D] lie one fixed distance apart.
inline bool has_even_rows(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return true;
  }
  return tensor.dim() == 2 && (tensor.size(1) <= 1 || tensor.stride(1) == 1);
}

/// Keeps the tensors that views point into alive for the length of one call.
class Views {
 public:
  /// [rows, cols], or one row from a vector [cols].
  ConstMatrix read(const Tensor& given) {
    const Tensor& tensor = keep(with_dense_rows(given));
    const int64_t cols = tensor.size(tensor.dim() - 1);
    if (tensor.dim() == 1) {
      return {tensor.const_data_ptr(), 1, cols, cols, dtype_of(tensor.scalar_type())};
    }
    return {tensor.const_data_ptr(), tensor.size(0), cols, row_stride(tensor, 0, cols),
            dtype_of(tensor.scalar_type())};
  }

  ConstMatrix read(const std::optional<Tensor>& given) {
    return given.has_value() ? read(*given) : ConstMatrix{};
  }

  /// [T, D] of a value [..., D]; one whose rows lie unevenly is copied.
  ConstMatrix read_value(const Tensor& given) {
    STD_TORCH_CHECK(given.dim() >= 1,
                    "flash_attn_res: a value has no dimensions, expected [..., D]");
    const Tensor& tensor = keep(has_even_rows(given) ? given : torch::stable::contiguous(given));
    const int64_t cols = tensor.size(tensor.dim() - 1);
    const int64_t stride = tensor.dim() == 2 ? row_stride(tensor, 0, cols) : cols;
    return {tensor.const_data_ptr(), count_rows(tensor, cols), cols, stride,
            dtype_of(tensor.scalar_type())};
  }

  ConstMatrix read_value(const std::optional<Tensor>& given) {
    return given.has_value() ? read_value(*given) : ConstMatrix{};
  }

  std::vector<ConstMatrix> read_values(const std::vector<Tensor>& given) {
    std::vector<ConstMatrix> views;
    views.reserve(given.size());
    for (const Tensor& item : given) {
      views.push_back(read_value(item));
    }
    return views;
  }

  /// [T, D] views of the S values of a stack [S, ..., D].
  std::vector<ConstMatrix> read_slots(const Tensor& given) {
    const Tensor& tensor = keep(torch::stable::contiguous(given));
    const int64_t count = tensor.size(0);
    const int64_t cols = tensor.size(tensor.dim() - 1);
    const int64_t rows = count > 0 ? count_rows(tensor, cols) / count : 0;
    const DType dtype = dtype_of(tensor.scalar_type());
    const auto* base = static_cast<const char*>(tensor.const_data_ptr());
    std::vector<ConstMatrix> views;
    for (int64_t i = 0; i < count; ++i) {
      views.push_back({base + i * rows * cols * size_of(dtype), rows, cols, cols, dtype});
    }
    return views;
  }

  /// Statistics [T, S, N] as [T, S * N].
  ConstMatrix read_rows(const Tensor& given) {
    const Tensor& tensor = keep(torch::stable::contiguous(given));
    return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1) * tensor.size(2),
            tensor.size(1) * tensor.size(2), dtype_of(tensor.scalar_type())};
  }

  /// [T, D] views of a list whose items are [T, D] or packed [n, T, D].
  std::vector<ConstMatrix> read_list(const std::vector<Tensor>& given) {
    std::vector<ConstMatrix> views;
    for (const Tensor& item : given) {
      append(with_dense_rows(item), views);
    }
    return views;
  }

  /// [T, D] views of the rows of a stack [S, T, D].
  std::vector<ConstMatrix> read_stack(const std::optional<Tensor>& given) {
    return given.has_value() ? read_list({*given}) : std::vector<ConstMatrix>{};
  }

 private:
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  void append(Tensor given, std::vector<ConstMatrix>& views) {
    const Tensor tensor = keep(std::move(given));
    STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 3, "flash_attn_res: a value has ",
                    tensor.dim(), " dimensions, expected [T, D], or packed [n, T, D]");
    const int64_t lead = tensor.dim() - 2;
    const int64_t count = lead == 0 ? 1 : tensor.size(0);
    const int64_t cols = tensor.size(lead + 1);
    const DType dtype = dtype_of(tensor.scalar_type());
    const auto* base = static_cast<const char*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = lead == 0 ? 0 : i * tensor.stride(0);
      views.push_back({base + offset * size_of(dtype), tensor.size(lead), cols,
                       row_stride(tensor, lead, cols), dtype});
    }
  }

  std::vector<Tensor> kept_;
};

/// A result tensor [rows, cols] (or a vector read as one row).
inline Matrix write_view(const Tensor& tensor) {
  const int64_t cols = tensor.size(tensor.dim() - 1);
  const int64_t rows = tensor.dim() == 1 ? 1 : tensor.size(0);
  return {tensor.mutable_data_ptr(), rows, cols, cols, dtype_of(tensor.scalar_type())};
}

/// The same as rows of `cols` elements: statistics [T, S, N] are written as [T, S * N].
inline Matrix write_view(const Tensor& tensor, int64_t rows, int64_t cols) {
  return {tensor.mutable_data_ptr(), rows, cols, cols, dtype_of(tensor.scalar_type())};
}

inline ConstMatrix read_view(const Tensor& tensor, int64_t rows, int64_t cols) {
  return {tensor.const_data_ptr(), rows, cols, cols, dtype_of(tensor.scalar_type())};
}

/// [T, D] views of contiguous results: each [T, D] or packed [n, T, D].
inline std::vector<Matrix> write_list(const std::vector<Tensor>& results) {
  std::vector<Matrix> views;
  for (const Tensor& tensor : results) {
    const int64_t lead = tensor.dim() - 2;
    const int64_t rows = tensor.size(lead);
    const int64_t cols = tensor.size(lead + 1);
    const DType dtype = dtype_of(tensor.scalar_type());
    auto* base = static_cast<char*>(tensor.mutable_data_ptr());
    for (int64_t i = 0; i < (lead == 0 ? 1 : tensor.size(0)); ++i) {
      views.push_back({base + i * rows * cols * size_of(dtype), rows, cols, cols, dtype});
    }
  }
  return views;
}

/// A result of the caller's [rows, cols] (or a vector, as one row), with any row stride.
inline Matrix strided_view(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(last == 0 || last == 1, "flash_attn_res: ", name, " has ", tensor.dim(),
                  " dimensions, expected 2");
  const int64_t cols = tensor.size(last);
  STD_TORCH_CHECK(cols <= 1 || tensor.stride(last) == 1, "flash_attn_res: ", name,
                  " has rows that are not dense: the stride of its last dimension is ",
                  tensor.stride(last), ", expected 1");
  const int64_t rows = last == 0 ? 1 : tensor.size(0);
  const int64_t stride = last == 0 ? cols : row_stride(tensor, 0, cols);
  return {tensor.mutable_data_ptr(), rows, cols, stride, dtype_of(tensor.scalar_type())};
}

inline Matrix strided_view(const char* name, const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? strided_view(name, *tensor) : Matrix{};
}

/// Statistics [T, S, N], handed in to be written, as [T, S * N].
inline Matrix write_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.is_contiguous(),
                  "flash_attn_res: logits is not contiguous, expected contiguous [T, S, N]");
  return write_view(tensor, tensor.size(0), tensor.size(1) * tensor.size(2));
}

/// A value [..., D] that was handed in to be written.
inline Matrix write_value(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 1 && has_even_rows(tensor),
                  "flash_attn_res: a value to write has uneven rows, expected contiguous [..., D]");
  const int64_t cols = tensor.size(tensor.dim() - 1);
  const int64_t stride = tensor.dim() == 2 ? row_stride(tensor, 0, cols) : cols;
  return {tensor.mutable_data_ptr(), count_rows(tensor, cols), cols, stride,
          dtype_of(tensor.scalar_type())};
}

inline Matrix write_value(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? write_value(*tensor) : Matrix{};
}

inline std::vector<Matrix> write_values(const std::vector<Tensor>& tensors) {
  std::vector<Matrix> views;
  views.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    views.push_back(write_value(tensor));
  }
  return views;
}

/// The S values [T, D] of a stack [S, ..., D] that was handed in to be written.
inline std::vector<Matrix> write_slots(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.is_contiguous(),
                  "flash_attn_res: out is not contiguous, expected contiguous [S, ..., D]");
  const int64_t count = tensor.size(0);
  const int64_t cols = tensor.size(tensor.dim() - 1);
  const int64_t rows = count > 0 ? count_rows(tensor, cols) / count : 0;
  const DType dtype = dtype_of(tensor.scalar_type());
  auto* base = static_cast<char*>(tensor.mutable_data_ptr());
  std::vector<Matrix> views;
  for (int64_t i = 0; i < count; ++i) {
    views.push_back({base + i * rows * cols * size_of(dtype), rows, cols, cols, dtype});
  }
  return views;
}

/// [T, D] of value `slot` of a stack [S, ..., D].
inline Matrix slot_view(const char* name, const Tensor& stack, int64_t slot) {
  STD_TORCH_CHECK(stack.dim() >= 2 && stack.is_contiguous(), "flash_attn_res: ", name,
                  " is not contiguous, expected contiguous [S, ..., D]");
  STD_TORCH_CHECK(slot >= 0 && slot < stack.size(0), "flash_attn_res: ", name, " has ",
                  stack.size(0), " values, which have no number ", slot);
  const int64_t cols = stack.size(stack.dim() - 1);
  const int64_t rows = count_rows(stack, cols) / stack.size(0);
  const DType dtype = dtype_of(stack.scalar_type());
  auto* const base = static_cast<char*>(stack.mutable_data_ptr());
  return {base + slot * rows * cols * size_of(dtype), rows, cols, cols, dtype};
}

/// Row `row` of a matrix, as [1, cols].
inline Matrix row_view(const char* name, const Tensor& matrix, int64_t row) {
  STD_TORCH_CHECK(matrix.dim() == 2, "flash_attn_res: ", name, " has ", matrix.dim(),
                  " dimensions, expected 2");
  STD_TORCH_CHECK(row >= 0 && row < matrix.size(0), "flash_attn_res: ", name, " has ",
                  matrix.size(0), " rows, which have no number ", row);
  Matrix view = strided_view(name, matrix);
  view.data = static_cast<char*>(view.data) + row * view.stride * size_of(view.dtype);
  view.rows = 1;
  return view;
}

/// A fresh contiguous tensor on the device of `like`. The shortest way there is: one through the
/// dispatcher takes as long as a small operator.
inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type) {
  constexpr int64_t kMaxDims = 64;  // of a PyTorch tensor
  const auto dims = static_cast<int64_t>(sizes.size());
  std::array<int64_t, kMaxDims> strides = {};
  int64_t elements = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = elements;
    elements *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0;
  AtenTensorHandle made = nullptr;
  const bool done =
      aoti_torch_get_device_type(like.get(), &device_type) == 0 &&
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), static_cast<int32_t>(type),
                               device_type, like.get_device_index(), &made) == 0;
  // Python makes torch.OutOfMemoryError of it: the stable ABI hands no exception on.
  STD_TORCH_CHECK(done, "flash_attn_res: out of memory on ", like.is_cuda() ? "CUDA" : "the CPU",
                  ": PyTorch could not allocate ", elements, " elements of ",
                  torch::headeronly::toString(type));
  return Tensor(made);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(like, IntHeaderOnlyArrayRef(sizes), type);
}

/// What an output that was not asked for is in a functional schema.
inline Tensor nothing(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

/// Gradient tensors with the shapes and dtypes of the inputs they belong to.
inline std::vector<Tensor> empty_like_list(const std::vector<Tensor>& inputs) {
  std::vector<Tensor> results;
  for (const Tensor& input : inputs) {
    results.push_back(torch::stable::new_empty(input, input.sizes(), input.scalar_type()));
  }
  return results;
}

inline void check(const Status& status) {
  STD_TORCH_CHECK(status.ok(), "flash_attn_res: ", status.message());
}

}  // namespace flash_attn_res::torch_binding

#endif  // FLASH_ATTN_RES_BINDINGS_TORCH_CONVERT_H_
