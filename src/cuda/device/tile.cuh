// A ring of token tiles in shared memory. A tile holds a chunk-aligned copy of a few rows of one
// token; each thread fills, reads and refills its own chunks and no other's, so that the ring needs
// no barrier. Chunk c of thread i is chunk i + c * threads of the row.
//
//   (stages, rows, planes, chunks) x 16 bytes
//
// A plane has 16 bytes of every chunk: one plane for 16-bit storage, two for float32 (and for
// AnyType), so that 16-byte accesses of a warp are consecutive.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_TILE_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_TILE_CUH_

#include "cuda/device/async_copy.cuh"
#include "cuda/device/chunk.cuh"

namespace flash_attn_res::cuda {

/// 16-byte planes of a chunk.
template <class T>
inline constexpr int kPlanes = 1;
template <>
inline constexpr int kPlanes<float> = 2;
template <>
inline constexpr int kPlanes<AnyType> = 2;

template <class T>
struct TileRing {
  uint4* data;
  int rows;
  int chunks;

  __device__ __forceinline__ uint4* plane(int stage, int row, int chunk) const {
    return data + (stage * rows + row) * kPlanes<T> * chunks + chunk;
  }

  /// Starts the copy of one chunk of `source` into (stage, row).
  __device__ __forceinline__ void fetch(int stage, int row, int chunk, const RowRef& source) const {
    uint4* const p = plane(stage, row, chunk);
    if (kPlanes<T> == 1 || source.dtype != DType::kFloat32) {
      copy_async(p, source.data + static_cast<int64_t>(chunk) * 16);
    } else {
      copy_async_cached(p, source.data + static_cast<int64_t>(chunk) * 32);
      copy_async_cached(p + chunks, source.data + static_cast<int64_t>(chunk) * 32 + 16);
    }
  }

  /// The chunk as it was fetched (dtype is looked at for AnyType alone).
  __device__ __forceinline__ Chunk get(int stage, int row, int chunk, DType dtype) const;

  /// Replaces a chunk by values that its storage can hold; for AnyType it is float32 from then on.
  __device__ __forceinline__ void put(int stage, int row, int chunk, const Chunk& value) const;
};

__device__ __forceinline__ Packed<float> packed_floats(const uint4& low, const uint4& high) {
  return {{__uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(low.z),
           __uint_as_float(low.w)},
          {__uint_as_float(high.x), __uint_as_float(high.y), __uint_as_float(high.z),
           __uint_as_float(high.w)}};
}

template <class T>
__device__ __forceinline__ Chunk TileRing<T>::get(int stage, int row, int chunk, DType) const {
  return unpack(Packed<T>{*plane(stage, row, chunk)});
}

template <>
__device__ __forceinline__ Chunk TileRing<float>::get(int stage, int row, int chunk, DType) const {
  const uint4* p = plane(stage, row, chunk);
  return unpack(packed_floats(p[0], p[chunks]));
}

template <>
__device__ __forceinline__ Chunk TileRing<AnyType>::get(int stage, int row, int chunk,
                                                        DType dtype) const {
  const uint4* p = plane(stage, row, chunk);
  switch (dtype) {
    case DType::kBFloat16:
      return unpack(Packed<__nv_bfloat16>{p[0]});
    case DType::kFloat16:
      return unpack(Packed<__half>{p[0]});
    default:
      return unpack(packed_floats(p[0], p[chunks]));
  }
}

template <class T>
__device__ __forceinline__ void TileRing<T>::put(int stage, int row, int chunk,
                                                 const Chunk& value) const {
  *plane(stage, row, chunk) = pack<T>(value).bits;
}

__device__ __forceinline__ void put_floats(uint4* low, uint4* high, const Chunk& value) {
  *reinterpret_cast<float4*>(low) = {value.v[0], value.v[1], value.v[2], value.v[3]};
  *reinterpret_cast<float4*>(high) = {value.v[4], value.v[5], value.v[6], value.v[7]};
}

template <>
__device__ __forceinline__ void TileRing<float>::put(int stage, int row, int chunk,
                                                     const Chunk& value) const {
  uint4* const p = plane(stage, row, chunk);
  put_floats(p, p + chunks, value);
}

template <>
__device__ __forceinline__ void TileRing<AnyType>::put(int stage, int row, int chunk,
                                                       const Chunk& value) const {
  uint4* const p = plane(stage, row, chunk);
  put_floats(p, p + chunks, value);
}

/// A float vector of D elements in shared memory, in two planes like a float32 row of a tile.
struct SharedVector {
  float4* data;  // (2, chunks)
  int chunks;

  __device__ __forceinline__ Chunk get(int chunk) const {
    const float4 low = data[chunk];
    const float4 high = data[chunks + chunk];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
  __device__ __forceinline__ void put(int chunk, const Chunk& value) const {
    data[chunk] = {value.v[0], value.v[1], value.v[2], value.v[3]};
    data[chunks + chunk] = {value.v[4], value.v[5], value.v[6], value.v[7]};
  }
};

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_TILE_CUH_
