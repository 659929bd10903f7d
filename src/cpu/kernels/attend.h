// attend: S queries over N sources, forward, for a range of tokens.
//
//   r_n       = rsqrt(mean(k_n^2) + eps)                  k_n: the last R coordinates of v_n
//   logit_sn  = scale * r_n * <u_s, k_n>
//   p_s       = softmax_n(logit_s)        lse_s = logsumexp_n(logit_s)
//   out_s     = sum_n p_sn v_n
//
// A token's sources are visited twice: for the dot products, from memory, and for the mixture, from
// a packed float32 copy that the first visit leaves in L2 (rows of equal tensors lie a power of two
// bytes apart more often than not, and would evict each other; see kPiece). The mixture runs piece
// by piece within the next token's dot products: results drain while those run. Bytes from and to
// memory: N * D elements read, S * D written. Statistics and sums are float32; nothing depends on
// other tokens. Saved for the backward: logits, inv_rms, lse.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_ATTEND_H_
#define FLASH_ATTN_RES_CPU_KERNELS_ATTEND_H_

#include "cpu/kernels/dots.h"
#include "cpu/kernels/mixtures.h"
#include "cpu/kernels/params.h"
#include "cpu/kernels/softmax.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// 1 / sqrt(square_sum / count + eps)
FLASH_ATTN_RES_INLINE float inverse_rms(float square_sum, int64_t count, float eps) {
  return 1.0f / __builtin_sqrtf(square_sum / static_cast<float>(count) + eps);
}

/// From the products of token t, in w.logits, and the sums of squares, in w.inv_rms, to its
/// probabilities; stores what the caller asked for.
inline void attend_statistics(const AttendParams& p, const AttendScratch& w, int64_t t) {
  for (int64_t n = 0; n < p.N; ++n) {
    w.inv_rms[n] = inverse_rms(w.inv_rms[n], p.R, p.eps);
    if (given(p.inv_rms)) {
      put_float(p.inv_rms, t, n, w.inv_rms[n]);
    }
  }
  for (int64_t s = 0; s < p.S; ++s) {
    for (int64_t n = 0; n < p.N; ++n) {
      w.logits[s * p.N + n] *= p.scale * w.inv_rms[n];
    }
  }
  softmax_rows(w.logits, p.S, p.N, w.probs, w.lse);
  for (int64_t s = 0; s < p.S; ++s) {
    put_float(p.lse, s, t, w.lse[s]);
  }
  for (int64_t i = 0; given(p.logits) && i < p.S * p.N; ++i) {
    put_float(p.logits, t, i, w.logits[i]);
  }
  for (int64_t i = 0; given(p.probs) && i < p.S * p.N; ++i) {
    put_float(p.probs, t, i, w.probs[i]);
  }
}

/// A single query has but one use for each source, for which a packed copy would be made in vain:
/// both visits are of the rows themselves. It has the bits that it would have among others.
template <class Ev, class Eo>
inline void attend_tokens_of_one(const AttendParams& p, const AttendScratch& w, int64_t begin,
                                 int64_t end) {
  const int64_t key_start = p.D - p.R;
  Reader<Ev> v[kMaxSources];    // (N) rows of D
  Reader<Ev> key[kMaxSources];  // (N) rows of R
  const Reader<Float32> query = reader<Float32>(p.queries, 0);
  pack<Ev>(&query, 1, p.R, w.queries);
  const Reader<Packed> u = {w.queries};
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t n = 0; n < p.N; ++n) {
      v[n] = source_reader<Ev>(p.sources, p.source_scales, n, t);
      key[n] = v[n].from(key_start);
    }
    dots_of_one<Sweep::kFirstWithSquares>(u, key, p.N, p.R, w.logits, w.inv_rms);
    attend_statistics(p, w, t);
    const Writer<Eo> out = writer<Eo>(p.out[0], t, p.stream);
    for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
      Pair h[1];
      for (int64_t n = 1; n < p.N; n += 2) {
        v[n].prefetch(i);  // the dot products fetch the others
      }
      mixture_at<1>(v, p.N, w.probs, i, part, h);
      out.put(i, h[0], part);
    });
  }
  if (p.stream) {
    stream_fence();
  }
}

