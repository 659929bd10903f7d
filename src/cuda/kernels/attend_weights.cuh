// Second part of the backward of `attend`: what each row weighs in the gradients.
//
//   p_sn      = exp(logit_sn - lse_s)        dp_sn = gate_s <dout_s, v_n>
//   dlogit_sn = p_sn (dp_sn - sum_m p_sm dp_sm + dlse_s)
//
//   grad_weights[t, n, s]  = p_sn gate_s                    of dout_s in dv_n
//   query_weights[t, n, s] = scale dlogit_sn r_n            of u_s in dv_n, and of k_n in du_s
//   key_weights[t, n]      = sum_s dlogit_sn logit_sn r_n^2 / R     of k_n in dv_n, subtracted
//
// in    dots [T, N, Sp] from attend_dots; logits [T, S * N], lse [S, T], inv_rms [T, N];
//       gate and dlse [S, T], optional; all float32
// out   the three weights, float32, in the workspace; grad_weights takes the place of dots
// bytes a few floats a token and query
//
// `width` neighbouring lanes (a power of two, S or more up to a warp) share a token, one query each
// at a time.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_WEIGHTS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_WEIGHTS_CUH_

#include "cuda/device/params.h"
#include "cuda/device/reduce.cuh"

namespace flash_attn_res::cuda {

inline constexpr int kWeightsThreads = 256;

struct AttendWeightsParams {
  float* grad_weights;   // [T, N, Sp]; holds dots on entry, unless has_dout is false
  float* query_weights;  // [T, N, Sp]
  float* key_weights;    // [T, N]
  FloatView logits;      // [T, S * N]
  FloatView lse;         // [S, T]
  FloatView inv_rms;     // [T, N]
  FloatView gate;        // [S, T], optional
  FloatView dlse;        // [S, T], optional
  int64_t tokens;
  int num_sources, num_queries, padded_queries, width;
  bool has_dout;
  float key_dim, scale;
};

static __global__ void __launch_bounds__(kWeightsThreads)
    attend_weights_kernel(const __grid_constant__ AttendWeightsParams p) {
  const int lane = static_cast<int>(threadIdx.x) % p.width;
  const int tokens_per_block = kWeightsThreads / p.width;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tokens_per_block; first < p.tokens;
       first += static_cast<int64_t>(gridDim.x) * tokens_per_block) {
    const int64_t token = first + threadIdx.x / p.width;
    const bool valid = token < p.tokens;
    const int64_t t = valid ? token : p.tokens - 1;  // every lane takes part in the shuffles
    const int64_t base = t * p.num_sources * p.padded_queries;

    for (int s = lane; s < p.padded_queries && valid; s += p.width) {
      if (s >= p.num_queries) {
        for (int n = 0; n < p.num_sources; ++n) {
          const int64_t i = base + static_cast<int64_t>(n) * p.padded_queries + s;
          p.grad_weights[i] = 0.0f;
          p.query_weights[i] = 0.0f;
        }
        continue;
      }
      const float lse = p.lse.at(s, t);
      const float gate = p.gate.present() ? p.gate.at(s, t) : 1.0f;
      const float dlse = p.dlse.present() ? p.dlse.at(s, t) : 0.0f;
      // exp(logit - lse) sums to 1 up to the rounding of lse, which dp would magnify where the
      // dp_sn are nearly equal: the mean is taken over what the weights do sum to.
      float delta = 0.0f;
      float total = 0.0f;
      for (int n = 0; n < p.num_sources; ++n) {
        const int64_t i = base + static_cast<int64_t>(n) * p.padded_queries + s;
        const float prob = expf(p.logits.at(t, static_cast<int64_t>(s) * p.num_sources + n) - lse);
        delta = fmaf(prob, p.has_dout ? gate * p.grad_weights[i] : 0.0f, delta);
        total += prob;
      }
      delta /= total;
      for (int n = 0; n < p.num_sources; ++n) {
        const int64_t i = base + static_cast<int64_t>(n) * p.padded_queries + s;
        const float prob = expf(p.logits.at(t, static_cast<int64_t>(s) * p.num_sources + n) - lse);
        const float dp = p.has_dout ? gate * p.grad_weights[i] : 0.0f;
        // With one source p is 1 and the difference is zero by identity, not just by rounding.
        const float difference = p.num_sources == 1 ? dp * 0.0f : dp - delta;
        const float dlogit = prob * (difference + dlse);
        p.grad_weights[i] = prob * gate;
        p.query_weights[i] = dlogit;
      }
    }
    __syncwarp();
    for (int n = 0; n < p.num_sources; ++n) {
      const float inv_rms = p.inv_rms.at(t, n);
      float sum = 0.0f;
      for (int s = lane; s < p.num_queries; s += p.width) {
        const int64_t i = base + static_cast<int64_t>(n) * p.padded_queries + s;
        if (valid) {
          const float dlogit = p.query_weights[i];
          sum = fmaf(dlogit, p.logits.at(t, static_cast<int64_t>(s) * p.num_sources + n), sum);
          p.query_weights[i] = p.scale * dlogit * inv_rms;
        }
      }
      sum = warp_sum(sum, p.width);
      if (lane == 0 && valid) {
        p.key_weights[t * p.num_sources + n] = sum * inv_rms * inv_rms / p.key_dim;
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_ATTEND_WEIGHTS_CUH_
