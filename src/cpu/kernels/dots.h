// Dot products of a few rows with a few rows, of one token:
//
//   out[a, b] = <x_a, v_b>        squares[b] = <v_b, v_b>
//
// Each dot product is one chain of float32 vector sums in the order of the elements, so that its
// bits do not depend on the tile that computes it nor on the number of tokens. Tiles give the
// independent chains that hide the latency of fma, and let one load (and conversion) serve several
// products. Rows are cut into pieces that fit in L1 together, with the sums held in between.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_
#define FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_

#include "cpu/kernels/params.h"
#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// Which visit of the rows v this is: the first one fetches the next token's rows as it goes.
enum class Sweep { kFirst, kFirstWithSquares, kAgain };

/// Rows whose sums are held at once, of x and of v.
inline constexpr int64_t kDotGroup = 8;

template <int A, int B, Sweep kSweep, class Ex, class Ev>
FLASH_ATTN_RES_INLINE void dot_tile(const Reader<Ex>* x, const Reader<Ev>* v, int64_t begin,
                                    int64_t end, Vec* sums, Vec* squares) {
  constexpr bool kSquares = kSweep == Sweep::kFirstWithSquares;
  Vec sum[A][B];
  Vec square[B];
  Reader<Ex> xr[A];
  Reader<Ev> vr[B];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
    xr[a] = x[a];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sum[a][b] = sums[a * kDotGroup + b];
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    vr[b] = v[b];
    square[b] = squares[b];
  }
  for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    Pair xi[A];
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      xi[a] = xr[a].get(i, part);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      if constexpr (kSweep != Sweep::kAgain) {
        vr[b].prefetch(i);
      }
      const Pair vi = vr[b].get(i, part);
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        sum[a][b] = fma(xi[a].lo, vi.lo, sum[a][b]);
        sum[a][b] = fma(xi[a].hi, vi.hi, sum[a][b]);
      }
      if constexpr (kSquares) {
        square[b] = fma(vi.lo, vi.lo, square[b]);
        square[b] = fma(vi.hi, vi.hi, square[b]);
      }
    }
  });
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sums[a * kDotGroup + b] = sum[a][b];
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    squares[b] = square[b];
  }
}

/// One column of tiles: A rows of x (1 <= A <= kDotGroup) with B rows of v.
template <int B, Sweep kSweep, class Ex, class Ev>
inline void dot_column(const Reader<Ex>* x, int64_t A, const Reader<Ev>* v, int64_t begin,
                       int64_t end, Vec* sums, Vec* squares) {
  // Only the first tile of the column visits v for the first time.
  constexpr Sweep kAgain = Sweep::kAgain;
  int64_t a = 0;
  if (A >= 4) {
    dot_tile<4, B, kSweep>(x, v, begin, end, sums, squares);
    a = 4;
  } else if (A >= 2) {
    dot_tile<2, B, kSweep>(x, v, begin, end, sums, squares);
    a = 2;
  } else {
    dot_tile<1, B, kSweep>(x, v, begin, end, sums, squares);
    a = 1;
  }
  if (A - a >= 4) {
    dot_tile<4, B, kAgain>(x + a, v, begin, end, sums + a * kDotGroup, squares);
    a += 4;
  }
  if (A - a >= 2) {
    dot_tile<2, B, kAgain>(x + a, v, begin, end, sums + a * kDotGroup, squares);
    a += 2;
  }
  if (A - a >= 1) {
    dot_tile<1, B, kAgain>(x + a, v, begin, end, sums + a * kDotGroup, squares);
  }
}

/// At most kDotGroup rows of x and of v.
template <Sweep kSweep, class Ex, class Ev>
inline void dot_group(const Reader<Ex>* x, int64_t jump, int64_t A, const Reader<Ev>* v, int64_t B,
                      int64_t count, float* out, int64_t out_stride, float* squares) {
  Vec sums[kDotGroup * kDotGroup];  // (A,B), rows kDotGroup apart
  Vec square_sums[kDotGroup];
  for (int64_t b = 0; b < B; ++b) {
    square_sums[b] = broadcast(0.0f);
    for (int64_t a = 0; a < A; ++a) {
      sums[a * kDotGroup + b] = broadcast(0.0f);
    }
  }
  // A single row of x is visited once anyway.
  const int64_t piece = A == 1 && jump == 0 ? count : kPiece;
  Reader<Ex> xp[kDotGroup];
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t end = begin + piece < count ? begin + piece : count;
    for (int64_t a = 0; a < A; ++a) {
      xp[a] = x[a];
      xp[a].data += begin / kPiece * jump;
    }
    int64_t b = 0;
    for (; A == 1 && b + 4 <= B; b += 4) {
      dot_tile<1, 4, kSweep>(xp, v + b, begin, end, sums + b, square_sums + b);
    }
    for (; b + 2 <= B; b += 2) {
      dot_column<2, kSweep>(xp, A, v + b, begin, end, sums + b, square_sums + b);
    }
    if (b < B) {
      dot_column<1, kSweep>(xp, A, v + b, begin, end, sums + b, square_sums + b);
    }
  }
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t b = 0; b < B; ++b) {
      out[a * out_stride + b] = reduce_add(sums[a * kDotGroup + b]);
    }
  }
  if constexpr (kSweep == Sweep::kFirstWithSquares) {
    for (int64_t b = 0; b < B; ++b) {
      squares[b] = reduce_add(square_sums[b]);
    }
  }
}

/// out (A,B) row-major; squares (B), written with Sweep::kFirstWithSquares only. `jump` is the
/// number of bytes that a row of x skips after each piece: 0 for rows in one run.
template <Sweep kSweep, class Ex, class Ev>
inline void dots(const Reader<Ex>* x, int64_t jump, int64_t A, const Reader<Ev>* v, int64_t B,
                 int64_t count, float* out, float* squares) {
  for (int64_t b = 0; b < B; b += kDotGroup) {
    const int64_t width = B - b < kDotGroup ? B - b : kDotGroup;
    dot_group<kSweep>(x, jump, A < kDotGroup ? A : kDotGroup, v + b, width, count, out + b, B,
                      squares + b);
    for (int64_t a = kDotGroup; a < A; a += kDotGroup) {
      dot_group<Sweep::kAgain>(x + a, jump, A - a < kDotGroup ? A - a : kDotGroup, v + b, width,
                               count, out + a * B + b, B, squares + b);
    }
  }
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_
