// Backward of phase 1 on Hopper, in one pass over memory.
//
//   dh_s      = gate_s dout_s             p_sn = exp(logit_sn - lse_s)
//   dp_sn     = <dh_s, v_n>               delta_s = sum_n p_sn dp_sn
//   dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)              w_sn = scale dlogit_sn r_n
//   dv_n      = [dv_n +] sum_s p_sn dh_s + sum_s w_sn u_s - (sum_s dlogit_sn logit_sn)(r_n^2/D) v_n
//   du_s      = sum over t and n of w_sn v_n
//
// in    sources N x [T, D] bfloat16, float16 with or without scales, or float8 with scales,
//       N <= 16; dout S x [T, D] bfloat16, S <= 24; queries [S, D], lse [S, T], logits [T, S * N],
//       inv_rms [T, N], gate [S, T], dlse [S, T] float32 (the last two optional)
// out   dsources N x [T, D] bfloat16 or float32, overwritten or added to; partials
//       [clusters, S, D] float32: du summed over the tokens of a cluster
// bytes 2N + S units of T * D elements, 3N + S when accumulating, N / 2 fewer from float8;
//       partials below 0.5 % of it
// sums  float32. What goes to the tensor cores besides bfloat16 inputs is split so that the storage
//       of dv alone limits its accuracy: p gate, w (for du) and the weight of v as a bfloat16 and
//       the bfloat16 of its remainder; u and w (for dv) as float16 with 11 bits, scaled by powers
//       of two, u by one of the warp's columns and w by one of the token
// bits  the same in every call on the same GPU model
//
// Roles and schedule: hopper_pipeline.cuh. P1 of a token is, for a warp's columns d in tiles of 16,
//
//   dout (s,d) v^T (d,n)                                  16 queries a time, or 8 of two tiles
//
// and P2, from the same rows read transposed, for every eight sources
//
//   u^T (d,s) w (s,n)                                    float16, then scaled and added to old dv
//   [dout^T, v^T] [p_hi; c_hi] (.,n) + [dout^T, v^T] [p_lo; c_lo]     c: diagonal, the weight of v
//   du (d,s) += v^T w_hi (n,s) + v^T w_lo (n,s)                       stays in registers to the end
//
// where v of float8 is widened to bfloat16, and v of float16 becomes a bfloat16 and the bfloat16 of
// its remainder (device/hopper_narrow.cuh). The queries stay in registers, too. Rows that fill up
// an mma tile repeat an existing row: in P1 their sums are not stored, in P2 their weights are
// zero.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_BACKWARD_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_BACKWARD_CUH_

#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "cuda/kernels/hopper_pipeline.cuh"

namespace flash_attn_res::cuda::hopper {

template <class Gradient>
struct AttendBackwardParams {
  RowTable<kSourcesMax + kQueriesMax> inputs;  // (N + S) x [T, D]: sources, then dout
  ScaleTable scales;                           // of sources that have them
  Gradient* dsources[kSourcesMax];             // N x [T, D]
  int64_t dsources_stride[kSourcesMax];        // elements
  const float* queries;                        // [S, D]
  const float* lse;                            // [S, T]
  const float* logits;                         // [T, S * N]
  const float* inv_rms;                        // [T, N]
  const float* gate;                           // [S, T], may be null: one
  const float* dlse;                           // [S, T], may be null: zero
  float* partials;                             // [clusters, S, D]
  int* issued;                                 // one counter, zero at the start
  int64_t queries_stride, lse_stride, logits_stride, inv_rms_stride, gate_stride, dlse_stride;
  int64_t tokens;
  int num_sources, num_queries, dim;
  float scale;
  bool accumulate;
  SourceLayout layout;  // of the sources
  Plan plan;
  SharedMap map;  // of plan and extents(); here it takes no registers

  FLASH_ATTN_RES_HOPPER_BOTH Extents extents() const {
    const int source_groups = (num_sources + 7) / 8;
    const int query_groups = (num_queries + 7) / 8;
    return {.input_rows = num_sources + num_queries,
            .result_rows = num_sources,
            .result_bytes = static_cast<int>(sizeof(Gradient)),
            .partial_rows = num_queries,
            .partial_cols = (num_sources + 3) / 4 * 4,
            .weight_floats = weight_map(query_groups, source_groups).backward,
            .narrow_rows = layout.narrow_rows(num_sources),
            .scaled_rows = layout.scaled_rows(num_sources),
            .scale_columns = layout.scale_columns};
  }
};

/// The right operands of P2 for eight sources, as this lane holds them.
template <int kQueryGroups, int kSourceGroups>
struct GradientOperands {
  static constexpr WeightMap kMap = weight_map(kQueryGroups, kSourceGroups);

  SplitPair prob[kQueryGroups];    // (s, n): factors of dout
  uint32_t query[kQueryGroups];    // (s, n): factors of u, float16, divided by the scale
  SplitPair key;                   // (n, n): factors of v, a diagonal
  SplitPair dquery[kQueryGroups];  // (n, s): factors of v in du
  float scale;

