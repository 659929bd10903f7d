// Chunks: eight consecutive elements of a row, loaded as they are stored, computed in float32.
//
// A kernel is compiled for each storage type whose chunks are whole and aligned to 16 bytes, and
// once for AnyType: dtype read from the row at run time, any alignment, any tail. Loading is split
// from unpacking so that several loads can be in flight before the first is used.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_CHUNK_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_CHUNK_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/device/params.h"

namespace flash_attn_res::cuda {

/// Storage decided at run time.
struct AnyType {};

/// Eight values in float32.
struct Chunk {
  float v[kChunk];
};

/// A chunk as stored.
template <class T>
struct Packed {
  uint4 bits;
};
template <>
struct Packed<float> {
  float4 low, high;
};
template <>
struct Packed<__nv_fp8_e4m3> {
  uint2 bits;
};
template <>
struct Packed<AnyType> {
  Chunk chunk;
};

__device__ __forceinline__ Chunk zero_chunk() {
  Chunk c;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    c.v[i] = 0.0f;
  }
  return c;
}

// -------------------------------------------------------------------------------------- unpacking

__device__ __forceinline__ float2 unpack_pair(uint32_t bits, __nv_bfloat16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

__device__ __forceinline__ float2 unpack_pair(uint32_t bits, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(bits));
}

template <class T>
__device__ __forceinline__ Chunk unpack(const Packed<T>& packed) {
  const uint32_t words[4] = {packed.bits.x, packed.bits.y, packed.bits.z, packed.bits.w};
  Chunk c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_pair(words[i], T{});
    c.v[2 * i] = pair.x;
    c.v[2 * i + 1] = pair.y;
  }
  return c;
}

__device__ __forceinline__ Chunk unpack(const Packed<float>& packed) {
  return {{packed.low.x, packed.low.y, packed.low.z, packed.low.w, packed.high.x, packed.high.y,
           packed.high.z, packed.high.w}};
}

__device__ __forceinline__ Chunk unpack(const Packed<AnyType>& packed) { return packed.chunk; }

__device__ __forceinline__ Chunk unpack(const Packed<__nv_fp8_e4m3>& packed) {
  const uint32_t words[2] = {packed.bits.x, packed.bits.y};
  Chunk c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto two = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (i % 2 * 16));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
    c.v[2 * i] = pair.x;
    c.v[2 * i + 1] = pair.y;
  }
  return c;
}

