// Dot products of a few rows with a few rows, of one token:
//
//   out[a, b] = <x_a, v_b>        squares[b] = <v_b, v_b>
//
// Each dot product is one chain of float32 vector sums in the order of the elements (two chains
// where there is a single x), broken after each piece or run, the parts summed, so that its bits do
// not depend on the tile that computes it nor on the number of tokens. Tiles give the independent
// chains that hide the latency of fma, and let one load serve several products. Rows are cut into
// pieces that fit in L1 together, with the sums held in between.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_
#define FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_

#include "cpu/kernels/params.h"
#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// Which visit of the rows v this is: the first one fetches the next token's rows as it goes.
enum class Sweep { kFirst, kFirstWithSquares, kAgain };

/// Rows whose sums are held at once, of x and of v.
inline constexpr int64_t kDotGroup = 8;

/// Whether the next token's rows are fetched step by step within the tiles, rather than row by row
/// between them, where the core waits for memory to take the requests: with steps of two whole
/// cache lines. With steps of one it was faster on one machine and slower on another (docs/cpu.md).
template <class E>
constexpr bool fetches_in_tiles() {
  if constexpr (kMayBeScaled<E>) {
    return false;
  } else {
    return kStep * E::kBytes >= 128;
  }
}

/// Whether the first tile packs the rows that it reads. Loads that may call a function, for which
/// the sums would leave their registers, are better done before.
template <class E>
constexpr bool packs_in_tiles() {
  return !kMayBeScaled<E> && !__is_same(E, Packed);
}

/// Products of A rows x with B rows v over [begin, end), added to sums, and with kSquares those of
/// v with themselves, added to squares. visit(b, i, v_i, part) is called with each step of row b.
template <int A, int B, bool kSquares, class Ex, class Ev, class Visit>
FLASH_ATTN_RES_INLINE void dot_tile(const Reader<Ex>* x, const Reader<Ev>* v, int64_t begin,
                                    int64_t end, Vec* sums, Vec* squares, Visit&& visit) {
  Vec sum[A][B];
  Vec square[B];
  Reader<Ex> xr[A];
  Reader<Ev> vr[B];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
    xr[a] = x[a];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sum[a][b] = broadcast(0.0f);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    vr[b] = v[b];
    square[b] = broadcast(0.0f);
  }
  for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    const auto row = [&](int b) FLASH_ATTN_RES_ALWAYS {
      const Pair vi = in_registers(vr[b].get(i, part));
      visit(b, i, vi, part);
      if constexpr (kSquares) {
        square[b] = fma(vi.lo, vi.lo, square[b]);
        square[b] = fma(vi.hi, vi.hi, square[b]);
      }
      return vi;
    };
    const auto multiply = [&](int a, int b, Pair xi, Pair vi) FLASH_ATTN_RES_ALWAYS {
      sum[a][b] = fma(xi.lo, vi.lo, sum[a][b]);
      sum[a][b] = fma(xi.hi, vi.hi, sum[a][b]);
    };
    if constexpr (A == 1) {  // no row of v is needed twice
      const Pair xi = in_registers(xr[0].get(i, part));
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        multiply(0, b, xi, row(b));
      }
    } else {
      Pair vi[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        vi[b] = row(b);
      }
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        const Pair xi = in_registers(xr[a].get(i, part));
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
          multiply(a, b, xi, vi[b]);
        }
      }
    }
  });
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sums[a * kDotGroup + b] = add(sums[a * kDotGroup + b], sum[a][b]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    if constexpr (kSquares) {
      squares[b] = add(squares[b], square[b]);
    }
  }
}

