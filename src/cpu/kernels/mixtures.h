// Weighted sums of rows, of one token.
//
//   mixture     h_s = sum_n p_sn v_n
//   gradient    dv_n = [old_n] + sum_s w_sn dh_s + [key] (sum_s c_sn u_s + e_n k_n)
//   du          du_s += sum_n c_sn k_n
//
// All three are small matrix products over a row: a tile of results is held in registers while the
// inner index runs, so that one load (and conversion) of an input serves the whole tile.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_MIXTURES_H_
#define FLASH_ATTN_RES_CPU_KERNELS_MIXTURES_H_

#include "cpu/kernels/params.h"
#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// Rows of one tile of results. Written to memory as they are computed they would be that many
/// streams of partial cache lines, which flushes the write-combining buffers early (measured: twice
/// the time); so a tile goes to a buffer in L1, and from there row after row.
inline constexpr int kTileRows = 4;

/// A step of two whole cache lines needs no such buffer.
template <class E>
constexpr bool tiles_go_out_directly() {
  if constexpr (__is_same(E, AnyFloat)) {
    return false;
  } else {
    return kStep * E::kBytes >= 128;
  }
}

/// The results of one tile: kTileRows rows of a piece.
struct TileBuffer {
  alignas(64) float data[kTileRows * kPiece];

  FLASH_ATTN_RES_INLINE float* row(int64_t r) { return data + r * kPiece; }
  FLASH_ATTN_RES_INLINE Writer<Packed> writer(int64_t r) { return {row(r)}; }
  /// Writes `width` elements of row r out.
  template <class E>
  FLASH_ATTN_RES_INLINE void flush(int64_t r, const Writer<E>& out, int64_t width) {
    const Reader<Packed> in = {row(r)};
    for_steps(0, width, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
      out.put(i, in.get(i, part), part);
    });
  }
};

/// h_a += p[a * N + n] v_n for kCount sources from n on, or = where n is the first.
template <int A, int kCount, class Ev, class Part>
FLASH_ATTN_RES_INLINE void mix_sources(const Reader<Ev>* v, int64_t n, int64_t N, const float* p,
                                       int64_t i, Part part, bool first, Pair (&h)[A]) {
#pragma GCC unroll 8
  for (int b = 0; b < kCount; ++b) {
    const Pair vn = v[n + b].get(i, part);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const Vec weight = broadcast(p[a * N + n + b]);
      h[a] = first && b == 0 ? mul(weight, vn) : fma(weight, vn, h[a]);
    }
  }
}

/// h_a = sum_n p[a * N + n] v_n at elements [i, i + kStep), for A queries. The first product is not
/// added to zero, so that a single source with p = 1 comes out bit for bit.
template <int A, class Ev, class Part>
FLASH_ATTN_RES_INLINE void mixture_at(const Reader<Ev>* v, int64_t N, const float* p, int64_t i,
                                      Part part, Pair (&h)[A]) {
  int64_t n = 1;
  if (N >= 4) {
    mix_sources<A, 4>(v, 0, N, p, i, part, true, h);
    n = 4;
  } else {
    mix_sources<A, 1>(v, 0, N, p, i, part, true, h);
  }
  for (; n + 4 <= N; n += 4) {
    mix_sources<A, 4>(v, n, N, p, i, part, false, h);
  }
  for (; n < N; ++n) {
    mix_sources<A, 1>(v, n, N, p, i, part, false, h);
  }
}

template <int A, class Ev, class Eo>
FLASH_ATTN_RES_INLINE void mix_tile(const Reader<Ev>* v, int64_t N, const float* p,
                                    const Writer<Eo>* out, int64_t begin, int64_t end) {
  for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair h[A];
    mixture_at<A>(v, N, p, i, part, h);
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      out[a].put(i, h[a], part);
    }
  });
}

/// out_s = sum_n p_sn v_n for S queries, elements [start + begin, start + begin + width) of out,
/// from the piece of packed rows that begins at `begin`.
template <class Eo>
inline void mix_piece(const float* packed, int64_t N, const float* p, const Writer<Eo>* out,
                      int64_t S, int64_t start, int64_t begin, int64_t width) {
  TileBuffer buffer;
  Writer<Packed> held[kTileRows];
  for (int r = 0; r < kTileRows; ++r) {
    held[r] = buffer.writer(r);
  }
  Reader<Packed> v[kMaxSources];  // (N)
  for (int64_t n = 0; n < N; ++n) {
    v[n] = packed_piece(packed, N, n, begin);
  }
  int64_t s = 0;
  for (; s + kTileRows <= S; s += kTileRows) {
    if constexpr (tiles_go_out_directly<Eo>()) {
      Writer<Eo> direct[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        direct[r] = out[s + r].from(start + begin);
      }
      mix_tile<kTileRows>(v, N, p + s * N, direct, 0, width);
    } else {
      mix_tile<kTileRows>(v, N, p + s * N, held, 0, width);
      for (int r = 0; r < kTileRows; ++r) {
        buffer.flush(r, out[s + r].from(start + begin), width);
      }
    }
  }
  for (; s < S; ++s) {
    const Writer<Eo> row = out[s].from(start + begin);
    mix_tile<1>(v, N, p + s * N, &row, 0, width);
  }
}

/// Fetches a piece of the next token's rows that packing with Fetch::kEven leaves out.
template <class Ev>
FLASH_ATTN_RES_INLINE void fetch_odd(const Reader<Ev>* rows, int64_t N, int64_t begin,
                                     int64_t width) {
  for (int64_t n = 1; n < N; n += 2) {
    fetch_row(rows[n].from(begin), width);
  }
}