  __device__ __forceinline__ GradientOperands(const float* weights, int first_source, int lane) {
    const int row = lane / 4;       // of a transposed block
    const int pair = lane % 4 * 2;  // first column of two
    scale = weights[kMap.scale];
    const float inverse = PowerOfTwo::of(scale).inverse;
#pragma unroll
    for (int g = 0; g < kQueryGroups; ++g) {
      const float* const by_source =
          weights + (8 * g + pair) * kMap.pitch + first_source + row;  // queries `pair` and next
      prob[g] = SplitPair::of(by_source[kMap.prob], by_source[kMap.prob + kMap.pitch]);
      query[g] =
          pack_half(by_source[kMap.query] * inverse, by_source[kMap.query + kMap.pitch] * inverse);
      const float2 by_query = *reinterpret_cast<const float2*>(
          weights + kMap.query + (8 * g + row) * kMap.pitch + first_source + pair);
      dquery[g] = SplitPair::of(by_query.x, by_query.y);
    }
    const float on_diagonal = weights[kMap.key + first_source + row];
    key = SplitPair::of(row == pair ? on_diagonal : 0.0f, row == pair + 1 ? on_diagonal : 0.0f);
  }
};

/// A warp's view of eight gradients in a slot of results: tile j is 16 columns of them, transposed.
template <class Gradient>
class GradientTile;

template <>
class GradientTile<Bf16> {
 public:
  __device__ __forceinline__ GradientTile(char* slot, char* scratch, int pitch, int first_source,
                                          int num_sources, int first_column, int lane) {
    const int n = first_source + row_in_strip(lane);
    rows_ = n < num_sources ? slot + n * pitch + (first_column + column_in_strip(lane)) * 2
                            : scratch + row_in_strip(lane) * 32 + column_in_strip(lane) * 2;
  }

  __device__ __forceinline__ Accum load(int j) const {
    Strip strip;
    load_strip_transposed(rows_ + j * 32, strip);
    return {{low_bf16(strip.left), high_bf16(strip.left), low_bf16(strip.right),
             high_bf16(strip.right)}};
  }

  __device__ __forceinline__ void store(int j, const Accum& value) const {
    store_strip_transposed(rows_ + j * 32,
                           {pack_bf16(value.c[0], value.c[1]), pack_bf16(value.c[2], value.c[3])});
  }

 private:
  char* rows_;
};

template <>
class GradientTile<float> {
 public:
  __device__ __forceinline__ GradientTile(char* slot, char*, int pitch, int first_source,
                                          int num_sources, int first_column, int lane) {
    const int n = first_source + lane % 4 * 2;
    exists_[0] = n < num_sources;
    exists_[1] = n + 1 < num_sources;
    rows_[0] = reinterpret_cast<float*>(slot + n * pitch) + first_column + lane / 4;
    rows_[1] = reinterpret_cast<float*>(slot + (n + 1) * pitch) + first_column + lane / 4;
  }

  __device__ __forceinline__ Accum load(int j) const {
    Accum value;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value.c[i] = exists_[i % 2] ? rows_[i % 2][j * 16 + i / 2 * 8] : 0.0f;
    }
    return value;
  }

  __device__ __forceinline__ void store(int j, const Accum& value) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (exists_[i % 2]) {
        rows_[i % 2][j * 16 + i / 2 * 8] = value.c[i];
      }
    }
  }

 private:
  float* rows_[2];
  bool exists_[2];
};

/// What one compute warp does.
template <int kQueryGroups, int kTiles, int kSourceGroups, class Source, class Gradient>
struct AttendBackwardWarp {
  using Operands = GradientOperands<kQueryGroups, kSourceGroups>;
  static constexpr int kRowPairs = (kQueryGroups + 1) / 2;
  static constexpr bool kNarrow = kIsNarrow<Source>;
  static constexpr bool kSplit = std::is_same_v<Source, __half>;
  // Strips of a tile of P2 that ldmatrix loads, dout, then eight sources; those of float8 are
  // loaded apart.
  static constexpr int kGradientStrips = kQueryGroups + (kNarrow ? 0 : 1);
  // Tiles of a batch (see for_batches). With three eights of queries there are no registers for a
  // batch ahead.
  static constexpr int kAtOnce = kQueryGroups == 3 ? 1 : 2;
  static constexpr bool kAhead = kQueryGroups == 1;

  // P1 has two tiles a batch. What an ldmatrix loads is a left operand as it is, two eights of
  // queries of a tile, or the last of an odd number of two tiles: each of the two products then has
  // half of its rows for nothing. Operands put together from several loads took a third of the
  // loop's instructions, copies of registers.
  struct ProductBatch {
    Strip query[2][kRowPairs][2];  // (s, d) of dout: top and bottom rows; see `is_alone`
    Strip v[2][kSourceGroups];     // (n, d)
  };
  /// Whether a pair of eights of queries is the last eight of an odd number, by itself.
  static constexpr bool is_alone(int pair) { return 2 * pair + 1 == kQueryGroups; }