/// One column of tiles of a piece: A packed rows of x (1 <= A <= kDotGroup) with B rows, whose
/// packed copies are `copies`. Where the type says so, the first tile reads the rows themselves and
/// makes the copies; the other tiles read those. Half of the next token's rows are fetched with the
/// first tile, the others with the second.
template <int B, Sweep kSweep, class Ev>
inline void dot_column(const Reader<Packed>* x, int64_t A, const Reader<Ev>* rows,
                       const Writer<Packed>* copies, int64_t width, Vec* sums, Vec* squares) {
  constexpr bool kSquares = kSweep == Sweep::kFirstWithSquares;
  constexpr bool kPack = packs_in_tiles<Ev>();
  constexpr bool kFetch = fetches_in_tiles<Ev>();
  constexpr int kHalf = (B + 1) / 2;
  Reader<Ev> row[B];
  Writer<Packed> copy[B];
  Reader<Packed> v[B];
  for (int b = 0; b < B; ++b) {
    row[b] = rows[b];
    copy[b] = copies[b];
    v[b] = {copies[b].data};
  }
  const auto fetch_between = [&](int begin, int end) FLASH_ATTN_RES_ALWAYS {
    for (int b = begin; b < end; ++b) {
      fetch_row(row[b], width);
    }
  };
  const auto first = [&](int b, int64_t i, Pair vi, auto part) FLASH_ATTN_RES_ALWAYS {
    if (kPack) {
      copy[b].put(i, vi, part);
    }
    if (kFetch && b < kHalf) {
      row[b].prefetch(i);
    }
  };
  const auto second = [&](int b, int64_t i, Pair, auto) FLASH_ATTN_RES_ALWAYS {
    if (kFetch && b >= kHalf) {
      row[b].prefetch(i);
    }
  };
  const auto nothing = [](int, int64_t, Pair, auto) FLASH_ATTN_RES_ALWAYS {};
  // What the first tile reads.
  const auto* visited = [&]() FLASH_ATTN_RES_ALWAYS {
    if constexpr (kPack) {
      return row;
    } else {
      return v;
    }
  }();
  int64_t a = 0;
  if (A >= 4) {
    dot_tile<4, B, kSquares>(x, visited, 0, width, sums, squares, first);
    a = 4;
  } else if (A >= 2) {
    dot_tile<2, B, kSquares>(x, visited, 0, width, sums, squares, first);
    a = 2;
  } else {
    dot_tile<1, B, kSquares>(x, visited, 0, width, sums, squares, first);
    a = 1;
  }
  if (!kFetch) {
    fetch_between(0, kHalf);
  }
  if (A - a >= 4) {
    dot_tile<4, B, false>(x + a, v, 0, width, sums + a * kDotGroup, squares, second);
    if (!kFetch) {
      fetch_between(kHalf, B);
    }
  } else {
    if (A - a >= 2) {
      dot_tile<2, B, false>(x + a, v, 0, width, sums + a * kDotGroup, squares, nothing);
      a += 2;
    }
    if (A - a >= 1) {
      dot_tile<1, B, false>(x + a, v, 0, width, sums + a * kDotGroup, squares, nothing);
    }
    fetch_between(kHalf, B);
  }
}

/// Products of one packed row with B rows. A first sweep fetches the next token's rows b = 0, 2,
/// ...; the mixture or the gradients fetch the others. Each product has one chain for each half of
/// a pair: with a single row x there are too few products to hide the latency of fma otherwise.
template <int B, Sweep kSweep, class Ev>
FLASH_ATTN_RES_INLINE void dot_row(const Reader<Packed>& x, const Reader<Ev>* rows, int64_t count,
                                   float* out, float* squares) {
  constexpr bool kSquares = kSweep == Sweep::kFirstWithSquares;
  Reader<Ev> v[B];
  Pair total[B];
  Pair total_square[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    v[b] = rows[b];
    total[b] = zero_pair();
    total_square[b] = zero_pair();
  }
  for (int64_t begin = 0; begin < count; begin += kRun) {
    Pair sum[B];
    Pair square[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      sum[b] = zero_pair();
      square[b] = zero_pair();
    }
    const int64_t end = count - begin < kRun ? count : begin + kRun;
    for_steps(begin, end, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
      const Pair xi = x.get(i, part);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        if (kSweep != Sweep::kAgain && fetches(Fetch::kEven, b)) {
          v[b].prefetch(i);
        }
        const Pair vi = v[b].get(i, part);
        sum[b] = fma(xi, vi, sum[b]);
        if constexpr (kSquares) {
          square[b] = fma(vi, vi, square[b]);
        }
      }
    });
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      total[b] = add(total[b], sum[b]);
      total_square[b] = add(total_square[b], square[b]);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    out[b] = reduce_add(total[b]);
    if constexpr (kSquares) {
      squares[b] = reduce_add(total_square[b]);
    }
  }
}

