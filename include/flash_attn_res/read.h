// read: one reading site. One query over any of: a phase-1 result, sources read directly, and the
// running partial sum, with pending updates added first and the sublayer's pre-norm applied last.
//
// Source: Attention Residuals (arXiv 2603.15031), equations 2-6, Algorithm 1 (phase 2) and the
// reading sites of Kimi K3 (arXiv 2607.24653).
//
// For one token, with k the last R coordinates of a value:
//
//   partial'  = partial + updates, summed in float32 and rounded to the dtype of partial_out;
//               the rounded value is used below
//   terms     z_0 = phase1_out, z_1..z_N = sources, z_last = partial'    (those given; K of them)
//   r_j       = rsqrt(mean(k_j^2) + eps)
//   logit_j   = phase1_lse for the phase-1 term, else scale * r_j * <u, k_j>
//   p         = softmax_j(logit)          h = sum_j p_j z_j
//   x         = h                                        OutputNorm::kNone
//   x         = h * rsqrt(mean(h^2) + norm_eps) * g      OutputNorm::kRms (g: norm_weight, or 1)
//
// x may be stored as float8 e4m3 (the fn format of the OCP specification: 4 exponent bits, 3
// fraction bits, largest value 448, no Inf) with one float32 scale for a token, or for each group
// of 128 columns (the last one may be shorter). For the float32 values x_d of a group:
//
//   scale     = max(amax / 448, 2^-126)           amax = max |x_d|, ScaleRounding::kNone
//   scale     = that, up to the next power of two                   ScaleRounding::kPowerOfTwo
//   stored_d  = e4m3(x_d * (1 / scale))           nearest, ties to even, saturating at +-448
//
// so that x is stored * scale. A group of zeros stores zeros. A NaN or Inf in a group makes its
// scale NaN or Inf, and with it every value that the group stands for NaN: nothing is hidden.
//
// Everything that happens at a site is a case of it (traffic in units of T * D elements):
//
//   case                               given                                  forward  backward
//   one-shot, Full AttnRes, final      N sources                              N + 1    2N + 1
//   merge (phase 2)                    phase 1, partial                       3        5
//   advance                            phase 1, partial, update, norm         5        6
//   Kimi K3 site                       N sources, partial, update, norm       N + 4    3N + 4
//
// Backward, given dx, dmix and dpartial_out (each zero when absent), y = g * dx, rh = mix_inv_rms:
//
//   dh        = dmix + (kNone: dx;  kRms: rh y - h (rh^3 / D) <y, h>)       dg = sum_t dx h rh
//   dp_j      = <dh, z_j>     delta = sum_j p_j dp_j     dlogit_j = p_j (dp_j - delta)
//   dz_j      = p_j dh  +  on the last R coordinates, for all but the phase-1 term:
//               scale dlogit_j r_j u - dlogit_j logit_j (r_j^2 / R) k_j
//   dphase1_lse = dlogit_0
//   dpartial  = dz_last + dpartial_out        this is also the gradient of every update
//   du        = sum over t and all but the phase-1 term of scale dlogit_j r_j k_j
//
// Precision, determinism and IEEE behaviour as in attend.h.

#ifndef FLASH_ATTN_RES_READ_H_
#define FLASH_ATTN_RES_READ_H_

#include <cstdint>
#include <span>

#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

/// The sublayer's own pre-norm, fused into the site.
enum class OutputNorm : int32_t { kNone = 0, kRms = 1 };

/// Precision of the mixture h that the output norm sees. Engines differ: Triton kernels keep
/// float32, others round to the storage dtype first.
enum class MixRounding : int32_t {
  kFloat32 = 0,  // the norm sees the float32 mixture
  kStorage = 1,  // h is rounded to the dtype of x before the norm; x quantised: of the first value
};

/// The scales of a quantised x: as they come, or powers of two (UE8M0: the exponent says all).
enum class ScaleRounding : int32_t { kNone = 0, kPowerOfTwo = 1 };

/// Arguments of `read`. "float" stands for float32, or float64 when the values are float64.
/// At least one of phase1_out, sources, partial and updates is given.
struct ReadArgs {
  ConstMatrix phase1_out = {};                      // [T, D], optional: out_s of `attend`
  ConstMatrix phase1_lse = {};                      // [1, T] float, with phase1_out
  std::span<const ConstMatrix> sources = {};        // N x [T, D], one dtype; may be empty; N <= 512
  std::span<const ConstMatrix> source_scales = {};  // N x [T, 1] or [T, ceil(D / 128)] float8_e8m0
                                                    // of quantised sources (attend.h), or empty
  ConstMatrix partial = {};                   // [T, D], optional: the running sum of the block
  std::span<const ConstMatrix> updates = {};  // 0..2 x [T, D]: pending outputs to add to the sum
  ConstMatrix query = {};                     // [1, R] float; may be absent when K == 1
  double scale = 1.0;
  double eps = 1e-6;  // > 0, of the keys