  struct GradientBatch {
    Strip strips[kAtOnce][kGradientStrips];  // (d, s) of dout, then (d, n)
    SplitStrip v[kAtOnce];                   // (d, n)
    Accum dv[kAtOnce];                       // (d, n)
  };

  const AttendBackwardParams<Gradient>& p;
  SharedHead& head;
  char* base;  // of shared memory
  const Sums& sums;
  int warp, lane;
  Strip query[kTiles][kQueryGroups];  // (d, s) float16, divided by query_scale
  float query_scale;
  Accum du[kTiles][kQueryGroups];  // (d, s)

  __device__ __forceinline__ AttendBackwardWarp(const AttendBackwardParams<Gradient>& params,
                                                SharedHead& shared_head, const Share& share,
                                                const Sums& shared_sums)
      : p(params),
        head(shared_head),
        base(reinterpret_cast<char*>(&shared_head)),
        sums(shared_sums),
        warp(warp_of_cta()),
        lane(lane_of_warp()) {
    load_queries(share);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        du[j][g] = Accum::zero();
      }
    }
  }

  __device__ __forceinline__ float query_at(const Share& share, int s, int column) const {
    return s < p.num_queries && column < share.columns
               ? p.queries[s * p.queries_stride + share.column + column]
               : 0.0f;
  }

  __device__ __forceinline__ void load_queries(const Share& share) {
    float greatest = 0.0f;
#pragma unroll 4  // loads of several queries are in flight at once
    for (int s = 0; s < p.num_queries; ++s) {
#pragma unroll
      for (int i = 0; i < (kTiles + 1) / 2; ++i) {
        const int column = i * kWarpLanes + lane;
        const float value = query_at(share, s, warp * kTiles * 16 + column);
        greatest = fmaxf(greatest, column < kTiles * 16 ? fabsf(value) : 0.0f);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
    }
    const PowerOfTwo power = PowerOfTwo::of(greatest);
    query_scale = power.value;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        const int s = 8 * g + lane % 4 * 2;
        const int col = (warp * kTiles + j) * 16 + lane / 4;
        const auto pack = [&](int column) {
          return pack_half(query_at(share, s, column) * power.inverse,
                           query_at(share, s + 1, column) * power.inverse);
        };
        query[j][g] = {pack(col), pack(col + 8)};
      }
    }
  }

  /// Where row `row` of a token's inputs has the warp's columns from `column` on.
  __device__ __forceinline__ int place(int row, int column) const {
    return p.map.input_row(row, p.num_sources) + (warp * kTiles * 16 + column) * 2;
  }

  /// Where this lane points at in a token's inputs for a pair of strips of P2: those of dout come
  /// first, then those of the sources from `first_source` on.
  __device__ __forceinline__ int strip_offset(int pair, int first_source) const {
    const int strip = min(2 * pair + lane / 16, kGradientStrips - 1);
    const int i = row_in_strip(lane);
    const int s = min(strip * 8 + i, p.num_queries - 1);
    const int n = first_source + (strip - kQueryGroups) * 8 + i;
    const int row = strip < kQueryGroups ? p.num_sources + s : n < p.num_sources ? n : 0;
    return place(row, column_in_strip(lane));
  }

  /// The same for the left operand of P1 that has the eights of queries 2 pair and 2 pair + 1, or
  /// an eight alone of two tiles.
  __device__ __forceinline__ int query_offset(int pair) const {
    const int bottom = lane / 8 % 2;
    const int eight = 2 * pair + (is_alone(pair) ? 0 : bottom);
    const int s = min(eight * 8 + row_in_strip(lane), p.num_queries - 1);
    return place(p.num_sources + s, (is_alone(pair) ? bottom * 16 : 0) + lane / 16 * 8);
  }

  /// The same for the right operands of P1: both eights of sources, or one of two tiles.
  __device__ __forceinline__ int source_offset() const {
    const int n = (kSourceGroups == 2 ? lane / 16 * 8 : 0) + row_in_strip(lane);
    return place(n < p.num_sources ? n : 0,
                 (kSourceGroups == 2 ? 0 : lane / 16 * 16) + column_in_strip(lane));
  }

  /// Tiles `first` and the next for P1, from where this lane points at.
  __device__ __forceinline__ void load_products(const char* const (&queries)[kRowPairs],
                                                const char* sources, int first,
                                                ProductBatch& batch) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i < kTiles) {
#pragma unroll
        for (int m = 0; m < kRowPairs; ++m) {
          if (i == 0 || !is_alone(m)) {
            const char* const from = queries[m] + (first + i) * 32;
            const bool last = is_alone(m) && first + 1 == kTiles;  // the same tile twice
            load_rows(last ? from - lane / 8 % 2 * 32 : from, batch.query[i][m][0],
                      batch.query[i][m][1]);
          }
        }
        if constexpr (!kNarrow && kSourceGroups == 2) {
          load_strips(sources + (first + i) * 32, batch.v[i][0], batch.v[i][1]);
        }
      }
    }
    if constexpr (!kNarrow && kSourceGroups == 1) {
      if (first + 1 < kTiles) {
        load_strips(sources + first * 32, batch.v[0][0], batch.v[1][0]);
      } else {
        load_strip(sources + first * 32, batch.v[0][0]);
      }
    }
  }

  /// Tile j of a token's inputs for P2, for the offsets of its pairs of strips.
  template <int kPairs>
  __device__ __forceinline__ void load_tile(const char* token, const int (&offsets)[kPairs], int j,
                                            Strip (&strips)[kGradientStrips]) const {
    static_assert(kPairs == (kGradientStrips + 1) / 2);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const char* const from = token + offsets[pair] + j * 32;
      if (2 * pair + 1 < kGradientStrips) {
        load_strips_transposed(from, strips[2 * pair], strips[(2 * pair + 1) % kGradientStrips]);
      } else {
        load_strip_transposed(from, strips[2 * pair]);
      }
    }
  }

  /// The float8 sources of token b of a step, from `first_source` on.
  template <int kGroups>
  __device__ __forceinline__ NarrowStrips<kGroups> narrow_strips(int stage, int b, int first_source,
                                                                 const Share& share) const {
    const Bf16* const scales = reinterpret_cast<const Bf16*>(base + p.map.scales) +
                               (stage * p.plan.batch + b) * p.map.token_scales() + first_source;
    return {base + p.map.inputs + stage * p.map.stage_bytes + b * p.map.token_bytes +
                first_source * p.map.source_pitch,
            p.map.source_pitch,
            p.num_sources - first_source,
            scales,
            p.map.scale_pitch,
            p.scales.shift,
            share.column,
            warp * kTiles * 16,
            lane};
  }

  /// The scales of float16 sources of token b of a step, from `first_source` on.
  template <int kGroups>
  __device__ __forceinline__ HalfScales<kGroups, kTiles> scales_of_half(int stage, int b,
                                                                        int first_source,
                                                                        const Share& share) const {
    const Bf16* const scales = reinterpret_cast<const Bf16*>(base + p.map.scales) +
                               (stage * p.plan.batch + b) * p.map.token_scales() + first_source;
    return {p.layout.scale_columns > 0 ? scales : nullptr,
            p.map.scale_pitch,
            p.num_sources - first_source,
            p.scales.shift,
            share.column,
            share.column + warp * kTiles * 16,
            lane};
  }

  /// P1 of a step: the warp's share of <dout_s, v_n>.
  __device__ __forceinline__ void products(int step, int stage, const Share& share) const {
    const char* const inputs = base + p.map.inputs + stage * p.map.stage_bytes;
    const char* queries[kRowPairs];
#pragma unroll
    for (int m = 0; m < kRowPairs; ++m) {
      queries[m] = inputs + query_offset(m);
    }
    const char* sources = inputs + source_offset();
    float* token_sums = sums.partial_row(step, warp, 0);
    for (int b = 0; b < p.plan.batch; ++b) {
      const auto narrow = narrow_strips<kSourceGroups>(stage, b, 0, share);
      const auto half_scales = scales_of_half<kSourceGroups>(stage, b, 0, share);
      // The two tiles of a batch, and where registers allow it remainders, have sums of their own:
      // products do not wait for each other then.
      constexpr int kSums = kSplit && kQueryGroups == 1 ? 4 : 2;
      Accum acc[kSums][kRowPairs][kSourceGroups];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
#pragma unroll
        for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
          for (int n = 0; n < kSourceGroups; ++n) {
            acc[i][m][n] = Accum::zero();
          }
        }
      }
      for_batches<kTiles, 2, ProductBatch, kQueryGroups != 3>(
          [&](int first, ProductBatch& batch) { load_products(queries, sources, first, batch); },
          [&](int first, const ProductBatch& batch) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int j = first + i;
              if (j >= kTiles) {
                continue;
              }
#pragma unroll
              for (int n = 0; n < kSourceGroups; ++n) {
                SplitStrip v;
                if constexpr (kNarrow) {
                  v.high = narrow.load(n, j);
                } else if constexpr (kSplit) {
                  const float scale = half_scales.of_row(n, j);
                  v = SplitStrip::of(batch.v[i][n], {scale, scale});
                } else {
                  v.high = batch.v[i][n];
                }
#pragma unroll
                for (int m = 0; m < kRowPairs; ++m) {
                  const Strip(&query)[2] = batch.query[is_alone(m) ? 0 : i][m];
                  mma_rows(acc[i][m][n], query[0], query[1], v.high);
                  if constexpr (kSplit) {
                    mma_rows(acc[kSums - 2 + i][m][n], query[0], query[1], v.low);
                  }
                }
              }
            }
          });
      const int col = lane % 4 * 2;
      float* const place = keep(token_sums + lane / 4 * sums.cols + col);
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          if constexpr (kSums == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              acc[0][m][n].c[i] += acc[2][m][n].c[i];
              acc[1][m][n].c[i] += acc[3][m][n].c[i];
            }
          }