/// out (B), and squares (B) with Sweep::kFirstWithSquares, of one packed row x and B rows v.
template <Sweep kSweep, class Ev>
inline void dots(const Reader<Packed>& x, const Reader<Ev>* v, int64_t B, int64_t count, float* out,
                 float* squares) {
  int64_t b = 0;
  // Four rows with their squares need two pairs of sums each, and the operands.
  if constexpr (kRegisters >= 24 || kSweep != Sweep::kFirstWithSquares) {
    for (; b + 4 <= B; b += 4) {
      dot_row<4, kSweep>(x, v + b, count, out + b, squares + b);
    }
  }
  for (; b + 2 <= B; b += 2) {
    dot_row<2, kSweep>(x, v + b, count, out + b, squares + b);
  }
  if (b < B) {
    dot_row<1, kSweep>(x, v + b, count, out + b, squares + b);
  }
}

/// <v, v>, summed in the order in which dots sums it.
template <class Ev>
inline float square_sum(const Reader<Ev>& v, int64_t count) {
  return reduce_add(sum_by_runs(count, [&](int64_t i, auto part, Pair& sum) FLASH_ATTN_RES_ALWAYS {
    v.prefetch(i);
    const Pair vi = v.get(i, part);
    sum = fma(vi, vi, sum);
  }));
}

/// <x, b - a>: where a and b share a large part, more exact than the difference of two products.
/// The first sweep fetches the next token's row a.
template <Sweep kSweep, class Ev>
inline float difference_dot(const Reader<Packed>& x, const Reader<Ev>& a, const Reader<Ev>& b,
                            int64_t count) {
  return reduce_add(sum_by_runs(count, [&](int64_t i, auto part, Pair& sum) FLASH_ATTN_RES_ALWAYS {
    if (kSweep != Sweep::kAgain) {
      a.prefetch(i);
    }
    const Pair ai = a.get(i, part);
    const Pair bi = b.get(i, part);
    sum = fma(x.get(i, part), Pair{sub(bi.lo, ai.lo), sub(bi.hi, ai.hi)}, sum);
  }));
}

/// At most kDotGroup packed rows of x with as many rows, one piece (see dot_column).
template <Sweep kSweep, class Ev>
inline void dot_piece(const Reader<Packed>* x, int64_t A, const Reader<Ev>* rows,
                      const Writer<Packed>* copies, int64_t B, int64_t width, Vec* sums,
                      Vec* squares) {
  int64_t b = 0;
  // Tiles of four by four hold sixteen sums, four squares, four pairs of v and one of x.
  if constexpr (kRegisters >= 32) {
    for (; b + 4 <= B; b += 4) {
      dot_column<4, kSweep>(x, A, rows + b, copies + b, width, sums + b, squares + b);
    }
  }
  for (; b + 2 <= B; b += 2) {
    dot_column<2, kSweep>(x, A, rows + b, copies + b, width, sums + b, squares + b);
  }
  if (b < B) {
    dot_column<1, kSweep>(x, A, rows + b, copies + b, width, sums + b, squares + b);
  }
}

