// read: one reading site, forward, for a range of tokens.
//
//   partial'  = partial + updates, summed in float32, rounded to the dtype of partial_out
//   terms     z_0 = phase1_out, z_1..z_N = sources, z_last = partial'    (those given; K of them)
//   r_j       = rsqrt(mean(k_j^2) + eps)              k_j: the last R coordinates of z_j
//   logit_j   = phase1_lse for the phase-1 term, else scale * r_j * <u, k_j>
//   p         = softmax_j(logit)          h = sum_j p_j z_j
//   x         = h,  or  h * rsqrt(mean(h^2) + norm_eps) * g       (in float8: see quantize.h)
//
// A token's rows come from memory once: the sum is kept in its storage dtype in scratch, and the
// second visit, for the mixture, finds everything in the caches. Bytes from and to memory: K + 1
// units of D elements, one more for each update and one for partial'. Statistics and sums are
// float32; nothing depends on other tokens. Saved for the backward: logits, inv_rms, mix_inv_rms.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_READ_H_
#define FLASH_ATTN_RES_CPU_KERNELS_READ_H_

#include "cpu/kernels/attend.h"
#include "cpu/kernels/dots.h"
#include "cpu/kernels/mixtures.h"
#include "cpu/kernels/params.h"
#include "cpu/kernels/quantize.h"
#include "cpu/kernels/softmax.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// Most terms of one read: phase 1, the sources and the partial sum.
inline constexpr int64_t kMaxTerms = kMaxSources + 2;

/// g in the order of the kernel, ones where there is no weight.
template <class E>
inline void load_norm_weight(const ConstMatrix& weight, int64_t D, float* g) {
  const Writer<Packed> out = {g};
  if (!given(weight)) {
    const Pair one = {broadcast(1.0f), broadcast(1.0f)};
    for_steps(0, D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS { out.put(i, one, part); });
    return;
  }
  const Reader<AnyFloat> in = reader<AnyFloat>(weight, 0);
  for_steps(0, D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    out.put(i, arranged<E>(in.get(i, part)), part);
  });
}

/// u in the order of the kernel, as one run.
template <class E>
inline void load_query(const ConstMatrix& query, int64_t R, float* u) {
  const Reader<Float32> in = reader<Float32>(query, 0);
  const Writer<Packed> out = {u};
  for_steps(0, R, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    out.put(i, arranged<E>(in.get(i, part)), part);
  });
}

/// Where the new sum goes, for its dtype: the two destinations have the same one.
FLASH_ATTN_RES_INLINE const Matrix& sum_of(const ReadParams& p) {
  return given(p.partial_out) ? p.partial_out : p.snapshot;
}

/// partial' of token t, written to partial_out, snapshot and `total`, in the dtype of the sum.
template <class E>
inline void add_updates(const ReadParams& p, int64_t t, const Writer<E>& total) {
  Reader<E> addend[1 + kMaxUpdates];  // rows of D
  int count = 0;
  if (given(p.partial)) {
    addend[count++] = reader<E>(p.partial, t);
  }
  for (int64_t i = 0; i < p.num_updates; ++i) {
    addend[count++] = reader<E>(p.updates[i], t);
  }
  Writer<E> out[2];
  int copies = 0;
  if (given(p.partial_out)) {
    out[copies++] = writer<E>(p.partial_out, t, p.stream);
  }
  if (given(p.snapshot)) {
    out[copies++] = writer<E>(p.snapshot, t, p.stream);
  }
  for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    addend[0].prefetch(i);
    Pair sum = addend[0].get(i, part);
    for (int a = 1; a < count; ++a) {
      addend[a].prefetch(i);
      sum = add(sum, addend[a].get(i, part));
    }
    for (int c = 0; c < copies; ++c) {
      out[c].put(i, sum, part);
    }
    total.put(i, sum, part);
  });
}

