// read_backward: gradients of one reading site, for a range of tokens.
//
//   p         = softmax(logits)           y = g * dx           rh = mix_inv_rms
//   dh        = dmix + (no norm: dx;  norm: rh y - h (rh^3 / D) <y, h>)     dg += dx h rh
//   dp_j      = <dh, z_j>     delta = sum_j p_j dp_j     dlogit_j = p_j (dp_j - delta)
//   dz_j      = p_j dh  +  on the last R coordinates, for all but the phase-1 term:
//               scale dlogit_j r_j u - dlogit_j logit_j (r_j^2 / R) k_j
//   dpartial  = dz_last + dpartial_out        dphase1_lse = dlogit_0
//   du       += sum over all but the phase-1 term of scale dlogit_j r_j k_j
//
// h is recomputed from the terms. A token's rows come from memory once; dh is kept in scratch.
// du and dg are summed in float32, over a few tokens (kTokensPerSum), and those sums over a chunk;
// the host adds the chunks' rows in a fixed order.
//
// With two terms the differences are taken before the sums and products that would cancel:
//   dlogit_1 = p_0 p_1 <dh, z_1 - z_0> = -dlogit_0

#ifndef FLASH_ATTN_RES_CPU_KERNELS_READ_BACKWARD_H_
#define FLASH_ATTN_RES_CPU_KERNELS_READ_BACKWARD_H_

#include "cpu/kernels/attend_backward.h"
#include "cpu/kernels/dots.h"
#include "cpu/kernels/mixtures.h"
#include "cpu/kernels/params.h"
#include "cpu/kernels/read.h"
#include "cpu/kernels/softmax.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// dh of token t into scratch, without an output norm.
template <class E>
inline void read_dh_plain(const ReadBackwardParams& p, const ReadBackwardScratch& w, int64_t t) {
  const Writer<Packed> dh = {w.dh};
  const Reader<E> dx = reader<E>(p.dx, t);
  const Reader<E> dmix = reader<E>(p.dmix, t);
  for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair sum = zero_pair();
    if (given(p.dmix)) {
      dmix.prefetch(i);
      sum = dmix.get(i, part);
    }
    if (given(p.dx)) {
      dx.prefetch(i);
      sum = given(p.dmix) ? add(sum, dx.get(i, part)) : dx.get(i, part);
    }
    dh.put(i, sum, part);
  });
}

/// dh of token t into scratch, and its part of dg, through the output norm.
template <class E>
inline void read_dh_normed(const ReadBackwardParams& p, const ReadBackwardScratch& w,
                           const Reader<E>* z, int64_t t) {
  const Reader<E> dx = reader<E>(p.dx, t);
  const Reader<E> dmix = reader<E>(p.dmix, t);
  const Reader<Packed> g = {w.norm_weight};
  const float rh = float_at(p.mix_inv_rms, 0, t);
  const auto mix_step = [&](int64_t i, auto part, Pair& y_dot_h) FLASH_ATTN_RES_ALWAYS {
    for (int64_t j = 0; j < p.K; ++j) {
      z[j].prefetch(i);
    }
    dx.prefetch(i);
    Pair h[1];
    mixture_at<1>(z, p.K, w.probs, i, part, h);
    if (p.round_mix) {
      h[0] = rounded<E>(h[0], p.dx.dtype);
    }
    const Pair dxi = dx.get(i, part);
    y_dot_h = fma(mul(g.get(i, part), dxi), h[0], y_dot_h);
    Writer<Packed>{w.mix}.put(i, h[0], part);
    if (w.recent_norm != nullptr) {
      const Pair held_sum = Reader<Packed>{w.recent_norm}.get(i, part);
      const Pair sum = fma(mul(broadcast(rh), dxi), h[0], held_sum);
      Writer<Packed>{w.recent_norm}.put(i, sum, part);
    }
  };
  const float y_dot_h = reduce_add(sum_by_runs(p.D, mix_step));
  const float factor = -(rh * rh * rh / static_cast<float>(p.D)) * y_dot_h;
  for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    const Pair y = mul(g.get(i, part), dx.get(i, part));
    Pair sum = mul(broadcast(rh), y);
    sum = fma(broadcast(factor), Reader<Packed>{w.mix}.get(i, part), sum);
    if (given(p.dmix)) {
      dmix.prefetch(i);
      sum = add(sum, dmix.get(i, part));
    }
    Writer<Packed>{w.dh}.put(i, sum, part);
  });
}

/// dp of one token; of two terms, dp_0 is left out of both.
template <Sweep kSweep, class E>
inline void read_dots(const ReadBackwardParams& p, const ReadBackwardScratch& w,
                      const Reader<E>* z) {
  const Reader<Packed> dh = {w.dh};
  if (p.K == 2) {
    w.dp[0] = 0.0f;
    w.dp[1] = difference_dot<kSweep>(dh, z[0], z[1], p.D);
  } else {
    dots<kSweep>(dh, z, p.K, p.D, w.dp, nullptr);
  }
}