  OutputNorm norm = OutputNorm::kNone;
  ConstMatrix norm_weight = {};  // [1, D] any dtype, optional with kRms (absent: ones)
  double norm_eps = 1e-6;        // > 0, of the output norm
  MixRounding mix_rounding = MixRounding::kFloat32;

  Matrix x = {};  // [T, D]; a storage dtype, or kFloat8E4M3 with x_scale
  Matrix partial_out =
      {};               // [T, D]; needed with updates. May be the memory of partial or an update.
  Matrix mix = {};      // [T, D], optional: h
  Matrix logits = {};   // [T, K] float, optional; the backward needs it
  Matrix inv_rms = {};  // [T, K] float, optional; the backward needs it; 0 for the phase-1 term
  Matrix mix_inv_rms = {};  // [1, T] float, optional; the backward needs it with kRms
  Matrix probs = {};        // [T, K] float, optional

  Matrix x_scale = {};  // [T, 1] or [T, ceil(D / 128)] float32: with a quantised x, and only then
  ScaleRounding scale_rounding = ScaleRounding::kNone;
  Matrix snapshot = {};  // [T, D] in the dtype of the sum, optional: partial' once more, where a
                         // bank keeps it. Must not overlap anything that the call reads or writes.
};

/// Number of softmax terms K: phase 1 (0 or 1) + N + partial sum (0 or 1).
int64_t read_terms(const ReadArgs& args);

/// Scratch bytes that `read` needs for these arguments; data pointers are not read.
int64_t read_workspace_bytes(const ReadArgs& args, Device device = {});

/// Computes x, the new partial sum and the optional outputs. Errors as for `attend`.
Status read(const ReadArgs& args, const Context& context = {});

/// Arguments of `read_backward`. Results that are absent (or empty lists) are not computed.
struct ReadBackwardArgs {
  ConstMatrix phase1_out = {};                      // [T, D], optional, as in the forward
  std::span<const ConstMatrix> sources = {};        // N x [T, D]
  std::span<const ConstMatrix> source_scales = {};  // as in the forward
  ConstMatrix partial = {};  // [T, D], optional: partial_out of the forward (the sum)
  ConstMatrix query = {};    // [1, R] float
  double scale = 1.0;
  OutputNorm norm = OutputNorm::kNone;
  ConstMatrix norm_weight = {};  // [1, D]
  MixRounding mix_rounding = MixRounding::kFloat32;
  ConstMatrix logits = {};       // [T, K] float, from the forward
  ConstMatrix inv_rms = {};      // [T, K] float, from the forward
  ConstMatrix mix_inv_rms = {};  // [1, T] float, from the forward, with kRms

  ConstMatrix dx = {};            // [T, D] in the dtype of x, optional: zero when absent
  ConstMatrix dmix = {};          // [T, D], optional
  ConstMatrix dpartial_out = {};  // [T, D], optional

  Matrix dphase1_out = {};                // [T, D], optional: p_0 dh
  Matrix dphase1_lse = {};                // [1, T] float, optional
  Matrix dh = {};                         // [T, D], optional: dh itself, for attend_backward's
                                          // dout. May be the memory of phase1_out, in its dtype
                                          // and strides: what is read of it is replaced.
  Matrix gate = {};                       // [1, T] float, optional: p_0, for attend_backward's gate
  std::span<const Matrix> dsources = {};  // N x [T, D]; one dtype, or empty
  bool accumulate_dsources = false;       // add to what dsources holds instead of overwriting it
  Matrix dpartial = {};                   // [T, D], optional. May be the memory of dpartial_out.
  Matrix dquery = {};                     // [1, R] float, optional
  bool accumulate_dquery = false;
  Matrix dnorm_weight = {};  // [1, D] any dtype, optional
  bool accumulate_dnorm_weight = false;
};

/// Scratch bytes that `read_backward` needs for these arguments; data pointers are not read.
int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args, Device device = {});

/// Computes the gradients asked for. Errors as for `attend`.
Status read_backward(const ReadBackwardArgs& args, const Context& context = {});

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_READ_H_