__device__ __forceinline__ uint32_t pack_pair(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t pack_pair(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ __forceinline__ Packed<T> pack(const Chunk& c) {
  return {{pack_pair(c.v[0], c.v[1], T{}), pack_pair(c.v[2], c.v[3], T{}),
           pack_pair(c.v[4], c.v[5], T{}), pack_pair(c.v[6], c.v[7], T{})}};
}

template <>
__device__ __forceinline__ Packed<float> pack<float>(const Chunk& c) {
  return {{c.v[0], c.v[1], c.v[2], c.v[3]}, {c.v[4], c.v[5], c.v[6], c.v[7]}};
}

/// The values as the dtype can hold them.
__device__ __forceinline__ Chunk round_to(DType dtype, const Chunk& c) {
  if (dtype == DType::kBFloat16) {
    return unpack(pack<__nv_bfloat16>(c));
  }
  return dtype == DType::kFloat16 ? unpack(pack<__half>(c)) : c;
}

// --------------------------------------------------------------------------------- global memory

template <class T>
__device__ __forceinline__ Packed<T> load_whole(const char* data, int col) {
  return {*reinterpret_cast<const uint4*>(data + static_cast<int64_t>(col) * 2)};
}

template <>
__device__ __forceinline__ Packed<float> load_whole<float>(const char* data, int col) {
  const float4* p = reinterpret_cast<const float4*>(data + static_cast<int64_t>(col) * 4);
  return {p[0], p[1]};
}

template <>
__device__ __forceinline__ Packed<__nv_fp8_e4m3> load_whole<__nv_fp8_e4m3>(const char* data,
                                                                           int col) {
  return {*reinterpret_cast<const uint2*>(data + col)};
}

template <class T>
__device__ __forceinline__ void store_whole(char* data, int col, const Packed<T>& packed) {
  *reinterpret_cast<uint4*>(data + static_cast<int64_t>(col) * 2) = packed.bits;
}

template <>
__device__ __forceinline__ void store_whole<float>(char* data, int col,
                                                   const Packed<float>& packed) {
  float4* p = reinterpret_cast<float4*>(data + static_cast<int64_t>(col) * 4);
  p[0] = packed.low;
  p[1] = packed.high;
}

/// Element by element: any alignment; columns from dim on read as zero.
template <class T>
__device__ __forceinline__ Chunk load_elements(const char* data, int col, int dim) {
  const T* p = reinterpret_cast<const T*>(data) + col;
  Chunk c;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    c.v[i] = col + i < dim ? static_cast<float>(p[i]) : 0.0f;
  }
  return c;
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <class T>
__device__ __forceinline__ void store_elements(char* data, int col, int dim, const Chunk& c) {
  T* p = reinterpret_cast<T*>(data) + col;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (col + i < dim) {
      p[i] = from_float<T>(c.v[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ Chunk load_any(const RowRef& row, int col, int dim) {
  return row.vectorized && col + kChunk <= dim ? unpack(load_whole<T>(row.data, col))
                                               : load_elements<T>(row.data, col, dim);
}

template <class T>
__device__ __forceinline__ void store_any(const RowRef& row, int col, int dim, const Chunk& c) {
  if (row.vectorized && col + kChunk <= dim) {
    store_whole<T>(row.data, col, pack<T>(c));
  } else {
    store_elements<T>(row.data, col, dim, c);
  }
}

/// row[col, col + 8) of a row of `dim` columns, dtype read at run time, without its scale.
__device__ __forceinline__ Chunk load_chunk_unscaled(const RowRef& row, int col, int dim) {
  switch (row.dtype) {
    case DType::kBFloat16:
      return load_any<__nv_bfloat16>(row, col, dim);
    case DType::kFloat16:
      return load_any<__half>(row, col, dim);
    case DType::kFloat8E4M3:
      return load_any<__nv_fp8_e4m3>(row, col, dim);
    default:
      return load_any<float>(row, col, dim);
  }
}

/// 2^(bits - 127); 255 is NaN.
__device__ __forceinline__ float scale_from_bits(uint32_t bits) {
  const uint32_t number = bits == 0 ? 0x00400000u : bits << 23;
  return __uint_as_float(bits == 0xffu ? 0x7fc00000u : number);
}

/// row[col, col + 8) of a row of `dim` columns, dtype read at run time. A chunk lies in one group
/// of columns: col is a multiple of its size.
__device__ __forceinline__ Chunk load_chunk(const RowRef& row, int col, int dim) {
  Chunk c = load_chunk_unscaled(row, col, dim);
  if (row.scale != nullptr) {
    const float scale = scale_from_bits(row.scale[col >> row.scale_shift]);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      c.v[i] *= scale;
    }
  }
  return c;
}

/// row[col]
__device__ __forceinline__ float load_element(const RowRef& row, int64_t col) {
  switch (row.dtype) {
    case DType::kBFloat16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row.data)[col]);
    case DType::kFloat16:
      return __half2float(reinterpret_cast<const __half*>(row.data)[col]);
    default:
      return reinterpret_cast<const float*>(row.data)[col];
  }
}

__device__ __forceinline__ void store_chunk(const RowRef& row, int col, int dim, const Chunk& c) {
  switch (row.dtype) {
    case DType::kBFloat16:
      return store_any<__nv_bfloat16>(row, col, dim, c);
    case DType::kFloat16:
      return store_any<__half>(row, col, dim, c);
    default:
      return store_any<float>(row, col, dim, c);
  }
}

/// The chunk of a kernel compiled for T: whole and aligned unless T is AnyType.
template <class T>
__device__ __forceinline__ Packed<T> load_packed(const RowRef& row, int col, int) {
  return load_whole<T>(row.data, col);
}
template <>
__device__ __forceinline__ Packed<AnyType> load_packed<AnyType>(const RowRef& row, int col,
                                                                int dim) {
  return {load_chunk(row, col, dim)};
}

template <class T>
inline constexpr DType kDTypeOf = DType::kNone;
template <>
inline constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::kFloat16;

/// load_chunk and store_chunk of a kernel compiled for T, whose chunks are whole: one comparison
/// where the row has that type too, which is the usual case.
template <class T>
__device__ __forceinline__ Chunk load_chunk_as(const RowRef& row, int col, int dim) {
  if constexpr (kDTypeOf<T> != DType::kNone) {
    if (row.dtype == kDTypeOf<T> && row.vectorized) {
      return unpack(load_whole<T>(row.data, col));
    }
  }
  return load_chunk(row, col, dim);
}

template <class T>
__device__ __forceinline__ void store_chunk_as(const RowRef& row, int col, int dim,
                                               const Chunk& c) {
  if constexpr (kDTypeOf<T> != DType::kNone) {
    if (row.dtype == kDTypeOf<T> && row.vectorized) {
      store_whole<T>(row.data, col, pack<T>(c));
      return;
    }
  }
  store_chunk(row, col, dim, c);
}

// --------------------------------------------------------------------------------------- algebra

/// sum_i a_i b_i, added to `sum`
__device__ __forceinline__ float dot_add(const Chunk& a, const Chunk& b, float sum) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    sum = fmaf(a.v[i], b.v[i], sum);
  }
  return sum;
}

/// sum += factor * a
__device__ __forceinline__ void add_scaled(Chunk& sum, float factor, const Chunk& a) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    sum.v[i] = fmaf(factor, a.v[i], sum.v[i]);
  }
}

__device__ __forceinline__ void add(Chunk& sum, const Chunk& a) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    sum.v[i] += a.v[i];
  }
}

/// Zeroes the columns before `begin`: what lies outside the key slice never meets a query, not even
/// as 0 * Inf.
__device__ __forceinline__ void keep_from(Chunk& c, int col, int begin) {
  const int before = begin - col;
  if (before > 0) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      c.v[i] = i < before ? 0.0f : c.v[i];
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_CHUNK_CUH_
