// attend: S queries over N frozen sources. Phase 1 of Block Attention Residuals.
//
// Source: Attention Residuals (arXiv 2603.15031), equations 2-6 and Algorithm 1 (phase 1).
//
// For token t, source n and query s, with k_n the last R coordinates of v_n:
//
//   r_n       = rsqrt(mean(k_n^2) + eps)                    inverse RMS of the key
//   logit_sn  = scale * r_n * <u_s, k_n>                    u_s: folded query, see fold.h
//   p_s       = softmax_n(logit_s)        lse_s = logsumexp_n(logit_s)
//   out_s     = sum_n p_sn v_n                              raw values, not the normalised keys
//
// Backward, given dout (optionally times a gate per query and token) and dlse:
//
//   dh_s      = gate_s dout_s
//   dp_sn     = <dh_s, v_n>               delta_s = sum_n p_sn dp_sn
//   dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)
//   dv_n      = sum_s p_sn dh_s  +  on the last R coordinates:
//               sum_s scale dlogit_sn r_n u_s - (sum_s dlogit_sn logit_sn) (r_n^2 / R) k_n
//   du_s      = sum over t and n of scale dlogit_sn r_n k_n
//
// Quantised sources. With source_scales, sources hold float16 or float8_e4m3 numbers q_n
// (quantize.h makes both), and the value is, with W = D for one scale a token and W = 128 for one a
// group,
//
//   v_n[t, d] = source_scales[n][t, d / W] * q_n[t, d]           exact: scales are powers of two
//
// dv_n is the gradient with respect to v_n, in the dtype of dsources.
//
// Statistics, softmax and sums are accumulated in float32 (float64 when the arguments are
// float64); stores round to nearest even. The same call gives the same bits, whatever the number
// of threads. NaN and Inf propagate as IEEE 754 says.

#ifndef FLASH_ATTN_RES_ATTEND_H_
#define FLASH_ATTN_RES_ATTEND_H_

#include <cstdint>
#include <span>

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// Arguments of `attend`. "float" stands for float32, or float64 when the sources are float64.
struct AttendArgs {
  std::span<const ConstMatrix> sources = {};        // N x [T, D]; one dtype, 1 <= N <= 512
  std::span<const ConstMatrix> source_scales = {};  // N x [T, 1] or [T, ceil(D / 128)] float8_e8m0,
                                                    // or empty: the sources are the values
  ConstMatrix queries = {};  // [S, R] float; folded queries, 1 <= S <= 128, R <= D
  double scale = 1.0;        // factor of the logits; the paper and Kimi K3 use 1
  double eps = 1e-6;         // > 0, added to the mean square of a key

  std::span<const Matrix> out = {};  // S x [T, D]; one dtype, may differ from the sources'
  Matrix lse = {};                   // [S, T] float
  Matrix logits = {};                // [T, S * N] float, optional; the backward needs it
  Matrix inv_rms = {};               // [T, N] float, optional; the backward needs it
  Matrix probs = {};                 // [T, S * N] float, optional; probs[t, s * N + n] = p_sn
};

/// Scratch bytes that `attend` needs for these arguments; data pointers are not read.
int64_t attend_workspace_bytes(const AttendArgs& args, Device device = {});

/// Computes out and lse (and the optional outputs). Minimum traffic: N + S units of T * D elements.
/// Errors: kInvalidArgument naming the argument and both shapes; kWorkspaceTooSmall;
/// kUnsupportedDevice; kCudaError.
Status attend(const AttendArgs& args, const Context& context = {});

/// Arguments of `attend_backward`: the forward's inputs and saved statistics, the gradients that
/// came in, and where the results go. Results that are absent (or empty lists) are not computed.
struct AttendBackwardArgs {
  std::span<const ConstMatrix> sources = {};        // N x [T, D], as in the forward
  std::span<const ConstMatrix> source_scales = {};  // as in the forward
  ConstMatrix queries = {};                         // [S, R] float
  double scale = 1.0;
  ConstMatrix lse = {};      // [S, T] float, from the forward
  ConstMatrix logits = {};   // [T, S * N] float, from the forward
  ConstMatrix inv_rms = {};  // [T, N] float, from the forward

  std::span<const ConstMatrix> dout = {};  // S x [T, D]; one dtype; empty: zero
  ConstMatrix gate = {};  // [S, T] float, optional: factor of dout (1 - q of a merge)
  ConstMatrix dlse = {};  // [S, T] float, optional: zero when absent

  std::span<const Matrix> dsources =
      {};  // N x [T, D]; one dtype (float32, bfloat16 or float16), or empty
  bool accumulate_dsources = false;  // add to what dsources holds instead of overwriting it
  Matrix dqueries = {};              // [S, R] float, optional
  bool accumulate_dqueries = false;
};

/// Scratch bytes that `attend_backward` needs for these arguments; data pointers are not read.
int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args, Device device = {});

/// Computes dsources and dqueries. Minimum traffic: 2N + S units of T * D elements, 3N + S when
/// accumulating. Errors as for `attend`. dqueries is reduced in an order that depends on T alone.
Status attend_backward(const AttendBackwardArgs& args, const Context& context = {});

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_ATTEND_H_
