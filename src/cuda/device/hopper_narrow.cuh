// float8 and float16 sources of phase 1 on Hopper: their scales, and the backward's way to the
// tensor cores, where they meet gradients in bfloat16.
//
// float16 becomes a bfloat16 and the bfloat16 of its remainder. float8 is widened to bfloat16 in
// registers:
//
//   v[d] = scale[d / W] q[d]        exact in bfloat16: scales are powers of two, q has 4 bits
//
// Two at a time: the bits of q under the exponent of bfloat16 leave a factor 2^(127 - 7), which one
// product takes away, and a second one multiplies by the scale. A q that is NaN becomes a number;
// its token's logits are NaN from the forward, and with them all its gradients.

#ifndef FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_
#define FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/device/hopper_mma.cuh"
#include "cuda/hopper_plan.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cuda::hopper {

using Fp8 = __nv_fp8_e4m3;

template <class Source>
inline constexpr bool kIsNarrow = sizeof(Source) == 1;

/// Scales of N sources: [T, groups] float8_e8m0 each.
struct ScaleTable {
  const uint8_t* data[kSourcesMax];
  int64_t stride;  // the same for all
  int shift;       // 2^shift columns share a scale

  void set(int64_t n, const ConstMatrix& matrix) {
    data[n] = static_cast<const uint8_t*>(matrix.data);
    stride = matrix.stride;
  }
  /// The columns that share a scale: kScaleGroup, or all of them.
  void set_columns(int count) { shift = count <= kScaleGroup ? 7 : 30; }
  FLASH_ATTN_RES_HOPPER_BOTH int columns() const { return 1 << shift; }
};
static_assert(kScaleGroup == 1 << 7);

/// 2^(bits - 127) in bfloat16; 255 is NaN.
__device__ __forceinline__ Bf16 bf16_scale(uint32_t bits) {
  const uint32_t number = bits == 0 ? 0x0040u : bits << 7;
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits == 0xffu ? 0x7fc0u : number));
}

/// Brings the scales of a step's sources for the CTA's columns to shared memory, by one warp, with
/// several loads of each lane in flight: more than four gained nothing, and to load them a step
/// ahead, into registers, took up to half as much time again.
class ScaleCopier {
 public:
  __device__ __forceinline__ ScaleCopier(unsigned num_sources, int shift, int first_column,
                                         int columns)
      : first_(first_column >> shift),
        groups_(((first_column + columns - 1) >> shift) - first_ + 1),
        count_(num_sources * groups_),
        by_count_((1u << 20) / count_ + 1),
        by_groups_((1u << 20) / groups_ + 1) {}

  /// `to`: (batch, groups, pitch); `token(b)` says which token is the step's b-th.
  template <class Token>
  __device__ __forceinline__ void copy(Bf16* to, const SharedMap& map, const ScaleTable& table,
                                       unsigned batch, unsigned lane, const Token& token) const {
    constexpr unsigned kInFlight = 4;
#pragma unroll 1
    for (unsigned begin = lane; begin < batch * count_; begin += 32 * kInFlight) {
      uint8_t bits[kInFlight];
      Bf16* place[kInFlight];
#pragma unroll
      for (unsigned i = 0; i < kInFlight; ++i) {
        const unsigned index = min(begin + 32 * i, batch * count_ - 1);
        const unsigned b = index * by_count_ >> 20;  // index / count
        const unsigned scale = index - b * count_;
        const unsigned source = scale * by_groups_ >> 20;
        const unsigned group = scale - source * groups_;
        bits[i] = __ldg(table.data[source] + token(b) * table.stride + first_ + group);
        place[i] = to + b * map.token_scales() + group * map.scale_pitch + source;
      }
#pragma unroll
      for (unsigned i = 0; i < kInFlight; ++i) {
        *place[i] = bf16_scale(bits[i]);  // the last one more than once
      }
    }
  }

 private:
  unsigned first_, groups_, count_;
  unsigned by_count_, by_groups_;  // x * by >> 20 is x over the number: x times it < 2^20
};

/// Two e4m3 numbers as bfloat16, divided by 2^120. NaN becomes a number.
__device__ __forceinline__ uint32_t spread_e4m3(uint32_t pair) {
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);  // each on top of 16 bits
  return (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
}

__device__ __forceinline__ uint32_t times_power(uint32_t pair, __nv_bfloat162 scale) {
  const __nv_bfloat162 bias = __bfloat162bfloat162(__ushort_as_bfloat16(0x7b80));  // 2^120
  const __nv_bfloat162 product =
      __hmul2(__hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), bias), scale);
  return reinterpret_cast<const uint32_t&>(product);
}

