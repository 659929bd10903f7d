// Backward of phase 1 on Hopper, in one pass over memory.
//
//   dh_s      = gate_s dout_s             p_sn = exp(logit_sn - lse_s)
//   dp_sn     = <dh_s, v_n>               delta_s = sum_n p_sn dp_sn
//   dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)              w_sn = scale dlogit_sn r_n
//   dv_n      = [dv_n +] sum_s p_sn dh_s + sum_s w_sn u_s - (sum_s dlogit_sn logit_sn)(r_n^2/D) v_n
//   du_s      = sum over t and n of w_sn v_n
//
// in    sources N x [T, D], dout S x [T, D] bfloat16, N <= 16, S <= 24; queries [S, D], lse [S, T],
//       logits [T, S * N], inv_rms [T, N], gate [S, T], dlse [S, T] float32 (the last two optional)
// out   dsources N x [T, D] bfloat16 or float32, overwritten or added to; partials
//       [clusters, S, D] float32: du summed over the tokens of a cluster
// bytes 2N + S units of T * D elements, 3N + S when accumulating; partials below 0.5 % of it
// sums  float32. What goes to the tensor cores besides bfloat16 inputs is split so that the storage
//       of dv alone limits its accuracy: p gate, w (for du) and the weight of v as a bfloat16 and
//       the bfloat16 of its remainder; u and w (for dv) as float16 with 11 bits, scaled by powers
//       of two, u by one of the warp's columns and w by one of the token
// bits  the same in every call on the same GPU model
//
// Roles and schedule: hopper_pipeline.cuh. P1 of a token is, for a warp's columns d in tiles of 16,
//
//   dout (s,d) v^T (d,n)                                                         16 queries a time
//
// and P2, from the same rows read transposed, for every eight sources
//
//   u^T (d,s) w (s,n)                                    float16, then scaled and added to old dv
//   [dout^T, dout^T, v^T, v^T] [p_hi; p_lo; c_hi; c_lo] (.,n)         c: diagonal, the weight of v
//   du (d,s) += [v^T, v^T] [w_hi; w_lo] (n,s)                         stays in registers to the end
//
// The queries stay in registers, too. Rows that fill up an mma tile repeat an existing row: in P1
// their sums are not stored, in P2 their weights are zero.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_BACKWARD_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_BACKWARD_CUH_

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/kernels/hopper_pipeline.cuh"

namespace flash_attn_res::cuda::hopper {

template <class Gradient>
struct AttendBackwardParams {
  RowTable<kSourcesMax + kQueriesMax> inputs;  // (N + S) x [T, D]: sources, then dout
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
            .weight_blocks = 5 * query_groups * source_groups + 2 * source_groups};
  }
};

/// Which block of a token's weights holds what. Each kind is (eights of k, eights of n).
template <int kQueryGroups, int kSourceGroups>
struct WeightBlocks {
  static constexpr int kPairs = kQueryGroups * kSourceGroups;

  // k = s, n = n: factors of dout, split in two
  static constexpr int prob(int s, int n) { return s * kSourceGroups + n; }
  static constexpr int prob_rest(int s, int n) { return kPairs + prob(s, n); }
  // k = s, n = n: factors of u, float16
  static constexpr int query(int s, int n) { return 2 * kPairs + prob(s, n); }
  // k = n = n, diagonal: factors of v, split in two
  static constexpr int key(int n) { return 3 * kPairs + n; }
  static constexpr int key_rest(int n) { return 3 * kPairs + kSourceGroups + n; }
  // k = n, n = s: factors of v in du, split in two
  static constexpr int dquery(int n, int s) {
    return 3 * kPairs + 2 * kSourceGroups + n * kQueryGroups + s;
  }
  static constexpr int dquery_rest(int n, int s) { return kPairs + dquery(n, s); }

  static constexpr int kCount = 5 * kPairs + 2 * kSourceGroups;
};

