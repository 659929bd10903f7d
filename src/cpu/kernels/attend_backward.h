// attend_backward: gradients of S queries over N sources, for a range of tokens.
//
//   p_sn      = exp(logit_sn - lse_s)     dh_s = gate_s dout_s
//   dp_sn     = <dh_s, v_n>               delta_s = sum_n p_sn dp_sn
//   dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)
//   dv_n      = sum_s p_sn dh_s  +  on the last R coordinates:
//               sum_s scale dlogit_sn r_n u_s - (sum_s dlogit_sn logit_sn) (r_n^2 / R) k_n
//   du_s     += sum over n of scale dlogit_sn r_n k_n
//
// A token is visited twice: for dp, from memory, and for dv and du, from the caches. Bytes from and
// to memory: (N + S) * D elements read, N * D written, N * D more read when accumulating. du is
// summed in float32, token after token, in the chunk's own rows; the host adds the chunks' rows in
// a fixed order, so that the result depends on the number of tokens and on nothing else.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_ATTEND_BACKWARD_H_
#define FLASH_ATTN_RES_CPU_KERNELS_ATTEND_BACKWARD_H_

#include "cpu/kernels/dots.h"
#include "cpu/kernels/mixtures.h"
#include "cpu/kernels/params.h"
#include "cpu/kernels/softmax.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// From p and dp of one token to the factors of dh, u and k (see AttendBackwardScratch).
inline void attend_factors(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                           int64_t t) {
  const float* logits = static_cast<const float*>(p.logits.data) + t * p.logits.stride;     // (S,N)
  const float* inv_rms = static_cast<const float*>(p.inv_rms.data) + t * p.inv_rms.stride;  // (N)
  for (int64_t n = 0; n < p.N; ++n) {
    w.key_factor[n] = 0.0f;
  }
  for (int64_t s = 0; s < p.S; ++s) {
    float* prob = w.probs + s * p.N;  // (N)
    float* dp = w.dp + s * p.N;       // (N)
    const float gate = given(p.gate) ? float_at(p.gate, s, t) : 1.0f;
    const float dlse = given(p.dlse) ? float_at(p.dlse, s, t) : 0.0f;
    // exp(logit - lse) sums to 1 up to the rounding of lse, which dp would magnify where the dp_sn
    // are nearly equal: the mean is taken over what the weights do sum to.
    float delta = 0.0f;
    float total = 0.0f;
    for (int64_t n = 0; n < p.N; ++n) {
      dp[n] = (dp[n] + w.dp_plain[s * p.N + n]) * gate;
      delta += prob[n] * dp[n];
      total += prob[n];
    }
    delta /= total;
    for (int64_t n = 0; n < p.N; ++n) {
      // With one source the difference is zero by identity, whatever lse was handed in.
      const float difference = p.N == 1 ? dp[n] * 0.0f : dp[n] - delta;
      const float dlogit = prob[n] * (difference + dlse);
      w.key_factor[n] += dlogit * logits[s * p.N + n];
      dp[n] = p.scale * dlogit * inv_rms[n];
      prob[n] *= gate;
    }
  }
  for (int64_t n = 0; n < p.N; ++n) {
    w.key_factor[n] *= -(inv_rms[n] * inv_rms[n] / static_cast<float>(p.R));
  }
}

/// dv and du of one token over `count` elements from `start` on: the key slice, or what is before
/// it, which knows nothing of the logits.
template <class Ev, class Es>
inline void attend_gradients(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                             int64_t t, int64_t start, int64_t count, bool keyed) {
  const bool stream = p.stream;
  const bool with_dout = p.dout != nullptr;
  const float* packed_dh = keyed ? w.dh_key : w.dh_plain;
  Reader<Float32> u[kMaxQueries];   // (S) rows of a piece
  Reader<Float32> dh[kMaxQueries];  // (S)
  Reader<Ev> v[kMaxSources];        // (N)
  Reader<Es> old[kMaxSources];      // (N)
  Writer<Es> dv[kMaxSources];       // (N)
  GradientRows<Ev, Es> rows;
  rows.S = p.S;
  rows.N = p.N;
  rows.dh = with_dout ? dh : nullptr;
  rows.dh_factor = w.probs;
  rows.u = keyed ? u : nullptr;
  rows.u_factor = w.dp;
  rows.v = v;
  rows.key_factor = w.key_factor;
  rows.old = p.accumulate_dsources ? old : nullptr;
  rows.dv = dv;
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t width = count - i < kPiece ? count - i : kPiece;
    for (int64_t s = 0; s < p.S; ++s) {
      u[s] = packed_piece(w.queries, p.S, s, i);
      dh[s] = packed_piece(packed_dh, p.S, s, i);
    }
    for (int64_t n = 0; n < p.N; ++n) {
      v[n] = reader<Ev>(p.sources[n], t).from(start + i);
      if (p.dsources != nullptr) {
        old[n] = held<Es>(p.dsources[n], t).from(start + i);
        dv[n] = writer<Es>(p.dsources[n], t, stream).from(start + i);
      }
    }
    if (keyed && w.dqueries != nullptr) {
      accumulate(v, p.N, w.dp, p.N, w.dqueries + i * p.S, kPiece, p.S, 0, width);
    }
    if (p.dsources != nullptr) {
      gradients(rows, p.N, width);
    }
  }
}