#pragma unroll
          for (int half = 0; half < (is_alone(m) ? 1 : 2); ++half) {
            const int s = 16 * m + 8 * half;  // and lane / 4
            const int other = is_alone(m) ? 2 : 2 * half;
            if (s + lane / 4 < p.num_queries && n * 8 + col < sums.cols) {
              *reinterpret_cast<float2*>(place + s * sums.cols + n * 8) = {
                  acc[0][m][n].c[2 * half] + acc[1][m][n].c[other],
                  acc[0][m][n].c[2 * half + 1] + acc[1][m][n].c[other + 1]};
            }
          }
        }
      }
      token_sums += p.num_queries * sums.cols;
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
        queries[m] += p.map.token_bytes;
      }
      sources += p.map.token_bytes;
    }
    __syncwarp();
    if (lane == 0) {
      head.partials_full[p.plan.buffer(step)].arrive();
    }
  }

  /// P2 of a step: dv_n of the warp's columns, and their share of du_s.
  __device__ __forceinline__ void gradients(int step, int stage, int slot, const Share& share) {
    const char* token = base + p.map.inputs + stage * p.map.stage_bytes;
    char* results = base + p.map.results + slot * p.map.slot_bytes;
    char* const scratch = base + p.map.scratch + warp * scratch_bytes_per_warp(kTiles);
    const float* weights = reinterpret_cast<const float*>(base + p.map.weights) +
                           p.plan.buffer(step) * p.plan.batch * Operands::kMap.backward;
    for (int b = 0; b < p.plan.batch; ++b) {
#pragma unroll 1
      for (int n = 0; n < 8 * kSourceGroups; n += 8) {
        const int row = n < p.num_sources ? n : 0;
        gradients_of_eight(token, results, scratch, weights, n,
                           narrow_strips<1>(stage, b, row, share),
                           scales_of_half<1>(stage, b, row, share));
      }
      token += p.map.token_bytes;
      results += p.num_sources * p.map.result_pitch;
      weights += Operands::kMap.backward;
    }
    fence_before_bulk_copies();
    __syncwarp();
    if (lane == 0) {
      head.input_free[stage].arrive();
      head.result_done[slot].arrive();
    }
  }

  /// P2 of a token for the sources from `first_source` on.
  __device__ __forceinline__ void gradients_of_eight(const char* token, char* slot, char* scratch,
                                                     const float* weights, int first_source,
                                                     const NarrowStrips<1>& narrow,
                                                     const HalfScales<1, kTiles>& half_scales) {
    const Operands operands(weights, first_source, lane);
    const float factor = operands.scale * query_scale;
    const GradientTile<Gradient> gradient(slot, scratch, p.map.result_pitch, first_source,
                                          p.num_sources, warp * kTiles * 16, lane);
    int offsets[(kGradientStrips + 1) / 2];
#pragma unroll
    for (int pair = 0; pair < (kGradientStrips + 1) / 2; ++pair) {
      offsets[pair] = strip_offset(pair, first_source);
    }
    for_batches<kTiles, kAtOnce, GradientBatch, kAhead>(
        [&](int first, GradientBatch& batch) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < kTiles) {
              load_tile(token, offsets, first + i, batch.strips[i]);
              if constexpr (kNarrow) {
                batch.v[i].high = narrow.load_transposed(0, first + i);
              }
              batch.dv[i] = p.accumulate ? gradient.load(first + i) : Accum::zero();
            }
          }
        },
        [&](int first, GradientBatch& batch) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < kTiles) {
              if constexpr (kSplit) {
                batch.v[i] =
                    SplitStrip::of(batch.strips[i][kQueryGroups], half_scales.of_pair(first + i));
              } else if constexpr (!kNarrow) {
                batch.v[i].high = batch.strips[i][kQueryGroups];
              }
              add_gradients(operands, factor, first + i, batch.strips[i], batch.v[i], batch.dv[i]);
            }
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < kTiles) {
              gradient.store(first + i, batch.dv[i]);
            }
          }
        });
  }

  /// The products of tile j: into dv, and into the du of the warp.
  __device__ __forceinline__ void add_gradients(const Operands& operands, float factor, int j,
                                                const Strip (&strips)[kGradientStrips],
                                                const SplitStrip& v, Accum& dv) {
    Accum from_queries = Accum::zero();  // (d, n)
#pragma unroll
    for (int g = 0; g + 1 < kQueryGroups; g += 2) {
      mma_columns_half(from_queries, query[j][g], query[j][g + 1], operands.query[g],
                       operands.query[g + 1]);
    }
    if constexpr (kQueryGroups % 2 == 1) {
      mma_columns_half(from_queries, query[j][kQueryGroups - 1], operands.query[kQueryGroups - 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dv.c[i] = fmaf(factor, from_queries.c[i], dv.c[i]);
    }
    // Strips side by side, v the last of them, are one left operand, for their high factors and for
    // the low ones. One strip twice, for both of its own, would have to be copied.
    const auto strip = [&](int i) -> const Strip& { return i < kQueryGroups ? strips[i] : v.high; };
    const auto factor_of = [&](int i) -> const SplitPair& {
      return i < kQueryGroups ? operands.prob[i] : operands.key;
    };
#pragma unroll
    for (int i = 0; i <= kQueryGroups; i += 2) {
      if (i < kQueryGroups) {
        mma_columns(dv, strip(i), strip(i + 1), factor_of(i).high, factor_of(i + 1).high);
        mma_columns(dv, strip(i), strip(i + 1), factor_of(i).low, factor_of(i + 1).low);
      } else {
        mma_columns(dv, v.high, operands.key.high);
        mma_columns(dv, v.high, operands.key.low);
      }
    }
#pragma unroll
    for (int g = 0; g < kQueryGroups; ++g) {
      mma_columns(du[j][g], v.high, operands.dquery[g].high);
      mma_columns(du[j][g], v.high, operands.dquery[g].low);
    }
    if constexpr (kSplit) {
      mma_columns(dv, v.low, operands.key.high);
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        mma_columns(du[j][g], v.low, operands.dquery[g].high);
      }
    }
  }

  /// At the end: du of this CTA's tokens and the warp's columns.
  __device__ __forceinline__ void store_dqueries(const Share& share) const {
    float* const partial = p.partials +
                           static_cast<int64_t>(share.cluster) * p.num_queries * p.dim +
                           share.column;  // (S, D)
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int s = 8 * g + lane % 4 * 2 + i % 2;
          const int col = (warp * kTiles + j) * 16 + lane / 4 + i / 2 * 8;
          if (s < p.num_queries && col < share.columns) {
            partial[static_cast<int64_t>(s) * p.dim + col] = du[j][g].c[i];
          }
        }
      }
    }
  }
};

