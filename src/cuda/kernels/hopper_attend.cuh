// Phase 1 on Hopper: S queries over N sources in one pass, at the speed of memory.
//
//   r_n = rsqrt(mean(v_n^2) + eps)     logit_sn = scale r_n <u_s, v_n>
//   p_s = softmax_n(logit_s)           lse_s = logsumexp_n(logit_s)      out_s = sum_n p_sn v_n
//
// in    sources N x [T, D], N <= 16, in bfloat16, float16 with or without scales, or float8 with
//       scales; queries [S, D] float32, S <= 24
// out   out S x [T, D] bfloat16, or float16 where the sources are not bfloat16; lse [S, T],
//       logits [T, S * N], inv_rms [T, N] float32 (the last two optional)
// bytes N + S units of T * D elements, a float8 source half a unit; all else is below 1 % of it,
//       scales of float8 below 1 % of its sources
// sums  float32. bfloat16 products are exact; queries and probabilities go to the tensor cores as
//       a bfloat16 and the bfloat16 of its remainder, so that 16 bits of them count
// bits  the same in every call, and for a token whatever the other tokens are
//
// Roles and schedule: hopper_pipeline.cuh. P1 of a token is, for a warp's columns d in tiles of 16,
//
//   [u_hi; u_lo] (16,d) v^T (d,8),  v (8,d) v^T (d,8)      the diagonal of the latter is sum v^2
//
// or with four queries at most [u_hi; u_lo; v] (16,d) v^T (d,8) (hopper_attend_params.cuh),
// and P2
//
//   v^T (d,n) p_hi (n,8)  +  v^T (d,n) p_lo (n,8)                 for every eight queries
//
// Both read the sources from shared memory by ldmatrix, plain and transposed. The queries stay in
// registers. Rows that fill up an mma tile repeat an existing row: in P1 their sums are not stored,
// in P2 their weights are zero. float16 and float8 sources have compute warps of their own:
// hopper_attend_half.cuh.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_CUH_

#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "cuda/device/grid.cuh"
#include "cuda/kernels/hopper_attend_half.cuh"
#include "cuda/kernels/hopper_attend_params.cuh"
#include "cuda/kernels/hopper_pipeline.cuh"

namespace flash_attn_res::cuda::hopper {

/// What one compute warp does.
template <int kRoom, int kTiles, int kSourceGroups>
struct AttendWarp {
  static constexpr int kQueryGroups = query_groups_of(kRoom);
  static constexpr WeightMap kWeights = weight_map(kQueryGroups, kSourceGroups);
  static constexpr int kTogether = tokens_together(kRoom, kSourceGroups);

  const AttendParams& p;
  SharedHead& head;
  char* base;  // of shared memory
  const Sums& sums;
  int warp, lane;
  Strip high[kTiles][kQueryGroups], low[kTiles][kQueryGroups];  // queries of this warp's columns

