// What both kinds of compute warps of phase 1 on Hopper share: the call, the products of P1, and
// where their sums go.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/hopper_pipeline.cuh"

namespace flash_attn_res::cuda::hopper {

struct AttendParams {
  RowTable<kSourcesMax> sources;  // N x [T, D]
  ScaleTable scales;              // of sources that have them
  RowTable<kQueriesMax> out;      // S x [T, D]
  const float* queries;           // [S, D]
  float* lse;                     // [S, T]
  float* logits;                  // [T, S * N], may be null
  float* inv_rms;                 // [T, N], may be null
  int* issued;                    // one counter, zero at the start; null without a window
  int64_t queries_stride, lse_stride, logits_stride, inv_rms_stride;
  int64_t tokens;
  int num_sources, num_queries, dim;
  float scale, eps;
  SourceLayout layout;  // of the sources
  bool half_out;        // out is float16, not bfloat16; the sources are not bfloat16
  Plan plan;
  SharedMap map;  // of plan and extents(); here it takes no registers

  FLASH_ATTN_RES_HOPPER_BOTH bool scaled() const { return layout.scale_columns > 0; }
  FLASH_ATTN_RES_HOPPER_BOTH Extents extents() const {
    return {.input_rows = num_sources,
            .result_rows = num_queries,
            .result_bytes = 2,
            .partial_rows = num_queries + 1,
            .partial_cols = (num_sources + 3) / 4 * 4,
            .weight_floats = weight_map((num_queries + 7) / 8, (num_sources + 7) / 8).forward,
            .narrow_rows = layout.narrow_rows(num_sources),
            .scaled_rows = layout.scaled_rows(num_sources),
            .scale_columns = layout.scale_columns};
  }
};

/// Kernels have room for kFewQueries, 8, 16 or 24 queries.
constexpr int query_groups_of(int room) { return (room + 7) / 8; }

/// Tokens whose products a warp makes in turn, so that they wait less for each other: as registers
/// allow it.
constexpr int tokens_together(int room, int source_groups) {
  return room <= 8 && source_groups == 1 ? 2 : 1;
}

/// Calls `work(tokens, b)` for the tokens of a step, from b on `kTogether` at once or one.
template <int kTogether, class Work>
__device__ __forceinline__ void for_tokens(int batch, const Work& work) {
  if (kTogether > 1 && batch % kTogether == 0) {
    for (int b = 0; b < batch; b += kTogether) {
      work(std::integral_constant<int, kTogether>(), b);
    }
  } else {
    for (int b = 0; b < batch; ++b) {
      work(std::integral_constant<int, 1>(), b);
    }
  }
}

/// Tiles of several tokens' sources as ldmatrix leaves them.
template <class Raw, int kTokens, int kTiles, int kSourceGroups>
struct TileBatch {
  Raw of[kTokens][kTiles][kSourceGroups];
};

/// A warp's slice of 16-bit sources, as operands.
template <int kSourceGroups>
struct WideTiles {
  using Raw = Strip;

  const char* place;  // where this lane points at for ldmatrix

  /// `rows`: the first source at the warp's first column, `pitch` bytes apart.
  __device__ __forceinline__ WideTiles(const char* rows, int pitch, int num_sources, int lane) {
    const int n = kSourceGroups == 2 ? lane / 16 * 8 + row_in_strip(lane) : row_in_strip(lane);
    place = rows + (n < num_sources ? n : 0) * pitch + column_in_strip(lane) * 2;
    if (kSourceGroups == 1) {
      place += lane / 16 * 32;  // two tiles
    }
  }

  /// The same so many bytes further on.
  __device__ __forceinline__ WideTiles at(int bytes) const {
    WideTiles other = *this;
    other.place += bytes;
    return other;
  }

  /// Tiles `first` and on, (n, d), or (d, n) if transposed. Those after the last are not defined.
  template <bool kTransposed, int kTiles, int kAtOnce>
  __device__ __forceinline__ void load(int first, int, Strip (&v)[kAtOnce][kSourceGroups]) const {
    constexpr int kStep = 2 / kSourceGroups;
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kStep) {
      const bool last = kStep == 2 && first + i + 1 >= kTiles;  // one tile, not two
      if (first + i >= kTiles) {
        return;
      }
      const char* const from = place + (first + i) * 32;
      Strip& other = kSourceGroups == 2 ? v[i][kSourceGroups - 1] : v[(i + 1) % kAtOnce][0];
      if (kTransposed) {
        last ? load_strip_transposed(from, v[i][0]) : load_strips_transposed(from, v[i][0], other);
      } else {
        last ? load_strip(from, v[i][0]) : load_strips(from, v[i][0], other);
      }
    }
  }
};

/// Which query stands in row `row` of the eights g: with room for few, in the lower four rows once
/// more.
template <int kRoom>
__device__ __forceinline__ int query_of_row(int g, int row) {
  return kRoom == kFewQueries ? row % kFewQueries : 8 * g + row;
}

/// What stands there of two numbers of a query: all of both, or with room for few what is rounded
/// above and the remainders below.
template <int kRoom, class Pair>
__device__ __forceinline__ uint32_t rounded_of_row(const Pair& pair, int row) {
  return kRoom == kFewQueries && row >= kFewQueries ? pair.low : pair.high;
}