/// Statistics of a token, read a token ahead. Logits and inverse RMS are loaded side by side, 32 in
/// a row, and pass through shared memory: each lane loading its own would touch as many cache lines
/// as there are queries, once for each source.
template <int kQueryGroups, int kSourceGroups>
struct TokenStatistics {
  static constexpr int kLoads = 2 * kQueryGroups * kSourceGroups;

  float logits[kLoads];   // elements lane + 32 i of the row (S * N)
  float inv_rms;          // of source `lane`
  float lse, gate, dlse;  // of the lane's query

  template <class Gradient>
  __device__ __forceinline__ void load(const AttendBackwardParams<Gradient>& p, int64_t t, int s,
                                       int lane) {
    const float* const row = p.logits + t * p.logits_stride;  // (S * N)
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int element = lane + i * kWarpLanes;
      logits[i] = element < p.num_queries * p.num_sources ? __ldg(row + element) : 0.0f;
    }
    inv_rms = lane < p.num_sources ? __ldg(p.inv_rms + t * p.inv_rms_stride + lane) : 0.0f;
    lse = __ldg(p.lse + s * p.lse_stride + t);
    gate = p.gate != nullptr ? __ldg(p.gate + s * p.gate_stride + t) : 1.0f;
    dlse = p.dlse != nullptr ? __ldg(p.dlse + s * p.dlse_stride + t) : 0.0f;
  }

  /// Stores the first two: logits (S, N), then inv_rms (N).
  template <class Gradient>
  __device__ __forceinline__ void spread(const AttendBackwardParams<Gradient>& p, float* shared,
                                         int lane) const {
    const int count = p.num_queries * p.num_sources;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (lane + i * kWarpLanes < count) {
        shared[lane + i * kWarpLanes] = logits[i];
      }
    }
    if (lane < p.num_sources) {
      shared[count + lane] = inv_rms;
    }
  }
};