/// out (A,B) row-major, and squares (B) with Sweep::kFirstWithSquares, of packed rows x and of rows
/// v that are packed on the way, as (pieces, B, kPiece) floats, for the sweeps that follow. Before
/// a piece of all rows is overwritten in `packed`, leave(begin, width) is called. The next token's
/// rows are fetched between the tiles of a piece or within them, which spreads the requests over
/// the time of the products. All at once, as a piece is packed, phase-1 calls took 7 to 15 %
/// longer.
template <Sweep kSweep, class Ev, class Leave>
inline void dots_packing(const float* x, int64_t A, const Reader<Ev>* v, int64_t B, int64_t count,
                         float* packed, float* out, float* squares, Leave&& leave) {
  Vec sums[kDotGroup * kDotGroup];  // (A,B), rows kDotGroup apart
  Vec square_sums[kDotGroup];
  Reader<Packed> xp[kDotGroup];
  Reader<Ev> piece[kDotGroup];
  Writer<Packed> copies[kDotGroup];
  Reader<Packed> again[kDotGroup];
  for (int64_t b0 = 0; b0 < B; b0 += kDotGroup) {
    const int64_t columns = B - b0 < kDotGroup ? B - b0 : kDotGroup;
    for (int64_t a0 = 0; a0 < A; a0 += kDotGroup) {
      const int64_t rows = A - a0 < kDotGroup ? A - a0 : kDotGroup;
      for (int64_t b = 0; b < columns; ++b) {
        square_sums[b] = broadcast(0.0f);
        for (int64_t a = 0; a < rows; ++a) {
          sums[a * kDotGroup + b] = broadcast(0.0f);
        }
      }
      for (int64_t begin = 0; begin < count; begin += kPiece) {
        const int64_t width = count - begin < kPiece ? count - begin : kPiece;
        if (a0 == 0 && b0 == 0) {
          leave(begin, width);
        }
        for (int64_t a = 0; a < rows; ++a) {
          xp[a] = packed_piece(x, A, a0 + a, begin);
        }
        for (int64_t b = 0; b < columns; ++b) {
          copies[b] = {packed + begin * B + (b0 + b) * kPiece};
          again[b] = {copies[b].data};
          piece[b] = v[b0 + b].from(begin);
        }
        if (a0 > 0) {
          dot_piece<Sweep::kAgain>(xp, rows, again, copies, columns, width, sums, square_sums);
          continue;
        }
        if constexpr (!packs_in_tiles<Ev>()) {
          pack_piece<Ev, Fetch::kNone>(v + b0, columns, begin, width, packed, B, b0);
        }
        dot_piece<kSweep>(xp, rows, piece, copies, columns, width, sums, square_sums);
      }
      for (int64_t b = 0; b < columns; ++b) {
        for (int64_t a = 0; a < rows; ++a) {
          out[(a0 + a) * B + b0 + b] = reduce_add(sums[a * kDotGroup + b]);
        }
        if (kSweep == Sweep::kFirstWithSquares && a0 == 0) {
          squares[b0 + b] = reduce_add(square_sums[b]);
        }
      }
    }
  }
}

/// B rows of v from row b on, for dots_of_one.
template <int B, Sweep kSweep, class Ev>
inline void dot_tile_of_one(const Reader<Packed>& x, const Reader<Ev>* v, int64_t b, int64_t count,
                            float* out, float* squares) {
  constexpr bool kSquares = kSweep == Sweep::kFirstWithSquares;
  Reader<Ev> row[B];
  for (int i = 0; i < B; ++i) {
    row[i] = v[b + i];
  }
  const auto fetch_even = [&](int r, int64_t i, Pair, auto) FLASH_ATTN_RES_ALWAYS {
    if (kSweep != Sweep::kAgain && fetches(Fetch::kEven, r)) {
      row[r].prefetch(i);
    }
  };
  Vec sums[B];
  Vec square_sums[B];
  for (int i = 0; i < B; ++i) {
    sums[i] = square_sums[i] = broadcast(0.0f);
  }
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = count - begin < kPiece ? count : begin + kPiece;
    dot_tile<1, B, kSquares>(&x, v + b, begin, end, sums, square_sums, fetch_even);
  }
  for (int i = 0; i < B; ++i) {
    out[b + i] = reduce_add(sums[i]);
    if (kSweep == Sweep::kFirstWithSquares) {
      squares[b + i] = reduce_add(square_sums[i]);
    }
  }
}

/// As dots_packing, with its bits, of a single packed row x, and packs nothing: the first sweep
/// fetches the next token's rows b = 0, 2, ....
template <Sweep kSweep, class Ev>
inline void dots_of_one(const Reader<Packed>& x, const Reader<Ev>* v, int64_t B, int64_t count,
                        float* out, float* squares) {
  int64_t b = 0;
  for (; b + 4 <= B; b += 4) {
    dot_tile_of_one<4, kSweep>(x, v, b, count, out, squares);
  }
  for (; b + 2 <= B; b += 2) {
    dot_tile_of_one<2, kSweep>(x, v, b, count, out, squares);
  }
  if (b < B) {
    dot_tile_of_one<1, kSweep>(x, v, b, count, out, squares);
  }
}

template <Sweep kSweep, class Ev>
inline void dots_packing(const float* x, int64_t A, const Reader<Ev>* v, int64_t B, int64_t count,
                         float* packed, float* out, float* squares) {
  dots_packing<kSweep>(x, A, v, B, count, packed, out, squares, [](int64_t, int64_t) {});
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_DOTS_H_
