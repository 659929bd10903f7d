// Softmax of `attend`: from the slices' sums to logits, lse and probabilities.
//
//   r_n = rsqrt(sum_slices squares / R + eps)       logit_sn = scale r_n sum_slices dots
//   lse_s = logsumexp_n(logit_s)                    p_sn = exp(logit_sn - lse_s)
//
// in    dots [slices, T, N, Sp], squares [slices, T, N] float32, from attend_scores
// out   lse [S, T]; optionally logits [T, S * N], inv_rms [T, N], probs [T, S * N]; and the
//       probabilities [T, N, Sp] for attend_mix, in the place of the first slice's dots
// bytes a few floats a token and query
//
// One thread a (token, query); it alone touches dots[., t, ., s].

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SOFTMAX_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SOFTMAX_CUH_

#include "cuda/device/params.h"

namespace flash_attn_res::cuda {

inline constexpr int kSoftmaxThreads = 256;

struct AttendSoftmaxParams {
  float* dots;           // [slices, T, N, Sp]; the first slice becomes the probabilities
  const float* squares;  // [slices, T, N]
  FloatView lse;         // [S, T]
  FloatView logits;      // [T, S * N], optional
  FloatView inv_rms;     // [T, N], optional
  FloatView probs;       // [T, S * N], optional
  int64_t tokens;
  int num_slices, num_sources, num_queries, padded_queries;
  float key_dim, scale, eps;
};

static __global__ void __launch_bounds__(kSoftmaxThreads)
    attend_softmax_kernel(const __grid_constant__ AttendSoftmaxParams p) {
  const int64_t pairs = p.tokens * p.num_queries;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSoftmaxThreads;
  for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kSoftmaxThreads + threadIdx.x;
       pair < pairs; pair += stride) {
    const int64_t t = pair / p.num_queries;
    const int s = static_cast<int>(pair - t * p.num_queries);
    const int64_t rows = p.tokens * p.num_sources;
    const int64_t row = t * p.num_sources;
    float* const logits = p.dots + row * p.padded_queries + s;  // (N), stride Sp

    float largest = -INFINITY;
    for (int n = 0; n < p.num_sources; ++n) {
      float dot = 0.0f;
      float square = 0.0f;
      for (int64_t slice = 0; slice < p.num_slices; ++slice) {
        dot += logits[(slice * rows + n) * p.padded_queries];
        square += p.squares[slice * rows + row + n];
      }
      const float inv_rms = rsqrtf(square / p.key_dim + p.eps);
      const float logit = p.scale * inv_rms * dot;
      largest = fmaxf(largest, logit);
      logits[static_cast<int64_t>(n) * p.padded_queries] = logit;
      if (p.logits.present()) {
        p.logits.at(t, static_cast<int64_t>(s) * p.num_sources + n) = logit;
      }
      if (s == 0 && p.inv_rms.present()) {
        p.inv_rms.at(t, n) = inv_rms;
      }
    }
    float sum = 0.0f;
    for (int n = 0; n < p.num_sources; ++n) {
      const float weight = expf(logits[static_cast<int64_t>(n) * p.padded_queries] - largest);
      logits[static_cast<int64_t>(n) * p.padded_queries] = weight;
      sum += weight;
    }
    p.lse.at(s, t) = largest + logf(sum);
    for (int n = 0; n < p.num_sources; ++n) {
      // x / x is exactly 1: a single source is returned as it is.
      const float prob = logits[static_cast<int64_t>(n) * p.padded_queries] / sum;
      logits[static_cast<int64_t>(n) * p.padded_queries] = prob;
      if (p.probs.present()) {
        p.probs.at(t, static_cast<int64_t>(s) * p.num_sources + n) = prob;
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_SOFTMAX_CUH_