template <class Ev, class Eo>
inline void attend_tokens(const AttendParams& p, const AttendScratch& w, int64_t begin,
                          int64_t end) {
  const int64_t key_start = p.D - p.R;
  const bool stream = p.stream;
  Reader<Float32> u[kMaxQueries];  // (S) rows of R
  Reader<Ev> v[kMaxSources];       // (N) rows of D
  Reader<Ev> key[kMaxSources];     // (N) rows of R
  Writer<Eo> out[kMaxQueries];     // (S) rows of D
  for (int64_t s = 0; s < p.S; ++s) {
    u[s] = reader<Float32>(p.queries, s);
  }
  pack<Ev>(u, p.S, p.R, w.queries);
  for (int64_t t = begin; t < end; ++t) {
    // The mixture of the token before, just before this token's rows take the place of its own.
    const auto leave_plain = [&](int64_t i, int64_t width) FLASH_ATTN_RES_ALWAYS {
      fetch_odd(v, p.N, i, width);
      if (t > begin) {
        mix_piece(w.v_plain, p.N, w.probs, out, p.S, 0, i, width);
      }
    };
    const auto leave_key = [&](int64_t i, int64_t width) FLASH_ATTN_RES_ALWAYS {
      if (t > begin) {
        mix_piece(w.v_key, p.N, w.probs, out, p.S, key_start, i, width);
      }
    };
    for (int64_t n = 0; n < p.N; ++n) {
      v[n] = source_reader<Ev>(p.sources, p.source_scales, n, t);
      key[n] = v[n].from(key_start);
    }

    pack<Ev, Fetch::kEven>(v, p.N, key_start, w.v_plain, leave_plain);
    dots_packing<Sweep::kFirstWithSquares>(w.queries, p.S, key, p.N, p.R, w.v_key, w.logits,
                                           w.inv_rms, leave_key);
    for (int64_t s = 0; s < p.S; ++s) {
      out[s] = writer<Eo>(p.out[s], t, stream);
    }
    attend_statistics(p, w, t);
  }
  if (begin < end) {
    const auto mix_last = [&](const float* packed, int64_t start, int64_t count) {
      for (int64_t i = 0; i < count; i += kPiece) {
        const int64_t width = count - i < kPiece ? count - i : kPiece;
        mix_piece(packed, p.N, w.probs, out, p.S, start, i, width);
      }
    };
    mix_last(w.v_plain, 0, key_start);
    mix_last(w.v_key, key_start, p.R);
  }
  if (stream) {
    stream_fence();
  }
}

template <class Ev, class Eo>
inline void attend_of(const AttendParams& p, const AttendScratch& w, int64_t begin, int64_t end) {
  if (p.S == 1) {
    return attend_tokens_of_one<Ev, Eo>(p, w, begin, end);
  }
  attend_tokens<Ev, Eo>(p, w, begin, end);
}

inline void attend(const AttendParams& p, const AttendScratch& w, int64_t begin, int64_t end) {
  const DType dtype = p.sources[0].dtype;
  const bool uniform = p.out[0].dtype == dtype && p.source_scales == nullptr;
  if (uniform && dtype == DType::kFloat32) {
    return attend_of<Float32, Float32>(p, w, begin, end);
  }
  if (uniform && dtype == DType::kBFloat16) {
    return attend_of<BFloat16, BFloat16>(p, w, begin, end);
  }
  if (uniform && dtype == DType::kFloat16) {
    return attend_of<Float16, Float16>(p, w, begin, end);
  }
  if (p.source_scales != nullptr && dtype == DType::kFloat16) {
    return attend_of<Scaled<Float16>, AnyFloat>(p, w, begin, end);
  }
  if (p.source_scales != nullptr && dtype == DType::kFloat8E4M3) {
    return attend_of<Scaled<Float8>, AnyFloat>(p, w, begin, end);
  }
  attend_of<AnyFloat, AnyFloat>(p, w, begin, end);
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_ATTEND_H_