/// The inputs of dv, for all rows n of one token. Factors are indexed [s * N + n].
template <class Ev, class Es>
struct GradientRows {
  int64_t S;                 // queries
  int64_t N;                 // distance between the factors of two queries
  const Reader<Packed>* dh;  // (S), or null: no dh term
  const float* dh_factor;    // (S,N)
  const Reader<Packed>* u;   // (S), or null: not in the key slice
  const float* u_factor;     // (S,N)
  const Reader<Ev>* v;       // (N)
  const float* key_factor;   // (N)
  const Reader<Es>* old;     // (N), or null: overwrite
  const Writer<Es>* dv;      // (N)
  bool fetch_odd;            // fetch the next token's rows v whose term is odd, where S is 1
  int64_t term;              // the term that v[0] is
};

template <int B, class Ev, class Es, class Eo>
FLASH_ATTN_RES_INLINE void gradient_tile(const GradientRows<Ev, Es>& rows, int64_t n,
                                         const Writer<Eo>* results, int64_t begin, int64_t end) {
  // Local copies: the stores below might change the originals for all the compiler knows.
  const int64_t S = rows.S;
  const int64_t N = rows.N;
  const Reader<Packed>* const dh = rows.dh;
  const float* const dh_factor = rows.dh_factor + n;
  const Reader<Packed>* const u = rows.u;
  const float* const u_factor = rows.u_factor + n;
  const bool with_old = rows.old != nullptr;
  const bool fetch = B == 1 && rows.fetch_odd && !fetches(Fetch::kEven, rows.term + n);
  Reader<Ev> v[B];
  Reader<Es> old[B];
  Writer<Eo> dv[B];
  Vec key_factor[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    dv[b] = results[b];
    v[b] = rows.v[n + b];
    old[b] = with_old ? rows.old[n + b] : Reader<Es>{};
    key_factor[b] = broadcast(u != nullptr ? rows.key_factor[n + b] : 0.0f);
  }
  for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair g[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      g[b] = zero_pair();
      if (fetch) {
        v[b].prefetch(i);
      }
      if (with_old) {
        old[b].prefetch(i);
        g[b] = old[b].get(i, part);
      }
    }
    if (u != nullptr) {
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        g[b] = fma(key_factor[b], v[b].get(i, part), g[b]);
      }
      for (int64_t s = 0; s < S; ++s) {
        const Pair us = u[s].get(i, part);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
          g[b] = fma(broadcast(u_factor[s * N + b]), us, g[b]);
        }
      }
    }
    if (dh != nullptr) {
      for (int64_t s = 0; s < S; ++s) {
        const Pair ds = dh[s].get(i, part);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
          g[b] = fma(broadcast(dh_factor[s * N + b]), ds, g[b]);
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      dv[b].put(i, g[b], part);
    }
  });
}

/// dv_n for n in [0, count_n), elements [0, count). With more than one query, count is at most
/// kPiece; with one, a tile of several rows has nothing to share, and rows go out directly.
template <class Ev, class Es>
inline void gradients(const GradientRows<Ev, Es>& rows, int64_t count_n, int64_t count) {
  int64_t n = 0;
  if (rows.S > 1) {
    TileBuffer buffer;
    Writer<Packed> results[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      results[r] = buffer.writer(r);
    }
    for (; n + kTileRows <= count_n; n += kTileRows) {
      if constexpr (tiles_go_out_directly<Es>()) {
        gradient_tile<kTileRows>(rows, n, rows.dv + n, 0, count);
      } else {
        gradient_tile<kTileRows>(rows, n, results, 0, count);
        for (int r = 0; r < kTileRows; ++r) {
          buffer.flush(r, rows.dv[n + r], count);
        }
      }
    }
  }
  for (; n < count_n; ++n) {
    gradient_tile<1>(rows, n, rows.dv + n, 0, count);
  }
}

template <int A, class Ev>
FLASH_ATTN_RES_INLINE void accumulate_tile(const Reader<Ev>* v, int64_t N, const float* factor,
                                           int64_t factor_stride, float* du, int64_t du_stride,
                                           int64_t begin, int64_t end) {
  for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair sum[A];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      sum[a] = zero_pair();
    }
    for (int64_t n = 0; n < N; ++n) {
      const Pair vn = v[n].get(i, part);
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        sum[a] = fma(broadcast(factor[a * factor_stride + n]), vn, sum[a]);
      }
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const Pair held = Reader<Packed>{du + a * du_stride}.get(i, part);
      Writer<Packed>{du + a * du_stride}.put(i, add(held, sum[a]), part);
    }
  });
}

/// du_s += sum_n factor[s * factor_stride + n] v_n for S rows of du, elements [begin, end). The sum
/// over n is made first, and then added: one rounding at the size of du.
template <class Ev>
inline void accumulate(const Reader<Ev>* v, int64_t N, const float* factor, int64_t factor_stride,
                       float* du, int64_t du_stride, int64_t S, int64_t begin, int64_t end) {
  int64_t s = 0;
  for (; s + 4 <= S; s += 4) {
    accumulate_tile<4>(v, N, factor + s * factor_stride, factor_stride, du + s * du_stride,
                       du_stride, begin, end);
  }
  if (s + 2 <= S) {
    accumulate_tile<2>(v, N, factor + s * factor_stride, factor_stride, du + s * du_stride,
                       du_stride, begin, end);
    s += 2;
  }
  if (s < S) {
    accumulate_tile<1>(v, N, factor + s * factor_stride, factor_stride, du + s * du_stride,
                       du_stride, begin, end);
  }
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_MIXTURES_H_