  __device__ __forceinline__ AttendWarp(const AttendParams& params, SharedHead& shared_head,
                                        const Share& share, const Sums& shared_sums)
      : p(params),
        head(shared_head),
        base(reinterpret_cast<char*>(&shared_head)),
        sums(shared_sums),
        warp(warp_of_cta()),
        lane(lane_of_warp()) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        const int s = query_of_row<kRoom>(g, lane / 4);
        const int col = (warp * kTiles + j) * 16 + lane % 4 * 2;
        const float* query = p.queries + s * p.queries_stride + share.column;  // (columns)
        const auto at = [&](int c) {
          return s < p.num_queries && c < share.columns ? query[c] : 0.0f;
        };
        const SplitPair left = SplitPair::of(at(col), at(col + 1));
        const SplitPair right = SplitPair::of(at(col + 8), at(col + 9));
        high[j][g] = {rounded_of_row<kRoom>(left, lane / 4),
                      rounded_of_row<kRoom>(right, lane / 4)};
        low[j][g] = {left.low, right.low};
      }
    }
  }

  /// Of the first of some tokens; of the others token_bytes further on.
  __device__ __forceinline__ WideTiles<kSourceGroups> tiles(int stage, int b) const {
    return {base + p.map.inputs + stage * p.map.stage_bytes + b * p.map.token_bytes +
                warp * kTiles * 32,
            p.map.pitch, p.num_sources, lane};
  }

  /// P1 of a step: the warp's share of <u_s, v_n> and of <v_n, v_n>.
  __device__ __forceinline__ void scores(int step, int stage) const {
    for_tokens<kTogether>(p.plan.batch,
                          [&](auto tokens, int b) { scores_of<tokens>(step, stage, b); });
    __syncwarp();
    if (lane == 0) {
      head.partials_full[p.plan.buffer(step)].arrive();
    }
  }

  /// P1 of the tokens from b on.
  template <int kTokens>
  __device__ __forceinline__ void scores_of(int step, int slot, int b) const {
    constexpr int kAtOnce = 4 / (kTokens * kSourceGroups);
    ScoreProducts<kRoom, kSourceGroups> products[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      products[t].clear();
    }
    const WideTiles<kSourceGroups> source = tiles(slot, b);
    float* const token = sums.partial_row(step, warp, b * (p.num_queries + 1));
    for_batches<kTiles, kAtOnce, TileBatch<Strip, kTokens, kAtOnce, kSourceGroups>>(
        [&](int first, auto& v) {  // (n, d)
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            source.at(t * p.map.token_bytes).template load<false, kTiles>(first, lane, v.of[t]);
          }
        },
        [&](int first, const auto& v) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
              if (first + i < kTiles) {
                products[t].template add<false>(first + i, high[first + i], low[first + i],
                                                v.of[t][i]);
              }
            }
          }
        });
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      products[t].scores().store(token + t * (p.num_queries + 1) * sums.cols, p.num_queries,
                                 sums.cols, lane);
    }
  }

  /// P2 of a step: out_s of the warp's columns.
  __device__ __forceinline__ void mix(int step, int stage, int slot) const {
    for_tokens<kTogether>(p.plan.batch,
                          [&](auto tokens, int b) { mix_of<tokens>(step, stage, slot, b); });
    fence_before_bulk_copies();
    __syncwarp();
    if (lane == 0) {
      head.input_free[stage].arrive();
      head.result_done[slot].arrive();
    }
  }

  /// P2 of the tokens from b on.
  template <int kTokens>
  __device__ __forceinline__ void mix_of(int step, int input_slot, int result_slot, int b) const {
    const float* const weights = reinterpret_cast<const float*>(base + p.map.weights) +
                                 (p.plan.buffer(step) * p.plan.batch + b) * kWeights.forward +
                                 lane / 4 * kWeights.pitch + lane % 4 * 2;  // (batch, S, pitch)
    SplitPair prob[kTokens][kSourceGroups][kQueryGroups];                   // (n, s)
    char* target[kTokens][kQueryGroups];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      char* const slot = base + p.map.results + result_slot * p.map.slot_bytes +
                         (b + t) * p.num_queries * p.map.result_pitch;
      char* const scratch = base + p.map.scratch + warp * scratch_bytes_per_warp(kTiles);
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          const float2 pair = *reinterpret_cast<const float2*>(weights + t * kWeights.forward +
                                                               8 * g * kWeights.pitch + 8 * n);
          prob[t][n][g] = SplitPair::of(pair.x, pair.y);
        }
        const int s = 8 * g + row_in_strip(lane);
        target[t][g] =
            s < p.num_queries
                ? slot + s * p.map.result_pitch + (warp * kTiles * 16 + column_in_strip(lane)) * 2
                : scratch + row_in_strip(lane) * 32 + column_in_strip(lane) * 2;
      }
    }
    constexpr int kAtOnce = kQueryGroups == 1 ? 4 / (kTokens * kSourceGroups) : 2;
    const WideTiles<kSourceGroups> source = tiles(input_slot, b);
    for_batches<kTiles, kAtOnce, TileBatch<Strip, kTokens, kAtOnce, kSourceGroups>>(
        [&](int first, auto& v) {  // (d, n)
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            source.at(t * p.map.token_bytes).template load<true, kTiles>(first, lane, v.of[t]);
          }
        },
        [&](int first, const auto& v) {
          Accum out[kTokens][kAtOnce][kQueryGroups];  // (d, s)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
#pragma unroll
              for (int g = 0; g < kQueryGroups; ++g) {
                if (first + i < kTiles) {
                  Accum& sum = out[t][i][g];
                  sum = Accum::zero();
                  const Strip(&a)[kSourceGroups] = v.of[t][i];
                  if constexpr (kSourceGroups == 2) {
                    mma_columns(sum, a[0], a[1], prob[t][0][g].high, prob[t][1][g].high);
                    mma_columns(sum, a[0], a[1], prob[t][0][g].low, prob[t][1][g].low);
                  } else {
                    mma_columns(sum, a[0], prob[t][0][g].high);
                    mma_columns(sum, a[0], prob[t][0][g].low);
                  }
                }
              }
            }
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
#pragma unroll
              for (int g = 0; g < kQueryGroups; ++g) {
                if (first + i < kTiles) {
                  const float(&c)[4] = out[t][i][g].c;
                  store_strip_transposed(target[t][g] + (first + i) * 32,
                                         {pack_bf16(c[0], c[1]), pack_bf16(c[2], c[3])});
                }
              }
            }
          }
        });
  }
};