/// An 8x8 block, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t block) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(block));
  return result;
}

/// A warp's slice of the float8 sources of one token, eight sources at a time.
template <int kSourceGroups>
class NarrowStrips {
 public:
  /// `rows`: the first source's columns of this CTA, `pitch` bytes apart; `scales`: its scales,
  /// (groups, scale_pitch); `first`: the warp's first column in the CTA, a multiple of 16.
  __device__ __forceinline__ NarrowStrips(const char* rows, int pitch, int num_sources,
                                          const Bf16* scales, int scale_pitch, int scale_shift,
                                          int cta_column, int first, int lane)
      : shift_(scale_shift),
        pitch_(scale_pitch),
        column_(cta_column + first),
        group_(cta_column >> scale_shift) {
#pragma unroll
    for (int g = 0; g < kSourceGroups; ++g) {
      const int n = 8 * g + lane / 4;
      const int row = n < num_sources ? n : 0;
      row_[g] = rows + row * pitch + first + lane % 4 * 2;
      scale_[g] = scales + row;
    }
  }

  /// Columns [16 j, 16 j + 16) of the slice, of sources [8 g, 8 g + 8).
  __device__ __forceinline__ Strip load(int g, int j) const {
    const __nv_bfloat162 scale =
        __bfloat162bfloat162(scale_[g][(((column_ + j * 16) >> shift_) - group_) * pitch_]);
    const auto at = [&](int column) {
      return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(row_[g] + column));
    };
    return {times_power(spread_e4m3(at(j * 16)), scale),
            times_power(spread_e4m3(at(j * 16 + 8)), scale)};
  }
  __device__ __forceinline__ Strip load_transposed(int g, int j) const {
    const Strip strip = load(g, j);
    return {transpose(strip.left), transpose(strip.right)};
  }

 private:
  const char* row_[kSourceGroups];
  const Bf16* scale_[kSourceGroups];
  int shift_, pitch_, column_, group_;
};

/// A strip as two in bfloat16: what is rounded, and the remainder.
struct SplitStrip {
  Strip high, low;

  /// From a strip of float16, of which a lane's two numbers of a block have the two scales.
  static __device__ __forceinline__ SplitStrip of(Strip half, float2 scale) {
    const auto split = [&](uint32_t pair) {
      const float2 values = __half22float2(reinterpret_cast<const __half2&>(pair));
      return SplitPair::of(values.x * scale.x, values.y * scale.y);
    };
    const SplitPair left = split(half.left);
    const SplitPair right = split(half.right);
    return {{left.high, right.high}, {left.low, right.low}};
  }
};

/// The scales of float16 sources that a lane needs for a warp's slice of `kTiles` tiles, which is
/// in two groups at most.
template <int kSourceGroups, int kTiles>
class HalfScales {
 public:
  /// `scales`: those of the first source, (groups, pitch), or null: they are one; `cta_column`,
  /// `column`: the first of the CTA and of the slice.
  __device__ __forceinline__ HalfScales(const Bf16* scales, int pitch, int num_sources, int shift,
                                        int cta_column, int column, int lane)
      : second_set_(((column >> shift << shift) + (1 << shift) - column) / 16) {
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      const int group =
          ((column + (set == 0 ? 0 : kTiles - 1) * 16) >> shift) - (cta_column >> shift);
      const auto at = [&](int n) {
        return scales != nullptr ? __bfloat162float(scales[group * pitch + min(n, num_sources - 1)])
                                 : 1.0f;
      };
#pragma unroll
      for (int g = 0; g < kSourceGroups; ++g) {
        row_[set][g] = at(8 * g + lane / 4);
      }
      pair_[set] = {at(lane % 4 * 2), at(lane % 4 * 2 + 1)};
    }
  }

  /// Of source 8 g + lane / 4 in tile j.
  __device__ __forceinline__ float of_row(int g, int j) const {
    return j < second_set_ ? row_[0][g] : row_[1][g];
  }
  /// Of the sources lane % 4 * 2 and the next in tile j.
  __device__ __forceinline__ float2 of_pair(int j) const {
    return j < second_set_ ? pair_[0] : pair_[1];
  }

 private:
  float row_[2][kSourceGroups];
  float2 pair_[2];
  int second_set_;
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_DEVICE_HOPPER_NARROW_CUH_