/// One of the sums that a lane held, added up over lanes.
struct ScatteredSum {
  float value;
  int index;  // which one
};

/// Adds up `values` over the lanes that differ in the bits from `kOffset` to 16. While a lane
/// carries more than one value, each step halves them: it keeps one half and sends the other.
template <int kOffset, int kCount>
__device__ __forceinline__ ScatteredSum sum_scattered(const float (&values)[kCount], int lane,
                                                      int index = 0) {
  if constexpr (kOffset == kWarpLanes) {
    static_assert(kCount == 1);
    return {values[0], index};
  } else if constexpr (kCount == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(0xffffffffu, values[0], kOffset)};
    return sum_scattered<2 * kOffset>(sum, lane, index);
  } else {
    const bool upper = (lane & kOffset) != 0;
    float half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float kept = upper ? values[i + kCount / 2] : values[i];
      const float sent = upper ? values[i] : values[i + kCount / 2];
      half[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kOffset);
    }
    return sum_scattered<2 * kOffset>(half, lane, index + (upper ? kCount / 2 : 0));
  }
}

/// A softmax warp: from <dout, v> and the statistics of the forward to the weights of P2.
template <int kQueryGroups, int kSourceGroups, class Gradient>
__device__ __forceinline__ void attend_backward_softmax(const AttendBackwardParams<Gradient>& p,
                                                        SharedHead& head, const Share& share) {
  constexpr WeightMap kWeights = weight_map(kQueryGroups, kSourceGroups);
  using Lane = SoftmaxLane<kQueryGroups, kSourceGroups>;
  constexpr int kSources = Lane::kSources;
  const int lane = lane_of_warp();
  const Lane mine(lane);
  const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
  const bool active = mine.query < p.num_queries;
  const int s = min(mine.query, p.num_queries - 1);
  const int sources = p.num_sources - mine.first_source;  // those of this lane that exist: n < it
  const float key_factor = -1.0f / static_cast<float>(p.dim);
  float* const all_weights =
      reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + p.map.weights);

  TokenStatistics<kQueryGroups, kSourceGroups> next;
  next.load(p, share.clamped(share.token(first_softmax_step(p.plan, 1), 0)), s, lane);
  for (int step = first_softmax_step(p.plan, share.steps); step < share.steps;
       step += p.plan.softmax_warps) {
    const int buffer = p.plan.buffer(step);
    float* const scratch = sums.scratch(step);
    for (int b = 0; b < share.batch; ++b) {
      const TokenStatistics<kQueryGroups, kSourceGroups> now = next;
      const bool last = b == share.batch - 1;
      if (!last || step + p.plan.softmax_warps < share.steps) {
        next.load(p,
                  share.clamped(last ? share.token(step + p.plan.softmax_warps, 0)
                                     : share.token(step, b + 1)),
                  s, lane);
      }
      const bool exists = active && share.token(step, b) < share.tokens;
      if (b == 0) {
        head.partials_full[buffer].wait(p.plan.phase(step));
        sums.send(head, step, lane);
      }
      __syncwarp();  // the scratch has been read
      now.spread(p, scratch, lane);
      __syncwarp();
      float logit[kSources], inv_rms[kSources], prob[kSources];
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        const int k = n < sources ? mine.first_source + n : 0;
        logit[n] = scratch[s * p.num_sources + k];
        inv_rms[n] = scratch[p.num_queries * p.num_sources + k];
        // ex2.approx: 2 ulp of the exponential, on arguments that are at most 0.
        prob[n] = exists && n < sources ? __expf(logit[n] - now.lse) : 0.0f;
      }
      if (b == 0) {
        sums.receive(head, step);
      }
      float dlogit[kSources];
      sums.read(step, b * p.num_queries + s, mine.first_source, dlogit);
      float delta = 0.0f;
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        dlogit[n] = n < sources ? dlogit[n] * now.gate : 0.0f;  // dp
        delta = fmaf(prob[n], dlogit[n], delta);
      }
      delta = Lane::sum(delta);
      float greatest = 0.0f;
      float weight[kSources];      // w
      float key_weight[kSources];  // this query's share of -(r_n^2 / D) sum_s dlogit_sn logit_sn
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        // With one source p is 1 and the difference is zero by identity, not just by rounding.
        const float difference = p.num_sources == 1 ? 0.0f * dlogit[n] : dlogit[n] - delta;
        const float gradient = prob[n] * (difference + now.dlse);  // dlogit
        const float r = inv_rms[n];
        weight[n] = p.scale * gradient * r;
        greatest = fmaxf(greatest, fabsf(weight[n]));
        key_weight[n] = exists && n < sources ? gradient * logit[n] * (r * r * key_factor) : 0.0f;
      }
      const ScatteredSum key = sum_scattered<Lane::kParts>(key_weight, lane);