template <int kCount>
__device__ __forceinline__ void store_statistics(float* row, const float (&values)[kCount],
                                                 int count) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    if (n < count) {
      row[n] = values[n];
    }
  }
}

/// A softmax warp: from sums of products to probabilities and statistics. With eight queries or
/// fewer it takes as many tokens at once as its eight rows of lanes have room for.
template <int kQueryGroups, int kSourceGroups>
__device__ __forceinline__ void attend_softmax(const AttendParams& p, SharedHead& head,
                                               const Share& share) {
  using Lane = SoftmaxLane<kQueryGroups, kSourceGroups>;
  constexpr int kSources = Lane::kSources;
  constexpr WeightMap kWeights = weight_map(kQueryGroups, kSourceGroups);
  const int lane = lane_of_warp();
  const Lane mine(lane);
  const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
  const int at_once = kQueryGroups == 1 ? min(8 / p.num_queries, share.batch) : 1;  // tokens
  const int own_token = kQueryGroups == 1 ? mine.query / p.num_queries : 0;         // of these
  const int own_query = mine.query - own_token * p.num_queries;
  const bool active = own_token < at_once && own_query < p.num_queries;
  const int s = active ? own_query : 0;
  const int sources = p.num_sources - mine.first_source;  // those of this lane that exist: n < it
  const float mean_factor = 1.0f / static_cast<float>(p.dim);
  float* const all_weights =
      reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + p.map.weights);
  for (int step = first_softmax_step(p.plan, share.steps); step < share.steps;
       step += p.plan.softmax_warps) {
    head.partials_full[p.plan.buffer(step)].wait(p.plan.phase(step));
    sums.send(head, step, lane);
    sums.receive(head, step);
    for (int first = 0; first < share.batch; first += at_once) {  // divides the batch, or is 8 / S
      const int b = min(first + (active ? own_token : 0), share.batch - 1);
      const bool exists = active && first + own_token < share.batch;
      const int row = b * (p.num_queries + 1);
      float inv_rms[kSources], logit[kSources], prob[kSources];
      sums.read(step, row + p.num_queries, mine.first_source, inv_rms);
      sums.read(step, row + s, mine.first_source, logit);
      float greatest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        inv_rms[n] = rsqrtf(fmaf(inv_rms[n], mean_factor, p.eps));
        logit[n] = n < sources ? p.scale * inv_rms[n] * logit[n] : -INFINITY;
        greatest = fmaxf(greatest, logit[n]);
      }
      greatest = Lane::max(greatest);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        // ex2.approx: 2 ulp of the exponential, on arguments that are at most 0.
        prob[n] = n < sources ? __expf(logit[n] - greatest) : 0.0f;
        sum += prob[n];
      }
      sum = Lane::sum(sum);
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kSources; ++n) {
        prob[n] *= inverse;
      }
      if (exists) {
        store_vector(all_weights + (p.plan.buffer(step) * share.batch + b) * kWeights.forward +
                         s * kWeights.pitch + mine.first_source,
                     prob);
      }
      if (first + at_once >= share.batch) {
        __syncwarp();
        if (lane == 0) {
          head.weights_full[p.plan.buffer(step)].arrive();
        }
      }
      const int64_t t = share.token(step, b);
      if (share.rank == 0 && exists && t < share.tokens) {
        if (mine.first_source == 0) {
          p.lse[s * p.lse_stride + t] = greatest + logf(sum);
        }
        if (p.logits != nullptr) {
          store_statistics(p.logits + t * p.logits_stride + s * p.num_sources + mine.first_source,
                           logit, sources);
        }
        if (p.inv_rms != nullptr && s == 0) {
          store_statistics(p.inv_rms + t * p.inv_rms_stride + mine.first_source, inv_rms, sources);
        }
      }
    }
  }
}

