// How kernels see the caller's tensors: pointers with byte strides, passed by value as kernel
// parameters, so that no table is ever copied to the device.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_PARAMS_H_
#define FLASH_ATTN_RES_CUDA_DEVICE_PARAMS_H_

#include <cstdint>

#include "flash_attn_res/types.h"

#ifdef __CUDACC__
#define FLASH_ATTN_RES_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_ATTN_RES_HOST_DEVICE inline
#endif

namespace flash_attn_res::cuda {

/// Elements of a chunk: consecutive columns that one thread loads, computes and stores together.
inline constexpr int kChunk = 8;

/// One row of values.
struct RowRef {
  char* data;
  DType dtype;
  bool vectorized;  // every whole chunk of the row may be accessed 16 bytes at a time
  const uint8_t* scale = nullptr;  // float8_e8m0, one for every 2^scale_shift columns, or null
  int scale_shift = 0;
};

/// A [T, D] tensor of values; data is null when the tensor is absent.
struct ValueView {
  char* data = nullptr;
  int64_t stride_bytes = 0;
  DType dtype = DType::kNone;
  bool vectorized = false;

  FLASH_ATTN_RES_HOST_DEVICE bool present() const { return dtype != DType::kNone; }

  FLASH_ATTN_RES_HOST_DEVICE RowRef row(int64_t t) const {
    return {data + t * stride_bytes, dtype, vectorized};
  }
};

/// A float32 tensor of statistics; data is null when the tensor is absent.
struct FloatView {
  float* data = nullptr;
  int64_t stride = 0;  // elements between rows

  FLASH_ATTN_RES_HOST_DEVICE bool present() const { return data != nullptr; }
  FLASH_ATTN_RES_HOST_DEVICE float& at(int64_t row, int64_t col) const {
    return data[row * stride + col];
  }
};

/// Up to kCapacity tensors [T, D], each with its own address, stride and dtype.
template <int kCapacity>
struct ValueTable {
  char* data[kCapacity];
  int64_t stride_bytes[kCapacity];
  uint8_t dtype[kCapacity];       // DType
  uint8_t vectorized[kCapacity];  // bool

  FLASH_ATTN_RES_HOST_DEVICE RowRef row(int j, int64_t t) const {
    return {data[j] + t * stride_bytes[j], static_cast<DType>(dtype[j]), vectorized[j] != 0};
  }

  void set(int j, const ValueView& view) {
    data[j] = view.data;
    stride_bytes[j] = view.stride_bytes;
    dtype[j] = static_cast<uint8_t>(view.dtype);
    vectorized[j] = view.vectorized ? 1 : 0;
  }

  void copy(int from, int to) {
    data[to] = data[from];
    stride_bytes[to] = stride_bytes[from];
    dtype[to] = dtype[from];
    vectorized[to] = vectorized[from];
  }
};

/// The same with a scale for each token or group of columns, or for none of the tensors. Only
/// kernels of AnyType look at them.
template <int kCapacity>
struct ScaledTable : ValueTable<kCapacity> {
  const uint8_t* scale[kCapacity];  // null: the numbers are the values
  int64_t scale_stride;             // elements, the same for all
  int scale_shift;                  // 2^scale_shift columns share a scale

  FLASH_ATTN_RES_HOST_DEVICE RowRef row(int j, int64_t t) const {
    RowRef row = ValueTable<kCapacity>::row(j, t);
    if (scale[j] != nullptr) {
      row.scale = scale[j] + t * scale_stride;
      row.scale_shift = scale_shift;
    }
    return row;
  }

  void set_scale(int j, const ConstMatrix& view) {
    constexpr int kGroupShift = 7;
    constexpr int kWholeRow = 31;
    static_assert(int64_t{1} << kGroupShift == kScaleGroup);
    scale[j] = static_cast<const uint8_t*>(view.data);
    scale_stride = view.stride;
    scale_shift = view.cols == 1 ? kWholeRow : kGroupShift;
  }
};

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_PARAMS_H_