#pragma unroll
      for (int offset = 1; offset < kWarpLanes; offset *= 2) {
        greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
      }
      float* const weights = all_weights + (buffer * share.batch + b) * kWeights.backward;
      if (active) {
        float* const place = weights + s * kWeights.pitch + mine.first_source;
#pragma unroll
        for (int n = 0; n < kSources; ++n) {
          prob[n] *= now.gate;
        }
        store_vector(place + kWeights.prob, prob);
        store_vector(place + kWeights.query, weight);
      }
      // Lanes that hold the same sum write the same bits.
      weights[kWeights.key + mine.first_source + key.index] = key.value;
      if (lane == 0) {
        weights[kWeights.scale] = PowerOfTwo::of(greatest).value;
      }
    }
    __syncwarp();
    if (lane == 0) {
      head.weights_full[buffer].arrive();
    }
  }
}

/// The store warp: finished steps out of the ring of results, and old gradients into it.
template <class Gradient>
__device__ __forceinline__ void attend_backward_store(const AttendBackwardParams<Gradient>& p,
                                                      SharedHead& head, const Share& share) {
  const int lane = lane_of_warp();
  const int bytes = share.columns * static_cast<int>(sizeof(Gradient));
  const CachePolicy policy(p.plan.store_hint);
  char* const results = reinterpret_cast<char*>(&head) + p.map.results;
  const bool mine = lane < p.num_sources;
  const int n = mine ? lane : 0;
  Gradient* const gradients = p.dsources[n] + share.column;  // (T, columns)
  const int64_t stride = p.dsources_stride[n];
  const auto row = [&](int slot, int b) {
    return results + slot * p.map.slot_bytes + (b * p.num_sources + n) * p.map.result_pitch;
  };

  const auto open = [&](int step, int slot) {
    if (!p.accumulate) {
      if (lane == 0) {
        head.result_ready[slot].arrive();
      }
      return;
    }
    if (lane == 0) {
      head.result_ready[slot].arrive_and_expect(share.batch * p.num_sources * bytes);
    }
    __syncwarp();
    if (mine) {
      for (int b = 0; b < share.batch; ++b) {
        const int64_t t = share.clamped(share.token(step, b));
        load_row(row(slot, b), gradients + t * stride, bytes, head.result_ready[slot], policy);
      }
    }
  };

  for (int step = 0; step < p.plan.slots && step < share.steps; ++step) {
    open(step, step);
  }
  RingCursor cursor;
  for (int step = 0; step < share.steps; ++step) {
    head.result_done[cursor.slot].wait(cursor.parity);
    if (mine) {
      for (int b = 0; b < share.batch; ++b) {
        const int64_t t = share.token(step, b);
        if (t < share.tokens) {
          store_row(gradients + t * stride, row(cursor.slot, b), bytes, policy);
        }
      }
    }
    commit_stores();
    wait_stores_read<0>();
    __syncwarp();
    if (step + p.plan.slots < share.steps) {
      open(step + p.plan.slots, cursor.slot);
    }
    cursor.advance(p.plan.slots);
  }
  wait_stores();
}