template <class E>
inline void read_tokens(const ReadParams& p, const ReadScratch& w, int64_t begin, int64_t end) {
  const int64_t key_start = p.D - p.R;
  const int64_t first_key = given(p.phase1_out) ? 1 : 0;  // the phase-1 term has no key
  const int64_t num_keys = p.K - first_key;
  Reader<E> z[kMaxTerms];    // (K) rows of D
  Reader<E> key[kMaxTerms];  // (K) rows of R; the phase-1 term's is not used
  const bool quantized = given(p.x_scale);
  const Matrix x_row = {w.x, 1, p.D, p.D, DType::kFloat32};
  if (p.normed) {
    load_norm_weight<E>(p.norm_weight, p.D, w.norm_weight);
  }
  if (given(p.query)) {
    load_query<E>(p.query, p.R, w.query);
  }
  const Reader<Packed> u = {w.query};
  const Reader<Packed> g = {w.norm_weight};
  const Reader<Packed> mix_in = {w.mix};
  const Writer<Packed> mix_out = {w.mix};

  for (int64_t t = begin; t < end; ++t) {
    int64_t j = 0;
    if (given(p.phase1_out)) {
      z[j++] = reader<E>(p.phase1_out, t);
    }
    for (int64_t n = 0; n < p.N; ++n) {
      z[j++] = source_reader<E>(p.sources, p.source_scales, n, t);
    }
    if (given(sum_of(p))) {
      const Matrix total = {w.total, 1, p.D, 0, sum_of(p).dtype};
      add_updates<E>(p, t, writer<E>(total, 0, false));
      z[j++] = held<E>(total, 0);
    } else if (given(p.partial)) {
      z[j++] = reader<E>(p.partial, t);
    }
    for (j = first_key; j < p.K; ++j) {
      key[j] = z[j].from(key_start);
    }
    // The rows of the next token that the dot products do not fetch are fetched with the mixture:
    // the phase-1 term, and every other key row.
    const Reader<E> phase1 = z[0];
    const int64_t num_rest = num_keys / 2;
    const auto fetch_rest = [&](int64_t i) FLASH_ATTN_RES_ALWAYS {
      if (first_key == 1) {
        phase1.prefetch(i);
      }
      for (int64_t r = 0; r < num_rest; ++r) {
        z[first_key + 1 + 2 * r].prefetch(i);
      }
    };

    // logits (K) and inv_rms (K)
    if (first_key == 1) {
      w.logits[0] = float_at(p.phase1_lse, 0, t);
      w.inv_rms[0] = 0.0f;
    }
    if (given(p.query)) {
      dots<Sweep::kFirstWithSquares>(u, key + first_key, num_keys, p.R, w.logits + first_key,
                                     w.inv_rms + first_key);
    } else if (num_keys == 1) {
      // A single term: its probability is 1 whatever the query.
      w.inv_rms[first_key] = square_sum(key[first_key], p.R);
      w.logits[0] = 0.0f;
    }
    for (j = first_key; j < p.K; ++j) {
      w.inv_rms[j] = inverse_rms(w.inv_rms[j], p.R, p.eps);
      w.logits[j] = given(p.query) ? w.logits[j] * (p.scale * w.inv_rms[j]) : 0.0f;
    }
    softmax_rows(w.logits, 1, p.K, w.probs, nullptr);
    for (j = 0; j < p.K; ++j) {
      if (given(p.logits)) {
        put_float(p.logits, t, j, w.logits[j]);
      }
      if (given(p.inv_rms)) {
        put_float(p.inv_rms, t, j, w.inv_rms[j]);
      }
      if (given(p.probs)) {
        put_float(p.probs, t, j, w.probs[j]);
      }
    }

    const Writer<E> x = quantized ? writer<E>(x_row, 0, false) : writer<E>(p.x, t, p.stream);
    if (!p.normed) {
      if (!given(p.mix)) {
        for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
          Pair h[1];
          fetch_rest(i);
          mixture_at<1>(z, p.K, w.probs, i, part, h);
          x.put(i, h[0], part);
        });
      } else {
        const Writer<E> mix = writer<E>(p.mix, t, p.stream);
        for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
          Pair h[1];
          fetch_rest(i);
          mixture_at<1>(z, p.K, w.probs, i, part, h);
          x.put(i, h[0], part);
          mix.put(i, h[0], part);
        });
      }
      if (quantized) {
        quantize_row(w.x, p.D, p.x, p.x_scale, p.power_of_two, t);
      }
      continue;
    }

    const Writer<E> mix = given(p.mix) ? writer<E>(p.mix, t, p.stream) : x;
    const auto mix_step = [&](int64_t i, auto part, Pair& square) FLASH_ATTN_RES_ALWAYS {
      Pair h[1];
      fetch_rest(i);
      mixture_at<1>(z, p.K, w.probs, i, part, h);
      if (given(p.mix)) {
        mix.put(i, h[0], part);
      }
      if (p.round_mix) {
        h[0] = rounded<E>(h[0], p.mix_dtype);
      }
      square = fma(h[0], h[0], square);
      mix_out.put(i, h[0], part);
    };
    const float square_sum_h = reduce_add(sum_by_runs(p.D, mix_step));
    const float rh = inverse_rms(square_sum_h, p.D, p.norm_eps);
    if (given(p.mix_inv_rms)) {
      put_float(p.mix_inv_rms, 0, t, rh);
    }
    for_steps(0, p.D, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
      x.put(i, mul(mul(broadcast(rh), mix_in.get(i, part)), g.get(i, part)), part);
    });
    if (quantized) {
      quantize_row(w.x, p.D, p.x, p.x_scale, p.power_of_two, t);
    }
  }
  if (p.stream) {
    stream_fence();
  }
}

/// Whether every row that a read touches has this dtype.
inline bool read_rows_are(const ReadParams& p, DType dtype) {
  // A quantised x is written as float32 first.
  bool same = (given(p.x_scale) ? DType::kFloat32 : p.x.dtype) == dtype;
  same = same && (!p.round_mix || p.mix_dtype == dtype);
  same = same && (!given(p.phase1_out) || p.phase1_out.dtype == dtype);
  same = same && (p.N == 0 || (p.sources[0].dtype == dtype && p.source_scales == nullptr));
  same = same && (!given(p.partial) || p.partial.dtype == dtype);
  same = same && (!given(p.partial_out) || p.partial_out.dtype == dtype);
  same = same && (!given(p.snapshot) || p.snapshot.dtype == dtype);
  same = same && (!given(p.mix) || p.mix.dtype == dtype);
  for (int64_t i = 0; i < p.num_updates; ++i) {
    same = same && p.updates[i].dtype == dtype;
  }
  return same;
}

inline void read(const ReadParams& p, const ReadScratch& w, int64_t begin, int64_t end) {
  if (read_rows_are(p, DType::kFloat32)) {
    return read_tokens<Float32>(p, w, begin, end);
  }
  if (read_rows_are(p, DType::kBFloat16)) {
    return read_tokens<BFloat16>(p, w, begin, end);
  }
  if (read_rows_are(p, DType::kFloat16)) {
    return read_tokens<Float16>(p, w, begin, end);
  }
  read_tokens<AnyFloat>(p, w, begin, end);
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_READ_H_
