// The sums over D of `read`'s forward, in the one order that all its kernels keep, so that a token
// has the same bits whichever of them reads it:
//
//   chunk     its eight products in order
//   segment   of 256 columns: a butterfly over the 32 chunks, offsets 16, 8, 4, 2, 1
//   row       of P parts, each every P-th segment in order, a butterfly over the parts. P is 32 for
//             the norm, and for K terms sum_parts(K): a warp then sums all of them at once

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_SUMS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_SUMS_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

/// The columns of a query that meet one chunk of a row, in two loads where it is `aligned`.
__device__ __forceinline__ Chunk load_query_chunk(const FloatView& query, int col, int key_begin,
                                                  bool aligned) {
  const float* const u = query.data + (col - key_begin);
  if (aligned && col >= key_begin) {
    const float4 low = reinterpret_cast<const float4*>(u)[0];
    const float4 high = reinterpret_cast<const float4*>(u)[1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
  Chunk c;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    c.v[i] = col + i >= key_begin ? u[i] : 0.0f;
  }
  return c;
}

/// Sums over a warp of the squares and dots of up to 16 terms (of one segment, or of several),
/// two at a time: what is left of a pair after the first two halving steps is one value a lane, so
/// that few are alive at once.
template <int kTerms>
struct PairSums {
  static constexpr int kPairs = kTerms > 8 ? 8 : kTerms > 4 ? 4 : kTerms > 2 ? 2 : 1;
  float values[kPairs] = {};

  __device__ __forceinline__ void set(int i, float (&pair)[4], int lane) {
    scatter_steps<2, 16>(pair, lane);
    values[i] = pair[0];
  }
  __device__ __forceinline__ float finish(int lane) {
    scatter_steps<kPairs / 2, 4>(values, lane);
    return warp_sum(values[0], 8 / kPairs);
  }
  /// Which of the 4 kPairs sums a lane ends up with.
  static __device__ __forceinline__ int index(int lane) {
    return lane % 8 / (8 / kPairs) * 4 + lane / 8;
  }
};

/// Parts of the sums of a read with K terms.
constexpr int sum_parts(int terms) {
  return terms <= 2 ? 16 : terms <= 4 ? 8 : terms <= 8 ? 4 : terms <= 12 ? 2 : 1;
}

/// The butterfly over `kParts` neighbouring lanes, in each of them.
template <int kParts>
__device__ __forceinline__ float sum_over_parts(float value) {
#pragma unroll
  for (int offset = kParts / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

/// A term's logit and r over all its columns, from |k|^2 and <u, k> of each segment in shared
/// memory: `sums` is (segments, stride) pairs, the last term's at `last` and term j's at j. Lane l
/// returns those of term l.
struct TermLogit {
  float logit, inv_rms;
};

template <int kParts, class Params>
__device__ __forceinline__ TermLogit term_logit_of(const Params& p, const float* sums,
                                                   unsigned stride, unsigned last,
                                                   unsigned segments, int lane) {
  const int term = lane / kParts;
  float square = 0.0f;
  float dot = 0.0f;
  if (term < p.num_terms) {
    const float2* const own =
        reinterpret_cast<const float2*>(sums) + (term == p.num_terms - 1 ? last : term);
    // Many parts are few rounds.
#pragma unroll(kParts > 8 ? 1 : 4)
    for (unsigned g = lane % kParts; g < segments; g += kParts) {
      const float2 both = own[g * stride];
      square += both.x;
      dot += both.y;
    }
  }
  square = sum_over_parts<kParts>(square);
  dot = sum_over_parts<kParts>(dot);
  const float inv_rms = rsqrtf(square * p.inv_key_dim + p.eps);
  const float logit = p.query.present() ? p.scale * inv_rms * dot : 0.0f;
  if constexpr (kParts == 1) {
    return {logit, inv_rms};
  } else {
    const int source = lane * kParts % kWarp;
    return {__shfl_sync(kAllLanes, logit, source), __shfl_sync(kAllLanes, inv_rms, source)};
  }
}

/// The same for a kernel that serves from kLeast to kMost terms.
template <int kLeast, int kMost, class Params>
__device__ __forceinline__ TermLogit term_logit(const Params& p, const float* sums, unsigned stride,
                                                unsigned last, unsigned segments, int lane) {
  constexpr int kParts = sum_parts(kMost);
  if constexpr (sum_parts(kLeast) != kParts) {
    // The largest number of terms with more parts than kMost has.
    constexpr int kFewer = kMost > 12 ? 12 : kMost > 8 ? 8 : kMost > 4 ? 4 : 2;
    if (p.num_terms <= kFewer) {
      return term_logit<kLeast, kFewer>(p, sums, stride, last, segments, lane);
    }
  }
  return term_logit_of<kParts>(p, sums, stride, last, segments, lane);
}

/// A lane's part of a softmax over lanes.
struct LaneSoftmax {
  float prob;          // of this lane's term
  float largest, sum;  // the largest logit; the sum of exp(logit - largest)

  __device__ __forceinline__ float lse() const { return largest + logf(sum); }
};

/// Softmax over the terms in lanes 0 .. K - 1, whose logits the other lanes pad with -inf. kTerms
/// is at least K; what lanes beyond it return means nothing.
template <int kTerms>
__device__ __forceinline__ LaneSoftmax softmax_over_lanes(float logit, bool is_term) {
  constexpr int kWidth = kTerms <= 2    ? 2
                         : kTerms <= 4  ? 4
                         : kTerms <= 8  ? 8
                         : kTerms <= 16 ? 16
                                        : kWarp;
  float largest = logit;
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
  }
  const float weight = is_term ? expf(logit - largest) : 0.0f;
  const float sum = sum_over_parts<kWidth>(weight);
  return {weight / sum, largest, sum};
}

/// What a backward or the caller wants to know of token t's terms, term l from lane l.
template <class Params>
__device__ __forceinline__ void store_statistics(const Params& p, int64_t t, int lane,
                                                 const TermLogit& own, const LaneSoftmax& softmax) {
  if (p.logits.present()) {
    p.logits.at(t, lane) = own.logit;
  }
  if (p.inv_rms.present()) {
    p.inv_rms.at(t, lane) = own.inv_rms;
  }
  if (p.probs.present()) {
    p.probs.at(t, lane) = softmax.prob;
  }
  if (lane == 0 && p.lse.present()) {
    p.lse.at(0, t) = softmax.lse();
  }
}

/// Sum of one number for each segment, in every lane. Up to 8192 columns are one round of the loop.
template <int kUnroll>
__device__ __forceinline__ float sum_of_segments(const float* sums, unsigned segments, int lane) {
  float sum = 0.0f;
#pragma unroll kUnroll
  for (unsigned g = lane; g < segments; g += kWarp) {
    sum += sums[g];
  }
  return sum_over_parts<kWarp>(sum);
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_SUMS_CUH_