/// The store warp: finished steps out of the ring of results.
__device__ __forceinline__ void attend_store(const AttendParams& p, SharedHead& head,
                                             const Share& share) {
  const int lane = lane_of_warp();
  const CachePolicy policy(p.plan.store_hint);
  const LaneRows out(p.out, p.num_queries, share.column, lane);
  const char* const results = reinterpret_cast<const char*>(&head) + p.map.results;
  if (lane == 0) {
    for (int slot = 0; slot < p.plan.slots; ++slot) {
      head.result_ready[slot].arrive();
    }
  }
  const auto give_back = [&](int slot) {
    __syncwarp();
    if (lane == 0) {
      head.result_ready[slot].arrive();
    }
  };
  // A step's results are on their way out while the next step's are taken up, if those are there.
  RingCursor cursor;
  int leaving = -1;  // the slot whose results have not all been read
  for (int step = 0; step < share.steps; ++step) {
    const bool next_is_there =
        __all_sync(0xffffffffu, head.result_done[cursor.slot].test(cursor.parity));
    if (leaving >= 0 && !next_is_there) {
      wait_stores_read<0>();
      give_back(leaving);
      leaving = -1;
    }
    head.result_done[cursor.slot].wait(cursor.parity);
    if (lane < p.num_queries) {
      const char* row = results + cursor.slot * p.map.slot_bytes + lane * p.map.result_pitch;
      for (int b = 0; b < share.batch; ++b, row += p.num_queries * p.map.result_pitch) {
        const int64_t t = share.token(step, b);
        if (t < share.tokens) {
          store_row(const_cast<char*>(out.at(0, t)), row, share.columns * 2, policy);
        }
      }
    }
    commit_stores();
    if (leaving >= 0) {
      wait_stores_read<1>();
      give_back(leaving);
    }
    leaving = cursor.slot;
    cursor.advance(p.plan.slots);
  }
  wait_stores();
}

template <int kRoom, int kTiles, int kSourceGroups, class Source>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ AttendParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the launcher never runs it on any other architecture
  extern __shared__ __align__(128) char shared[];
  SharedHead& head = *reinterpret_cast<SharedHead*>(keep(shared));
  set_up(head, p.map, p.plan);
  wait_for_previous_grid();
  begin_next_grid();

  constexpr int kQueryGroups = query_groups_of(kRoom);
  // Registers a thread: 2 * compute + serve = 504 = 3 * 168, all that a CTA of 384 threads starts
  // with. Asking for more than that hangs.
  constexpr int kServe =
      !std::is_same_v<Source, Bf16> || (kQueryGroups == 3 && kSourceGroups == 2) ? 104 : 88;
  constexpr int kCompute = (504 - kServe) / 2;
  if (warp_of_cta() >= kComputeWarps) {
    cutlass::arch::warpgroup_reg_dealloc<kServe>();
    const Share share(p.plan, p.tokens, p.dim);
    switch (static_cast<Role>(warp_of_cta())) {
      case Role::kLoad:
        load_steps<Source>(head, p.map, p.plan, share, p.sources, p.scales, p.num_sources,
                           p.num_sources, p.issued);
        break;
      case Role::kStore:
        attend_store(p, head, share);
        break;
      case Role::kSoftmax:
      case Role::kSoftmaxOrScales:
        if (is_scale_warp<Source>(p.map)) {
          load_scales(head, p.map, p.plan, share, p.scales, p.num_sources);
        } else {
          attend_softmax<kQueryGroups, kSourceGroups>(p, head, share);
        }
        break;
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kCompute>();
    if (warp_of_cta() < p.plan.warps) {
      const Share share(p.plan, p.tokens, p.dim);
      const Sums sums(head, p.map, p.plan, p.extents(), share.rank);
      using Warp =
          std::conditional_t<std::is_same_v<Source, Bf16>, AttendWarp<kRoom, kTiles, kSourceGroups>,
                             AttendHalfWarp<kRoom, kTiles, kSourceGroups, Source>>;
      const Warp compute(p, head, share, sums);
      compute_steps(
          head, p.plan, share,
          [&](int step, RingCursor stage) { compute.scores(step, stage.slot); },
          [&](int step, RingCursor stage, RingCursor result) {
            compute.mix(step, stage.slot, result.slot);
          });
    }
  }
  if (p.plan.cluster > 1) {
    __syncwarp();
    cute::cluster_sync();  // peers may still be writing their sums here
  }
#endif
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_CUH_
