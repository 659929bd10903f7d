// attend_backward: gradients of S queries over N sources, for a range of tokens.
//
//   p_sn      = exp(logit_sn - lse_s)     dh_s = gate_s dout_s
//   dp_sn     = <dh_s, v_n>               delta_s = sum_n p_sn dp_sn
//   dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)
//   dv_n      = sum_s p_sn dh_s  +  on the last R coordinates:
//               sum_s scale dlogit_sn r_n u_s - (sum_s dlogit_sn logit_sn) (r_n^2 / R) k_n
//   du_s     += sum over n of scale dlogit_sn r_n k_n
//
// A token is visited twice: for dp, from memory, and for dv and du, from packed float32 copies of v
// and dout that the first visit leaves in L2 (see kPiece). Bytes from and
// to memory: (N + S) * D elements read, N * D written, N * D more read when accumulating. du is
// summed in float32, over sources, over a few tokens (kTokensPerSum), and over those sums of a
// chunk; the host adds the chunks' rows in a fixed order, so that the result depends on the number
// of tokens and on nothing else.

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
    // exp(logit - lse) sums to 1 up to the rounding of lse: the same relative error in all weights,
    // which sums over tokens would keep, and which dp would magnify where the dp_sn are nearly
    // equal. The weights are divided by what they do sum to; in float32, many equal ones would sum
    // to several ulp less or more.
    double delta = 0.0;
    double total = 0.0;
    for (int64_t n = 0; n < p.N; ++n) {
      dp[n] = (dp[n] + w.dp_plain[s * p.N + n]) * gate;
      delta += static_cast<double>(prob[n]) * static_cast<double>(dp[n]);
      total += static_cast<double>(prob[n]);
    }
    const float mean = static_cast<float>(delta / total);
    const float sum = static_cast<float>(total);
    for (int64_t n = 0; n < p.N; ++n) {
      // With one source the difference is zero by identity, whatever lse was handed in.
      const float difference = p.N == 1 ? dp[n] * 0.0f : dp[n] - mean;
      prob[n] = p.N == 1 ? prob[n] : prob[n] / sum;  // equal ones come out as 1 / N
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
template <class Es>
inline void attend_gradients(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                             int64_t t, int64_t start, int64_t count, bool keyed) {
  const bool with_dout = p.dout != nullptr;
  const float* packed_dh = keyed ? w.dh_key : w.dh_plain;
  const float* packed_v = keyed ? w.v_key : w.v_plain;
  Reader<Packed> u[kMaxQueries];   // (S) rows of a piece
  Reader<Packed> dh[kMaxQueries];  // (S)
  Reader<Packed> v[kMaxSources];   // (N)
  Reader<Es> old[kMaxSources];     // (N)
  Writer<Es> dv[kMaxSources];      // (N)
  GradientRows<Packed, Es> rows;
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
  rows.fetch_odd = false;  // the first visit has fetched all
  rows.term = 0;
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t width = count - i < kPiece ? count - i : kPiece;
    for (int64_t s = 0; s < p.S; ++s) {
      u[s] = packed_piece(w.queries, p.S, s, i);
      dh[s] = packed_piece(packed_dh, p.S, s, i);
    }
    for (int64_t n = 0; n < p.N; ++n) {
      v[n] = packed_piece(packed_v, p.N, n, i);
      if (p.dsources != nullptr) {
        old[n] = held<Es>(p.dsources[n], t).from(start + i);
        dv[n] = writer<Es>(p.dsources[n], t, p.stream).from(start + i);
      }
    }
    if (keyed && w.recent != nullptr) {
      accumulate(v, p.N, w.dp, p.N, w.recent + i * p.S, kPiece, p.S, 0, width);
    }
    if (p.dsources != nullptr) {
      gradients(rows, p.N, width);
    }
  }
}

/// The same for a single query, whose second visit is of the rows v themselves, from `start` on.
template <class Ev, class Es>
inline void attend_gradients_of_one(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                                    int64_t t, const Reader<Ev>* v, int64_t start, int64_t count,
                                    bool keyed) {
  if (keyed && w.recent != nullptr) {
    accumulate(v, p.N, w.dp, 0, w.recent, 0, 1, 0, count);
  }
  if (p.dsources == nullptr) {
    return;
  }
  const Reader<Packed> u = {w.queries};
  const Reader<Packed> dh = {keyed ? w.dh_key : w.dh_plain};
  Reader<Es> old[kMaxSources];  // (N)
  Writer<Es> dv[kMaxSources];   // (N)
  for (int64_t n = 0; n < p.N; ++n) {
    old[n] = held<Es>(p.dsources[n], t).from(start);
    dv[n] = writer<Es>(p.dsources[n], t, p.stream).from(start);
  }
  const GradientRows<Ev, Es> rows = {1,
                                     p.N,
                                     p.dout != nullptr ? &dh : nullptr,
                                     w.probs,
                                     keyed ? &u : nullptr,
                                     w.dp,
                                     v,
                                     w.key_factor,
                                     p.accumulate_dsources ? old : nullptr,
                                     dv,
                                     p.dout != nullptr,  // dots have fetched the even rows
                                     0};
  gradients(rows, p.N, count);
}