/// A lane's pairs of a token's weights: in registers where they fit beside the queries and du, else
/// read from shared memory at each use.
template <int kCount, bool kInRegisters>
class LaneWeights {
 public:
  explicit __device__ __forceinline__ LaneWeights(const uint32_t* lane_pairs)
      : shared_(lane_pairs) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        pairs_[i] = lane_pairs[i * kWarpLanes];
      }
    }
  }

  __device__ __forceinline__ uint32_t operator[](int block) const {
    if constexpr (kInRegisters) {
      return pairs_[block];
    } else {
      return *static_cast<const volatile uint32_t*>(shared_ + block * kWarpLanes);
    }
  }

 private:
  const uint32_t* shared_;
  uint32_t pairs_[kInRegisters ? kCount : 1];
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
    store_strip_transposed(rows_ + j * 32, {pack_bf16(value.c[0], value.c[1]),
                                            pack_bf16(value.c[2], value.c[3])});
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
template <int kQueryGroups, int kTiles, int kSourceGroups, class Gradient>
struct AttendBackwardWarp {
  using Blocks = WeightBlocks<kQueryGroups, kSourceGroups>;
  static constexpr int kRowPairs = (kQueryGroups + 1) / 2;
  static constexpr int kStrips = kQueryGroups + kSourceGroups;  // of a tile: dout, then sources
  // The queries and du take 6 registers for each tile and eight queries.
  static constexpr bool kWeightsInRegisters = 6 * kTiles * kQueryGroups + Blocks::kCount <= 164;

  const AttendBackwardParams<Gradient>& p;
  SharedHead& head;
  char* base;  // of shared memory
  const Sums& sums;
  int warp, lane;
  int strip_offset[(kStrips + 1) / 2];  // where this lane points at for a pair of strips
  Strip query[kTiles][kQueryGroups];    // (d, s) float16, divided by query_scale
  float query_scale;
  Accum du[kTiles][kQueryGroups];  // (d, s)