template <int kQueryGroups, int kTiles, int kSourceGroups, class Source, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    attend_backward_kernel(const __grid_constant__ AttendBackwardParams<Gradient> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the launcher never runs it on any other architecture
  extern __shared__ __align__(128) char shared[];
  SharedHead& head = *reinterpret_cast<SharedHead*>(keep(shared));
  set_up(head, p.map, p.plan);

  // Registers a thread: 2 * compute + serve = 504 = 3 * 168, all that a CTA of 384 threads starts
  // with. Asking for more than that hangs.
  constexpr bool kManyWeights = kQueryGroups * kSourceGroups >= 4;
  constexpr int kServe = kManyWeights || (kQueryGroups == 3 && kTiles < 8)              ? 104
                         : kQueryGroups == 3 || kSourceGroups == 2 || kIsNarrow<Source> ? 88
                                                                                        : 72;
  constexpr int kCompute = (504 - kServe) / 2;
  if (warp_of_cta() >= kComputeWarps) {
    cutlass::arch::warpgroup_reg_dealloc<kServe>();
    const Share share(p.plan, p.tokens, p.dim);
    switch (static_cast<Role>(warp_of_cta())) {
      case Role::kLoad:
        load_steps<Source>(head, p.map, p.plan, share, p.inputs, p.scales, p.num_sources,
                           p.num_sources + p.num_queries, p.issued);
        break;
      case Role::kStore:
        attend_backward_store(p, head, share);
        break;
      case Role::kSoftmax:
      case Role::kSoftmaxOrScales:
        if (is_scale_warp<Source>(p.map)) {
          load_scales(head, p.map, p.plan, share, p.scales, p.num_sources);
        } else {
          attend_backward_softmax<kQueryGroups, kSourceGroups>(p, head, share);
        }
        break;
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kCompute>();
    if (warp_of_cta() < p.plan.warps) {
      const Share share(p.plan, p.tokens, p.dim);
      const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
      AttendBackwardWarp<kQueryGroups, kTiles, kSourceGroups, Source, Gradient> compute(
          p, head, share, sums);
      compute_steps(
          head, p.plan, share,
          [&](int step, RingCursor stage) { compute.products(step, stage.slot, share); },
          [&](int step, RingCursor stage, RingCursor result) {
            compute.gradients(step, stage.slot, result.slot, share);
          });
      compute.store_dqueries(share);
    }
  }
  if (p.plan.cluster > 1) {
    __syncwarp();
    cute::cluster_sync();  // peers may still be writing their sums here
  }
#endif
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_BACKWARD_CUH_