/// From p and dp of one token to the factors of u and k (see ReadBackwardScratch).
inline void read_factors(const ReadBackwardParams& p, const ReadBackwardScratch& w, int64_t t) {
  double sum = 0.0;
  for (int64_t j = 0; j < p.K; ++j) {
    sum += static_cast<double>(w.probs[j]) * static_cast<double>(w.dp[j]);
  }
  const float delta = static_cast<float>(sum);
  const float of_two = p.K == 2 ? w.probs[0] * w.probs[1] * (w.dp[1] - w.dp[0]) : 0.0f;
  for (int64_t j = 0; j < p.K; ++j) {
    const float r = float_at(p.inv_rms, t, j);
    const float difference = p.K == 1 ? w.dp[j] * 0.0f : w.dp[j] - delta;
    float dlogit = w.probs[j] * difference;
    if (p.K == 2) {
      dlogit = j == 0 ? -of_two : of_two;
    }
    if (j == 0 && given(p.phase1_out) && given(p.dphase1_lse)) {
      put_float(p.dphase1_lse, 0, t, dlogit);
    }
    w.key_factor[j] = -(dlogit * w.logits[j]) * (r * r / static_cast<float>(p.R));
    w.dp[j] = p.scale * dlogit * r;
  }
}

/// dz of `count` terms of token t that begin at term j; dv, old and their key slices are given.
template <class E>
inline void read_gradients(const ReadBackwardParams& p, const ReadBackwardScratch& w,
                           const Reader<E>* z, int64_t j, int64_t count, const Reader<E>* old,
                           const Writer<E>* dz) {
  const int64_t key_start = p.D - p.R;
  const Reader<Packed> dh = {w.dh};
  const Reader<Packed> dh_key = dh.from(key_start);
  const Reader<Packed> u = {w.query};
  // Through an output norm, the sweep for h has fetched every term.
  const bool fetch_odd = !(p.normed && given(p.dx));
  // At most four terms a time: that is what one tile takes.
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t width = count - first < 4 ? count - first : 4;
    Reader<E> key[4];
    Reader<E> old_key[4];
    Writer<E> dz_key[4];
    for (int64_t b = 0; b < width; ++b) {
      key[b] = z[j + first + b].from(key_start);
      dz_key[b] = dz[first + b].from(key_start);
      if (old != nullptr) {
        old_key[b] = old[first + b].from(key_start);
      }
    }
    const int64_t term = j + first;
    const GradientRows<E, E> plain = {1,
                                      p.K,
                                      &dh,
                                      w.probs + term,
                                      nullptr,
                                      nullptr,
                                      z + term,
                                      nullptr,
                                      old != nullptr ? old + first : nullptr,
                                      dz + first,
                                      fetch_odd,
                                      term};
    const GradientRows<E, E> keyed = {1,
                                      p.K,
                                      &dh_key,
                                      w.probs + term,
                                      given(p.query) ? &u : nullptr,
                                      w.dp + term,
                                      key,
                                      w.key_factor + term,
                                      old != nullptr ? old_key : nullptr,
                                      dz_key,
                                      fetch_odd,
                                      term};
    gradients(plain, width, key_start);
    gradients(keyed, width, p.R);
  }
}

/// out = factor * dh
template <class E>
inline void scale_dh(const ReadBackwardParams& p, const ReadBackwardScratch& w, float factor,
                     const Writer<E>& out) {
  for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    out.put(i, mul(broadcast(factor), Reader<Packed>{w.dh}.get(i, part)), part);
  });
}