  __device__ __forceinline__ AttendBackwardWarp(const AttendBackwardParams<Gradient>& params,
                                                SharedHead& shared_head,
                                                const Share& share,
                                                const Sums& shared_sums)
      : p(params),
        head(shared_head),
        base(reinterpret_cast<char*>(&shared_head)),
        sums(shared_sums),
        warp(warp_of_cta()),
        lane(lane_of_warp()) {
#pragma unroll
    for (int pair = 0; pair < (kStrips + 1) / 2; ++pair) {
      const int wanted = 2 * pair + lane / 16;
      const int strip = wanted < kStrips ? wanted : kStrips - 1;
      const int i = row_in_strip(lane);
      const int s = min(strip * 8 + i, p.num_queries - 1);
      const int n = (strip - kQueryGroups) * 8 + i;
      const int row = strip < kQueryGroups ? p.num_sources + s : n < p.num_sources ? n : 0;
      strip_offset[pair] = row * p.map.pitch + (warp * kTiles * 16 + column_in_strip(lane)) * 2;
    }
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
    for (int s = 0; s < p.num_queries; ++s) {
      for (int i = lane; i < kTiles * 16; i += kWarpLanes) {
        greatest = fmaxf(greatest, fabsf(query_at(share, s, warp * kTiles * 16 + i)));
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

  /// Tile j of a token's inputs: strips of dout, then of the sources.
  template <bool kTransposed>
  __device__ __forceinline__ void load_tile(const char* token, int j, Strip (&strips)[kStrips]) const {
#pragma unroll
    for (int pair = 0; pair < (kStrips + 1) / 2; ++pair) {
      const char* place = token + strip_offset[pair] + j * 32;
      const int second = 2 * pair + 1 < kStrips ? 2 * pair + 1 : 0;
      if (2 * pair + 1 < kStrips) {
        if constexpr (kTransposed) {
          load_strips_transposed(place, strips[2 * pair], strips[second]);
        } else {
          load_strips(place, strips[2 * pair], strips[second]);
        }
      } else {
        if constexpr (kTransposed) {
          load_strip_transposed(place, strips[2 * pair]);
        } else {
          load_strip(place, strips[2 * pair]);
        }
      }
    }
  }

  /// P1 of a step: the warp's share of <dout_s, v_n>.
  __device__ __forceinline__ void products(int step, RingCursor stage) const {
    head.input_full[stage.slot].wait(stage.parity);
    const char* token = base + p.map.inputs + stage.slot * p.map.stage_bytes;
    for (int b = 0; b < p.plan.batch; ++b) {
      Accum acc[2][kRowPairs][kSourceGroups];  // two chains: consecutive tiles do not wait
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
          for (int n = 0; n < kSourceGroups; ++n) {
            acc[i][m][n] = Accum::zero();
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        Strip strips[kStrips];
        load_tile<false>(token, j, strips);
#pragma unroll
        for (int m = 0; m < kRowPairs; ++m) {
          const Strip none = {0, 0};
          const int h = 2 * m + 1 < kQueryGroups ? 2 * m + 1 : 0;
          const Strip bottom = 2 * m + 1 < kQueryGroups ? strips[h] : none;
#pragma unroll
          for (int n = 0; n < kSourceGroups; ++n) {
            mma_rows(acc[j % 2][m][n], strips[2 * m], bottom, strips[kQueryGroups + n]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          const int col = n * 8 + lane % 4 * 2;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int s = 16 * m + 8 * half + lane / 4;
            if (s < p.num_queries && col < sums.cols) {
              float* const row = sums.partial_row(step, warp, b * p.num_queries + s);
              *reinterpret_cast<float2*>(row + col) = {
                  acc[0][m][n].c[2 * half] + acc[1][m][n].c[2 * half],
                  acc[0][m][n].c[2 * half + 1] + acc[1][m][n].c[2 * half + 1]};
            }
          }
        }
      }
      token += (p.num_sources + p.num_queries) * p.map.pitch;
    }
    __syncwarp();
    if (lane == 0) {
      head.partials_full[pair_slot(step)].arrive();
    }
  }

  /// P2 of a step: dv_n of the warp's columns, and their share of du_s.
  __device__ __forceinline__ void gradients(int step, int input_slot, RingCursor result) {
    const int buffer = pair_slot(step);
    head.result_ready[result.slot].wait(result.parity);
    head.weights_full[buffer].wait(pair_parity(step));
    const char* token = base + p.map.inputs + input_slot * p.map.stage_bytes;
    char* slot = base + p.map.results + result.slot * p.map.slot_bytes;
    char* const scratch = base + p.map.scratch + warp * scratch_bytes_per_warp(kTiles);
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(base + p.map.weights) +
                            buffer * p.plan.batch * Blocks::kCount * kWarpLanes + lane;
    for (int b = 0; b < p.plan.batch; ++b) {
      const LaneWeights<Blocks::kCount, kWeightsInRegisters> weights(pairs);
      const float factor = head.weight_scale[buffer][b] * query_scale;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        Strip strips[kStrips];
        load_tile<true>(token, j, strips);
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          const GradientTile<Gradient> gradient(slot, scratch, p.map.result_pitch, 8 * n,
                                                p.num_sources, warp * kTiles * 16, lane);
          Accum from_queries = Accum::zero();  // (d, n)
#pragma unroll
          for (int s = 0; s + 1 < kQueryGroups; s += 2) {
            mma_columns_half(from_queries, query[j][s], query[j][s + 1],
                             weights[Blocks::query(s, n)], weights[Blocks::query(s + 1, n)]);
          }
          if constexpr (kQueryGroups % 2 == 1) {
            mma_columns_half(from_queries, query[j][kQueryGroups - 1],
                             weights[Blocks::query(kQueryGroups - 1, n)]);
          }
          Accum dv = p.accumulate ? gradient.load(j) : Accum::zero();  // (d, n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            dv.c[i] = fmaf(factor, from_queries.c[i], dv.c[i]);
          }
          // Pairs out of the sequence p_hi(0), p_hi(1), ..., p_lo(0), p_lo(1), ...
#pragma unroll
          for (int i = 0; i < kQueryGroups; ++i) {
            const auto weight = [&](int k) {
              return k < kQueryGroups ? weights[Blocks::prob(k, n)]
                                      : weights[Blocks::prob_rest(k - kQueryGroups, n)];
            };
            mma_columns(dv, strips[2 * i % kQueryGroups], strips[(2 * i + 1) % kQueryGroups],
                        weight(2 * i), weight(2 * i + 1));
          }
          const Strip v = strips[kQueryGroups + n];
          mma_columns(dv, v, v, weights[Blocks::key(n)], weights[Blocks::key_rest(n)]);
          gradient.store(j, dv);
        }
#pragma unroll
        for (int s = 0; s < kQueryGroups; ++s) {
          const Strip v = strips[kQueryGroups];
          if constexpr (kSourceGroups == 2) {
            const Strip w = strips[kQueryGroups + 1];
            mma_columns(du[j][s], v, w, weights[Blocks::dquery(0, s)],
                        weights[Blocks::dquery(1, s)]);
            mma_columns(du[j][s], v, w, weights[Blocks::dquery_rest(0, s)],
                        weights[Blocks::dquery_rest(1, s)]);
          } else {
            mma_columns(du[j][s], v, v, weights[Blocks::dquery(0, s)],
                        weights[Blocks::dquery_rest(0, s)]);
          }
        }
      }
      token += (p.num_sources + p.num_queries) * p.map.pitch;
      slot += p.num_sources * p.map.result_pitch;
      pairs += Blocks::kCount * kWarpLanes;
    }
    fence_before_bulk_copies();
    __syncwarp();
    if (lane == 0) {
      head.input_free[input_slot].arrive();
      head.result_done[result.slot].arrive();
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

/// Statistics of a token that the softmax warp reads ahead: those of a lane's query and sources.
template <int kSources>
struct TokenStatistics {
  float logit[kSources];
  float inv_rms[kSources];
  float lse, gate, dlse;

  template <class Gradient>
  __device__ __forceinline__ void load(const AttendBackwardParams<Gradient>& p, int64_t t, int s,
                                       int first_source) {
    const float* const logits = p.logits + t * p.logits_stride + s * p.num_sources + first_source;
    const float* const rms = p.inv_rms + t * p.inv_rms_stride + first_source;
#pragma unroll
    for (int n = 0; n < kSources; ++n) {
      const bool exists = first_source + n < p.num_sources;
      logit[n] = exists ? __ldg(logits + n) : -INFINITY;  // so that p is 0
      inv_rms[n] = exists ? __ldg(rms + n) : 0.0f;
    }
    lse = __ldg(p.lse + s * p.lse_stride + t);
    gate = p.gate != nullptr ? __ldg(p.gate + s * p.gate_stride + t) : 1.0f;
    dlse = p.dlse != nullptr ? __ldg(p.dlse + s * p.dlse_stride + t) : 0.0f;
  }
};

/// One of the sums that a lane held, added up over lanes.
struct ScatteredSum {
  float value;
  int index;  // which one
};

/// Adds up `values` over the lanes that differ in the bits from `kOffset` to 16. While a lane carries
/// more than one value, each step halves them: it keeps one half and sends the other.
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

/// The softmax warp: from <dout, v> and the statistics of the forward to the weights of P2.
template <int kQueryGroups, int kSourceGroups, class Gradient>
__device__ __forceinline__ void attend_backward_softmax(const AttendBackwardParams<Gradient>& p,
                                                        SharedHead& head, const Share& share) {
  using Blocks = WeightBlocks<kQueryGroups, kSourceGroups>;
  using Lane = SoftmaxLane<kQueryGroups, kSourceGroups>;
  constexpr int kSources = Lane::kSources;
  const int lane = lane_of_warp();
  const Lane mine(lane);
  const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
  const bool active = mine.query < p.num_queries;
  const int s = min(mine.query, p.num_queries - 1);
  const int sources = p.num_sources - mine.first_source;  // those of this lane that exist: n < it
  const float key_factor = -1.0f / static_cast<float>(p.dim);
  uint32_t* const all_weights =
      reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&head) + p.map.weights);

  TokenStatistics<kSources> next;
  next.load(p, share.clamped(share.token(0, 0)), s, mine.first_source);
  for (int step = 0; step < share.steps; ++step) {
    const int buffer = pair_slot(step);
    for (int b = 0; b < share.batch; ++b) {
      const TokenStatistics<kSources> now = next;
      const bool exists = active && share.token(step, b) < share.tokens;
      float prob[kSources];
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        // ex2.approx: 2 ulp of the exponential, on arguments that are at most 0.
        prob[n] = exists ? __expf(now.logit[n] - now.lse) : 0.0f;
      }
      if (b == 0) {
        head.partials_full[buffer].wait(pair_parity(step));
        sums.exchange(head, step, lane);
      }
      const bool last = b == share.batch - 1;
      if (!last || step + 1 < share.steps) {
        next.load(p, share.clamped(last ? share.token(step + 1, 0) : share.token(step, b + 1)), s,
                  mine.first_source);
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
        const float r = now.inv_rms[n];
        weight[n] = p.scale * gradient * r;
        greatest = fmaxf(greatest, fabsf(weight[n]));
        key_weight[n] =
            exists && n < sources ? gradient * now.logit[n] * (r * r * key_factor) : 0.0f;
      }
      const ScatteredSum key = sum_scattered<Lane::kParts>(key_weight, lane);
#pragma unroll
      for (int offset = 1; offset < kWarpLanes; offset *= 2) {
        greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, offset));
      }
      const PowerOfTwo power = PowerOfTwo::of(greatest);

      uint32_t* const weights =
          all_weights + (buffer * share.batch + b) * Blocks::kCount * kWarpLanes;
      const auto block = [&](int index) { return weights + index * kWarpLanes; };
      if (active) {
        const int g = s / 8;
#pragma unroll
        for (int n = 0; n < kSources; ++n) {
          const int k = mine.first_source + n;
          const int h = k / 8;
          const float factor = prob[n] * now.gate;
          set_weight(block(Blocks::prob(g, h)), s, k, bf16_bits(factor));
          set_weight(block(Blocks::prob_rest(g, h)), s, k, bf16_bits(bf16_remainder(factor)));
          set_weight(block(Blocks::query(g, h)), s, k, half_bits(weight[n] * power.inverse));
          if (n % 2 == 0) {
            block(Blocks::dquery(h, g))[weight_pair(k, s)] = pack_bf16(weight[n], weight[n + 1]);
            block(Blocks::dquery_rest(h, g))[weight_pair(k, s)] =
                pack_bf16(bf16_remainder(weight[n]), bf16_remainder(weight[n + 1]));
          }
        }
      }
      // Lanes that hold the same sum write the same bits.
      const int n = mine.first_source + key.index;
      set_weight(block(Blocks::key(n / 8)), n, n, bf16_bits(key.value));
      set_weight(block(Blocks::key_rest(n / 8)), n, n, bf16_bits(bf16_remainder(key.value)));
      if (lane == 0) {
        head.weight_scale[buffer][b] = power.value;
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
                                                      SharedHead& head,
                                                      const Share& share) {
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
      commit_stores_and_wait_read();
    }
    __syncwarp();
    if (step + p.plan.slots < share.steps) {
      open(step + p.plan.slots, cursor.slot);
    }
    cursor.advance(p.plan.slots);
  }
  wait_stores();
}

