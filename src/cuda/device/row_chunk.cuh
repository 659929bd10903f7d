// Chunks that are read once and kept as stored until they are used. All chunks are whole and
// aligned to 16 bytes.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_ROW_CHUNK_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_ROW_CHUNK_CUH_

#include <cstdint>

#include "cuda/device/chunk.cuh"

namespace flash_attn_res::cuda {

/// Storage decided at run time, row by row; unlike AnyType, chunks are whole and aligned.
struct AnyAligned {};

template <>
struct Packed<AnyAligned> {
  uint4 low, high;  // of 16-bit storage the low half alone
};

/// 16 bytes that nobody reads again.
__device__ __forceinline__ uint4 load_once(const char* address) {
  // Not the path for constants (.nc): a row may be overwritten by the thread that has read it. And
  // no hint to go past L1: it costs 5 % of an H200's bandwidth.
  uint4 bits;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address));
  return bits;
}

/// Bytes of a chunk of a row.
template <class T>
__device__ __forceinline__ unsigned row_chunk_bytes(const RowRef&) {
  return kChunk * sizeof(T);
}

template <>
__device__ __forceinline__ unsigned row_chunk_bytes<AnyAligned>(const RowRef& row) {
  return row.dtype == DType::kFloat32 ? 32 : 16;
}

/// Asks for a chunk to be brought into L2. Nothing is read: this may come before the wait for the
/// grid that still writes the row, since what it writes goes through L2 as well.
template <class T>
__device__ __forceinline__ void prefetch_row_chunk(const RowRef& row, unsigned chunk) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(row.data + static_cast<uint64_t>(chunk) *
                                                               row_chunk_bytes<T>(row)));
}

/// Chunk `chunk` of a row, as stored.
template <class T>
__device__ __forceinline__ Packed<T> load_row_chunk(const RowRef& row, unsigned chunk) {
  return {load_once(row.data + static_cast<uint64_t>(chunk) * 16)};
}

template <>
__device__ __forceinline__ Packed<AnyAligned> load_row_chunk(const RowRef& row, unsigned chunk) {
  if (row.dtype != DType::kFloat32) {
    return {load_once(row.data + static_cast<uint64_t>(chunk) * 16), {}};
  }
  const char* const address = row.data + static_cast<uint64_t>(chunk) * 32;
  return {load_once(address), load_once(address + 16)};
}

template <>
__device__ __forceinline__ Packed<__nv_fp8_e4m3> load_row_chunk(const RowRef& row, unsigned chunk) {
  uint2 bits;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(bits.x), "=r"(bits.y)
               : "l"(row.data + static_cast<uint64_t>(chunk) * kChunk));
  return {bits};
}

/// The values of a chunk (dtype is looked at for AnyAligned alone).
template <class T>
__device__ __forceinline__ Chunk unpack_row_chunk(const Packed<T>& packed, DType) {
  return unpack(packed);
}

template <>
__device__ __forceinline__ Chunk unpack_row_chunk(const Packed<AnyAligned>& packed, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return unpack(Packed<__nv_bfloat16>{packed.low});
    case DType::kFloat16:
      return unpack(Packed<__half>{packed.low});
    default:
      return {{__uint_as_float(packed.low.x), __uint_as_float(packed.low.y),
               __uint_as_float(packed.low.z), __uint_as_float(packed.low.w),
               __uint_as_float(packed.high.x), __uint_as_float(packed.high.y),
               __uint_as_float(packed.high.z), __uint_as_float(packed.high.w)}};
  }
}

/// A chunk rounded to a row's storage.
template <class T>
__device__ __forceinline__ Packed<T> pack_row_chunk(const Chunk& c, DType) {
  return pack<T>(c);
}

template <>
__device__ __forceinline__ Packed<AnyAligned> pack_row_chunk(const Chunk& c, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {pack<__nv_bfloat16>(c).bits, {}};
    case DType::kFloat16:
      return {pack<__half>(c).bits, {}};
    default:
      return {{__float_as_uint(c.v[0]), __float_as_uint(c.v[1]), __float_as_uint(c.v[2]),
               __float_as_uint(c.v[3])},
              {__float_as_uint(c.v[4]), __float_as_uint(c.v[5]), __float_as_uint(c.v[6]),
               __float_as_uint(c.v[7])}};
  }
}

template <class T>
__device__ __forceinline__ void store_row_chunk(const RowRef& row, unsigned chunk,
                                                const Packed<T>& packed) {
  *reinterpret_cast<uint4*>(row.data + static_cast<uint64_t>(chunk) * 16) = packed.bits;
}

template <>
__device__ __forceinline__ void store_row_chunk(const RowRef& row, unsigned chunk,
                                                const Packed<AnyAligned>& packed) {
  const bool half = row.dtype != DType::kFloat32;
  char* const address = row.data + static_cast<uint64_t>(chunk) * (half ? 16 : 32);
  *reinterpret_cast<uint4*>(address) = packed.low;
  if (!half) {
    *reinterpret_cast<uint4*>(address + 16) = packed.high;
  }
}

/// use(c, values) for several chunks of a vector that every token reads, whatever its dtype, with
/// one question for the dtype. In the place of those beyond the vector comes its last one: there
/// the caller's own values are zeros.
template <int kCount, class Use>
__device__ __forceinline__ void for_shared_chunks(const RowRef& row,
                                                  const unsigned (&chunk)[kCount], unsigned chunks,
                                                  Use&& use) {
  const auto load = [&]<class T>(T) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int col = static_cast<int>(min(chunk[c], chunks - 1)) * kChunk;
      use(c, unpack(load_whole<T>(row.data, col)));
    }
  };
  switch (row.dtype) {
    case DType::kBFloat16:
      return load(__nv_bfloat16());
    case DType::kFloat16:
      return load(__half());
    default:
      return load(float());
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_ROW_CHUNK_CUH_