/// Ev is the type of the sources, E that of dout and of dsources. Both have the same order.
template <class Ev, class E>
inline void attend_backward_tokens(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                                   int64_t begin, int64_t end) {
  const int64_t key_start = p.D - p.R;
  const bool one = p.S == 1;       // nothing is packed but dout
  Reader<Float32> u[kMaxQueries];  // (S) rows of R
  Reader<E> dout[kMaxQueries];     // (S) rows of D or R
  Reader<Ev> v[kMaxSources];       // (N) rows of D
  Reader<Ev> key[kMaxSources];     // (N) rows of R
  for (int64_t s = 0; s < p.S; ++s) {
    u[s] = reader<Float32>(p.queries, s);
  }
  pack<E>(u, p.S, p.R, w.queries);
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

    for (int64_t n = 0; n < p.N; ++n) {
      v[n] = source_reader<Ev>(p.sources, p.source_scales, n, t);
      key[n] = v[n].from(key_start);
    }
    if (p.dout != nullptr) {
      for (int64_t s = 0; s < p.S; ++s) {
        dout[s] = reader<E>(p.dout[s], t);
      }
      if (key_start > 0) {
        pack<E>(dout, p.S, key_start, w.dh_plain);
        if (one) {
          dots_of_one<Sweep::kFirst>(Reader<Packed>{w.dh_plain}, v, p.N, key_start, w.dp_plain,
                                     nullptr);
        } else {
          dots_packing<Sweep::kFirst>(w.dh_plain, p.S, v, p.N, key_start, w.v_plain, w.dp_plain,
                                      nullptr);
        }
      }
      for (int64_t s = 0; s < p.S; ++s) {
        dout[s] = dout[s].from(key_start);
      }
      pack<E>(dout, p.S, p.R, w.dh_key);
      if (one) {
        dots_of_one<Sweep::kFirst>(Reader<Packed>{w.dh_key}, key, p.N, p.R, w.dp, nullptr);
      } else {
        dots_packing<Sweep::kFirst>(w.dh_key, p.S, key, p.N, p.R, w.v_key, w.dp, nullptr);
      }
    } else if (!one) {
      pack<Ev>(key, p.N, p.R, w.v_key);
    }
    attend_factors(p, w, t);

    if (one) {
      attend_gradients_of_one<Ev, E>(p, w, t, v, 0, key_start, false);
      attend_gradients_of_one<Ev, E>(p, w, t, key, key_start, p.R, true);
    } else {
      attend_gradients<E>(p, w, t, 0, key_start, false);
      attend_gradients<E>(p, w, t, key_start, p.R, true);
    }
    if (w.dqueries != nullptr && (t + 1 == end || (t + 1 - begin) % kTokensPerSum == 0)) {
      settle(w.recent, w.dqueries, whole_pieces(p.R) * p.S);
    }
  }
  if (w.dqueries != nullptr) {
    restore_order<E>(w.dqueries, whole_pieces(p.R) * p.S);
  }
  if (p.stream) {
    stream_fence();
  }
}

inline void attend_backward(const AttendBackwardParams& p, const AttendBackwardScratch& w,
                            int64_t begin, int64_t end) {
  if (w.dqueries != nullptr) {
    fill_zeros(w.dqueries, whole_pieces(p.R) * p.S);
    fill_zeros(w.recent, whole_pieces(p.R) * p.S);
  }
  const DType dtype = p.sources[0].dtype;
  const DType dout = p.dout != nullptr ? p.dout[0].dtype : dtype;
  const DType dsources = p.dsources != nullptr ? p.dsources[0].dtype : dtype;
  if (dout == dtype && dsources == dtype && p.source_scales == nullptr) {
    if (dtype == DType::kFloat32) {
      return attend_backward_tokens<Float32, Float32>(p, w, begin, end);
    }
    if (dtype == DType::kBFloat16) {
      return attend_backward_tokens<BFloat16, BFloat16>(p, w, begin, end);
    }
    if (dtype == DType::kFloat16) {
      return attend_backward_tokens<Float16, Float16>(p, w, begin, end);
    }
  }
  if (p.source_scales != nullptr && dtype == DType::kFloat16) {
    return attend_backward_tokens<Scaled<Float16>, AnyFloat>(p, w, begin, end);
  }
  if (p.source_scales != nullptr && dtype == DType::kFloat8E4M3) {
    return attend_backward_tokens<Scaled<Float8>, AnyFloat>(p, w, begin, end);
  }
  attend_backward_tokens<AnyFloat, AnyFloat>(p, w, begin, end);
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_ATTEND_BACKWARD_H_