template <class E>
inline void read_backward_tokens(const ReadBackwardParams& p, const ReadBackwardScratch& w,
                                 int64_t begin, int64_t end) {
  const int64_t key_start = p.D - p.R;
  const bool stream = p.stream;
  const bool normed = p.normed && given(p.dx);
  const int64_t first_key = given(p.phase1_out) ? 1 : 0;
  Reader<E> z[kMaxTerms];      // (K) rows of D
  Reader<E> key[kMaxTerms];    // (K) rows of R
  Reader<E> old[kMaxSources];  // (N) rows of D
  Writer<E> dz[kMaxSources];   // (N) rows of D
  if (normed) {
    load_norm_weight<E>(p.norm_weight, p.D, w.norm_weight);
  }
  if (given(p.query)) {
    load_query<E>(p.query, p.R, w.query);
  }

  for (int64_t t = begin; t < end; ++t) {
    int64_t j = 0;
    if (first_key == 1) {
      z[j++] = reader<E>(p.phase1_out, t);
    }
    for (int64_t n = 0; n < p.N; ++n) {
      z[j++] = source_reader<E>(p.sources, p.source_scales, n, t);
    }
    if (given(p.partial)) {
      z[j++] = reader<E>(p.partial, t);
    }
    for (j = 0; j < p.K; ++j) {
      key[j] = z[j].from(key_start);
      w.logits[j] = float_at(p.logits, t, j);
    }
    softmax_rows(w.logits, 1, p.K, w.probs, nullptr);

    if (normed) {
      read_dh_normed<E>(p, w, z, t);
      read_dots<Sweep::kAgain>(p, w, z);
    } else {
      read_dh_plain<E>(p, w, t);
      read_dots<Sweep::kFirst>(p, w, z);
    }
    read_factors(p, w, t);

    if (given(p.dh)) {
      scale_dh<E>(p, w, 1.0f, writer<E>(p.dh, t, stream));
    }
    if (first_key == 1 && given(p.gate)) {
      put_float(p.gate, 0, t, w.probs[0]);
    }
    if (first_key == 1 && given(p.dphase1_out)) {
      scale_dh<E>(p, w, w.probs[0], writer<E>(p.dphase1_out, t, stream));
    }
    if (p.dsources != nullptr) {
      for (int64_t n = 0; n < p.N; ++n) {
        dz[n] = writer<E>(p.dsources[n], t, stream);
        old[n] = held<E>(p.dsources[n], t);
      }
      read_gradients<E>(p, w, z, first_key, p.N, p.accumulate_dsources ? old : nullptr, dz);
    }
    if (given(p.partial) && given(p.dpartial)) {
      const Writer<E> dpartial = writer<E>(p.dpartial, t, stream);
      const Reader<E> later = reader<E>(p.dpartial_out, t);
      read_gradients<E>(p, w, z, p.K - 1, 1, given(p.dpartial_out) ? &later : nullptr, &dpartial);
    }
    if (w.recent_query != nullptr) {
      accumulate(key + first_key, p.K - first_key, w.dp + first_key, 0, w.recent_query, 0, 1, 0,
                 p.R);
    }
    if (t + 1 == end || (t + 1 - begin) % kTokensPerSum == 0) {
      if (w.dquery != nullptr) {
        settle(w.recent_query, w.dquery, whole_pieces(p.R));
      }
      if (w.dnorm_weight != nullptr) {
        settle(w.recent_norm, w.dnorm_weight, whole_pieces(p.D));
      }
    }
  }
  if (w.dquery != nullptr) {
    restore_order<E>(w.dquery, whole_pieces(p.R));
  }
  if (w.dnorm_weight != nullptr) {
    restore_order<E>(w.dnorm_weight, whole_pieces(p.D));
  }
  if (stream) {
    stream_fence();
  }
}

/// Whether every row that a backward read touches has this dtype.
inline bool read_backward_rows_are(const ReadBackwardParams& p, DType dtype) {
  const auto fits = [dtype](DType other) { return other == DType::kNone || other == dtype; };
  return fits(p.phase1_out.dtype) && p.source_scales == nullptr &&
         (p.N == 0 || fits(p.sources[0].dtype)) && fits(p.partial.dtype) && fits(p.dx.dtype) &&
         fits(p.dmix.dtype) && fits(p.dpartial_out.dtype) && fits(p.dphase1_out.dtype) &&
         fits(p.dh.dtype) && (p.N == 0 || p.dsources == nullptr || fits(p.dsources[0].dtype)) &&
         fits(p.dpartial.dtype);
}

inline void read_backward(const ReadBackwardParams& p, const ReadBackwardScratch& w, int64_t begin,
                          int64_t end) {
  if (w.dquery != nullptr) {
    fill_zeros(w.dquery, whole_pieces(p.R));
    fill_zeros(w.recent_query, whole_pieces(p.R));
  }
  if (w.dnorm_weight != nullptr) {
    fill_zeros(w.dnorm_weight, whole_pieces(p.D));
    fill_zeros(w.recent_norm, whole_pieces(p.D));
  }
  if (read_backward_rows_are(p, DType::kFloat32)) {
    return read_backward_tokens<Float32>(p, w, begin, end);
  }
  // dh is read from the beginning and from the key slice on: the split order allows no other step.
  if (read_backward_rows_are(p, DType::kBFloat16) && (p.D - p.R) % kStep == 0) {
    return read_backward_tokens<BFloat16>(p, w, begin, end);
  }
  if (read_backward_rows_are(p, DType::kFloat16)) {
    return read_backward_tokens<Float16>(p, w, begin, end);
  }
  read_backward_tokens<AnyFloat>(p, w, begin, end);
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_READ_BACKWARD_H_