template <int kQueryGroups, int kTiles, int kSourceGroups, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    attend_backward_kernel(const __grid_constant__ AttendBackwardParams<Gradient> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the launcher never runs it on any other architecture
  extern __shared__ __align__(128) char shared[];
  SharedHead& head = *reinterpret_cast<SharedHead*>(shared);
  set_up(head, p.map, p.plan);

  // Registers a thread: 2 * compute + serve = 504 = 3 * 168, all that a CTA of 384 threads starts
  // with. Asking for more than that hangs.
  constexpr int kServe = kSourceGroups == 2 ? (kQueryGroups == 2 ? 120 : 104)
                                            : (kQueryGroups == 3 ? 88 : 72);
  constexpr int kCompute = (504 - kServe) / 2;
  if (warp_of_cta() >= kComputeWarps) {
    cutlass::arch::warpgroup_reg_dealloc<kServe>();
    const Share share(p.plan, p.tokens, p.dim);
    switch (static_cast<Role>(warp_of_cta())) {
      case Role::kLoad:
        load_steps(head, p.map, p.plan, share, p.inputs, p.num_sources + p.num_queries, p.issued);
        break;
      case Role::kSoftmax:
        attend_backward_softmax<kQueryGroups, kSourceGroups>(p, head, share);
        break;
      case Role::kStore:
        attend_backward_store(p, head, share);
        break;
      case Role::kPace:
        pace_steps(head, p.plan, share, p.inputs, p.num_sources + p.num_queries, p.issued);
        break;
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kCompute>();
    if (warp_of_cta() < p.plan.warps) {
      const Share share(p.plan, p.tokens, p.dim);
      const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
      AttendBackwardWarp<kQueryGroups, kTiles, kSourceGroups, Gradient> compute(p, head, share, sums);
      RingCursor ahead;   // stage of P1
      RingCursor behind;  // stage of P2
      RingCursor result;
      for (int step = -1; step < share.steps; ++step) {
        if (step + 1 < share.steps) {
          compute.products(step + 1, ahead);
          ahead.advance(p.plan.stages);
        }
        if (step >= 0) {
          compute.gradients(step, behind.slot, result);
          behind.advance(p.plan.stages);
          result.advance(p.plan.slots);
        }
      }
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