/// A warp's sums of a token, of which a lane has those of the query in row lane / 4 of the eights
/// g, and of the source 8 n + lane / 4 with itself, with the sources 8 n + lane % 4 * 2 and the
/// next.
template <int kQueryGroups, int kSourceGroups>
struct Scores {
  float2 query[kQueryGroups][kSourceGroups];
  float2 square[kSourceGroups];  // where it is the source itself; else of no use

  /// Stores them in `token`, the rows of a token's sums.
  __device__ __forceinline__ void store(float* token, int num_queries, int cols, int lane) const {
    const int row = lane / 4;
    const int col = lane % 4 * 2;
    float* const place = keep(token + row * cols + col);
    float* const place_of_square = keep(token + num_queries * cols + row);
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
      const bool exists = 8 * n + col < cols;
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        if (exists && 8 * g + row < num_queries) {
          *reinterpret_cast<float2*>(place + 8 * g * cols + 8 * n) = query[g][n];
        }
      }
      if (exists && row / 2 == lane % 4) {  // the diagonal: row and column 8 n + lane / 4
        place_of_square[8 * n] = row % 2 == 0 ? square[n].x : square[n].y;
      }
    }
  }
};

/// Products that add up to the scores of a token. The left operand has two eights of rows. With
/// room for few queries both parts of them are the upper eight and the sources the lower one.
/// Otherwise these are two groups of queries, once what is rounded and once the remainders; of a
/// last group alone both at once; and, since only the diagonals count of the sources with
/// themselves, both blocks of a tile at once: [left; right] left^T has the left one's on top,
/// [left; right] right^T the right one's below. The kinds do not wait for each other.
template <int kRoom, int kSourceGroups>
struct ScoreProducts {
  static constexpr int kQueryGroups = query_groups_of(kRoom);
  static constexpr bool kFew = kRoom == kFewQueries;
  static constexpr int kPairs = kQueryGroups / 2;
  static constexpr bool kOdd = kQueryGroups % 2 == 1;

  Accum high[kPairs + 1][kSourceGroups], low[kPairs + 1][kSourceGroups];  // (s, n); one too many
  Accum both[2][kSourceGroups];  // (s; s, n), tiles in turn
  // (n; n, n), tiles in turn; few: (s s; n, n), of which left[0] and right[0] have tiles in turn.
  Accum left[2][kSourceGroups], right[2][kSourceGroups];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        both[i][n] = left[i][n] = right[i][n] = Accum::zero();
      }
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        high[m][n] = low[m][n] = Accum::zero();
      }
    }
  }

  /// Adds tile j: `u_high` and `u_low` of the queries (few: all in `u_high`), `v` of the sources,
  /// in float16 (`kHalf`) or bfloat16.
  template <bool kHalf>
  __device__ __forceinline__ void add(int j, const Strip (&u_high)[kQueryGroups],
                                      const Strip (&u_low)[kQueryGroups],
                                      const Strip (&v)[kSourceGroups]) {
    const auto product = [](Accum& c, Strip top, Strip bottom, Strip b) {
      if constexpr (kHalf) {
        mma_rows_half(c, top, bottom, b);
      } else {
        mma_rows(c, top, bottom, b);
      }
    };
    const auto square = [](Accum& c, Strip both_blocks, uint32_t block) {
      if constexpr (kHalf) {
        mma_columns_half(c, both_blocks, block);
      } else {
        mma_columns(c, both_blocks, block);
      }
    };
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
      if constexpr (kFew) {
        product(j % 2 == 0 ? left[0][n] : right[0][n], u_high[0], v[n], v[n]);
      } else {
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          product(high[m][n], u_high[2 * m], u_high[2 * m + 1], v[n]);
          product(low[m][n], u_low[2 * m], u_low[2 * m + 1], v[n]);
        }
        if constexpr (kOdd) {
          product(both[j % 2][n], u_high[kQueryGroups - 1], u_low[kQueryGroups - 1], v[n]);
        }
        square(left[j % 2][n], v[n], v[n].left);
        square(right[j % 2][n], v[n], v[n].right);
      }
    }
  }

  __device__ __forceinline__ Scores<kQueryGroups, kSourceGroups> scores() const {
    Scores<kQueryGroups, kSourceGroups> result;
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
      const float(&l)[4] = left[0][n].c;
      const float(&r)[4] = right[0][n].c;
      if constexpr (kFew) {
        const auto with_other_part = [](float x) {
          return x + __shfl_xor_sync(0xffffffffu, x, 4 * kFewQueries);
        };
        result.query[0][n] = {with_other_part(l[0] + r[0]), with_other_part(l[1] + r[1])};
        result.square[n] = {l[2] + r[2], l[3] + r[3]};
      } else {
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          const float(&a)[4] = high[m][n].c;
          const float(&b)[4] = low[m][n].c;
          result.query[2 * m][n] = {a[0] + b[0], a[1] + b[1]};
          result.query[2 * m + 1][n] = {a[2] + b[2], a[3] + b[3]};
        }
        if constexpr (kOdd) {
          const float(&a)[4] = both[0][n].c;
          const float(&b)[4] = both[1][n].c;
          result.query[kQueryGroups - 1][n] = {(a[0] + b[0]) + (a[2] + b[2]),
                                               (a[1] + b[1]) + (a[3] + b[3])};
        }
        const float(&l1)[4] = left[1][n].c;
        const float(&r1)[4] = right[1][n].c;
        result.square[n] = {(l[0] + l1[0]) + (r[2] + r1[2]), (l[1] + l1[1]) + (r[3] + r1[3])};
      }
    }
    return result;
  }
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_PARAMS_CUH_