template <class Ed, class Ev, class Es>
inline void attend_backward_tokens(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                                   int64_t begin, int64_t end) {
  const int64_t key_start = p.D - p.R;
  const int64_t jump = packed_jump(p.S);
  Reader<Float32> dh[kMaxQueries];  // (S) rows of D or R
  Reader<Ed> dout[kMaxQueries];     // (S) rows of D or R
  Reader<Ev> v[kMaxSources];        // (N) rows of D
  Reader<Ev> key[kMaxSources];      // (N) rows of R
  for (int64_t s = 0; s < p.S; ++s) {
    dh[s] = reader<Float32>(p.queries, s);
  }
  pack(dh, p.S, p.R, w.queries);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t s = 0; s < p.S; ++s) {
      const float lse = float_at(p.lse, s, t);
      for (int64_t n = 0; n < p.N; ++n) {
        w.probs[s * p.N + n] = float_at(p.logits, t, s * p.N + n) - lse;
        w.dp[s * p.N + n] = 0.0f;
        w.dp_plain[s * p.N + n] = 0.0f;
      }
    }
    exponentials(w.probs, p.S * p.N);

    if (p.dout != nullptr) {
      for (int64_t n = 0; n < p.N; ++n) {
        v[n] = reader<Ev>(p.sources[n], t);
        key[n] = v[n].from(key_start);
      }
      for (int64_t s = 0; s < p.S; ++s) {
        dout[s] = reader<Ed>(p.dout[s], t);
        dh[s] = packed_piece(w.dh_plain, p.S, s, 0);
      }
      if (key_start > 0) {
        pack(dout, p.S, key_start, w.dh_plain);
        dots<Sweep::kFirst>(dh, jump, p.S, v, p.N, key_start, w.dp_plain, nullptr);
      }
      for (int64_t s = 0; s < p.S; ++s) {
        dout[s] = dout[s].from(key_start);
        dh[s] = packed_piece(w.dh_key, p.S, s, 0);
      }
      pack(dout, p.S, p.R, w.dh_key);
      dots<Sweep::kFirst>(dh, jump, p.S, key, p.N, p.R, w.dp, nullptr);
    }
    attend_factors(p, w, t);

    attend_gradients<Ev, Es>(p, w, t, 0, key_start, false);
    attend_gradients<Ev, Es>(p, w, t, key_start, p.R, true);
  }
  if (p.stream) {
    stream_fence();
  }
}

inline void attend_backward(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                            int64_t begin, int64_t end) {
  if (w.dqueries != nullptr) {
    const int64_t pieces = (p.R + kPiece - 1) / kPiece;
    for (int64_t i = 0; i < pieces * p.S * kPiece; ++i) {
      w.dqueries[i] = 0.0f;
    }
  }
  const DType dtype = p.sources[0].dtype;
  const DType dout = p.dout != nullptr ? p.dout[0].dtype : dtype;
  const DType dsources = p.dsources != nullptr ? p.dsources[0].dtype : dtype;
  if (dout == dtype && dsources == dtype) {
    if (dtype == DType::kFloat32) {
      return attend_backward_tokens<Float32, Float32, Float32>(p, w, begin, end);
    }
    if (dtype == DType::kBFloat16) {
      return attend_backward_tokens<BFloat16, BFloat16, BFloat16>(p, w, begin, end);
    }
    if (dtype == DType::kFloat16) {
      return attend_backward_tokens<Float16, Float16, Float16>(p, w, begin, end);
    }
  }
  attend_backward_tokens<AnyFloat, AnyFloat, AnyFloat>(p, w, begin, end);
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_ATTEND_BACKWARD_H_
