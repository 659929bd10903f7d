// Backward of `read` on Hopper: a cluster of CTAs a token, its rows brought into shared memory by
// bulk copies, one exchange of sums.
//
//   p = softmax(logits)       h = sum_j p_j z_j                  rh = mix_inv_rms
//   w = dmix + dx             (no norm)          dh = w
//   w = dmix + rh g dx        (norm)             dh = w - along h,  along = (rh^3 / D) <g dx, h>
//   dp_j      = <dh, z_j> = <w, z_j> - along <h, z_j>
//   delta     = sum_j p_j dp_j                   dlogit_j = p_j (dp_j - delta)
//   dz_j      = p_j dh + scale dlogit_j r_j u - dlogit_j logit_j (r_j^2 / R) k_j
//   du        = sum_t,j scale dlogit_j r_j k_j   dg = sum_t rh dx h
//
// The second form of dp_j needs no dh: all 2K + 1 sums over D, <w, z_j>, <h, z_j> and <g dx, h>,
// are formed in one sweep (K without norm), and a token has one point where all must meet.
//
// in    K terms, dx, dmix [T, D] 16-bit; dpartial_out, and dsources where they are added to [T, D]
//       16-bit or float; logits, inv_rms [T, K], rh [T], u [R] float; g [D] any
// out   dsources, dpartial [T, D] 16-bit or float; dphase1_out, dh [T, D]; dphase1_lse, gate [T]
// float;
//       du and dg of a cluster's tokens [clusters, D] float, summed by reduce_partials
// bytes K + 1 units of T * D elements read, K written, one more each that is accumulated
// sums  float32: the 256 columns of a warp by a butterfly, then warps, then CTAs in order. du, dg
//       stay in registers over all tokens of a cluster, whose number depends on T and the device
//
// Work of a CTA, which has `columns` of a token's D columns:
//
//   compute       P1(i + 1): that token's sums over the warp's columns; then P2(i): the
//    warps        gradients of token i. A lane has one chunk of 8 columns. This order hides the
//                 weight warp's work, and with a cluster the way there and back, behind P1(i + 1).
//                 w and h are formed in both: registers for them would cost a third of the warps
//   weight warp   p of tokens to come; sums of token i over the warps and the cluster, and what
//                 follows from them: the factors in dz_j, a lane a term
//   load warp     one bulk copy a row into the ring, ahead as far as the ring is deep, but not so
//                 far that this cluster leads the others: see `Window`
//
// A token's rows are all in shared memory before any of its results is stored: results may take the
// place of what they are computed from.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_BACKWARD_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_BACKWARD_CUH_

#include <cstdint>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/chunk.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/hopper_barrier.cuh"
#include "cuda/device/hopper_copy.cuh"
#include "cuda/device/hopper_window.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/hopper_read_backward_plan.h"
#include "cuda/kernels/read_params.h"

namespace flash_attn_res::cuda::hopper {

/// Rows that are loaded for each token: first all of 16-bit values, then those of float32.
struct ReadBackwardInputs {
  static constexpr int kCapacity = 3 * 32;
  const char* data[kCapacity];
  int64_t stride_bytes[kCapacity];
  int narrow, wide;  // numbers of rows
  // Place of a row; the terms are 0 .. K - 1.
  int dx, dmix, dpartial, dsources;
};

struct HopperReadBackwardParams {
  ReadBackwardParams<kReadTermsMax> read;
  ReadBackwardInputs inputs;
  ReadBackwardPlan plan;
  ReadBackwardMap map;
  float inv_dim;                                         // 1 / D
  int64_t dsources_stride_bytes;                         // of every one of dsources
  bool wide_dsources, wide_dpartial_out, wide_dpartial;  // float32
  int num_sources;                                       // N
  int* issued;                                           // of Window; in any state at the start
};

struct ReadBackwardHead {
  Barrier full[kReadStagesMax];  // a token's rows have been loaded
  Barrier free[kReadStagesMax];  // all compute warps are done with them
  Barrier probs_full[2];         // the weight warp has stored p and rh
  Barrier partials_full[2];      // all compute warps have stored their sums
  Barrier totals_full[2];        // the sums of all CTAs of the cluster are here
  Barrier weights_full[2];       // the weight warp has stored the weights
  uint4 zeros;                   // a chunk of the keys outside their slice
};
static_assert(sizeof(ReadBackwardHead) <= kReadHeadBytes);

/// Sums over D of a token with K terms: <w, z_j> and with a norm <h, z_j> side by side for each
/// term, then with a norm <g dx, h>, rounded up to 16 bytes.
template <bool kNorm>
struct SumMap {
  static constexpr int kPerTerm = kNorm ? 2 : 1;

  FLASH_ATTN_RES_HOPPER_BOTH static int y_dot_h(int terms) { return kPerTerm * terms; }
  FLASH_ATTN_RES_HOPPER_BOTH static int count(int terms) {
    return (kPerTerm * terms + (kNorm ? 1 : 0) + 3) / 4 * 4;
  }
};

/// What all warps know: which tokens and columns are theirs, and where shared memory is.
struct ReadBackwardCta {
  ReadBackwardHead& head;
  float* stats;     // (stages, 2 K + 1)
  float* probs;     // (2, K + 1)
  float4* weights;  // (2, K + 1)
  float* partials;  // (2, warps, sums)
  float* totals;    // (2, cluster, sums)
  float4* vectors;  // (2, 2, columns / 8)
  char* ring;       // (stages, bytes of a token)
  int rank, cluster;
  int first_column, columns;

  __device__ __forceinline__ ReadBackwardCta(char* shared, const HopperReadBackwardParams& p)
      : head(*reinterpret_cast<ReadBackwardHead*>(shared)),
        stats(reinterpret_cast<float*>(shared + p.map.stats)),
        probs(reinterpret_cast<float*>(shared + p.map.probs)),
        weights(reinterpret_cast<float4*>(shared + p.map.weights)),
        partials(reinterpret_cast<float*>(shared + p.map.partials)),
        totals(reinterpret_cast<float*>(shared + p.map.totals)),
        vectors(reinterpret_cast<float4*>(shared + p.map.vectors)),
        ring(shared + p.map.ring),
        rank(p.plan.cluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0),
        cluster(static_cast<int>(blockIdx.x) / p.plan.cluster),
        first_column(rank * p.plan.columns),
        columns(min(p.plan.columns, p.read.dim - first_column)) {}

  /// Tokens are dealt to the clusters in turn, one a step.
  __device__ __forceinline__ int64_t token(int step, const HopperReadBackwardParams& p) const {
    return cluster + static_cast<int64_t>(step) * p.plan.clusters;
  }
  __device__ __forceinline__ int steps(const HopperReadBackwardParams& p) const {
    return static_cast<int>((p.read.tokens - cluster + p.plan.clusters - 1) / p.plan.clusters);
  }
};

// ------------------------------------------------------------------------------------- load warp

__device__ __forceinline__ void load_tokens(const HopperReadBackwardParams& p,
                                            const ReadBackwardCta& cta, int lane) {
  const int rows = p.inputs.narrow + p.inputs.wide;
  const CachePolicy policy(CacheHint::kEvictNormal);
  const int total = cta.columns * (2 * p.inputs.narrow + 4 * p.inputs.wide);
  Window window(p.issued, p.plan.lead, p.plan.stages * p.plan.clusters);
  RingCursor cursor;
  int steps_to_look = p.plan.stages;
  for (int64_t t = cta.cluster; t < p.read.tokens; t += p.plan.clusters, --steps_to_look) {
    Barrier& full = cta.head.full[cursor.slot];
    cta.head.free[cursor.slot].wait(cursor.parity ^ 1);  // passes at once in the first round
    if (steps_to_look == 0) {
      steps_to_look = p.plan.look;
      if (lane == 0) {
        window.wait(t);
        if (cta.rank == 0) {
          window.count(p.plan.look);
        }
      }
    }
    if (lane == 0) {
      full.arrive_and_expect(total);
    }
    __syncwarp();
    char* const stage = cta.ring + cursor.slot * p.map.stage_bytes;
    for (int row = lane; row < rows; row += kWarp) {
      const int wide = max(row - p.inputs.narrow, 0);
      const int size = row < p.inputs.narrow ? 2 : 4;
      const int place = ((row - wide) * 2 + wide * 4) * p.plan.columns;
      const char* const from =
          p.inputs.data[row] + t * p.inputs.stride_bytes[row] + cta.first_column * size;
      load_row(stage + place, from, cta.columns * size, full, policy);
    }
    __syncwarp();
    cursor.advance(p.plan.stages);
  }
}

// ----------------------------------------------------------------------------------- weight warp

/// What the weight warp knows of a token, term l in lane l.
struct TermStatistics {
  float logit, inv_rms, inv_rms_mix, prob;
};

/// The weight warp. Its own copies bring the statistics in, several tokens ahead; `send` and
/// `receive` lie a token apart, so that the way through the cluster takes nobody's time.
template <bool kNorm>
struct ReadBackwardWeights {
  const HopperReadBackwardParams& p;
  const ReadBackwardCta& cta;
  const int lane, K, num_sums;

  __device__ __forceinline__ ReadBackwardWeights(const HopperReadBackwardParams& params,
                                                 const ReadBackwardCta& shared, int lane_of_warp)
      : p(params),
        cta(shared),
        lane(lane_of_warp),
        K(params.read.num_terms),
        num_sums(SumMap<kNorm>::count(params.read.num_terms)) {}

  __device__ __forceinline__ int64_t token(int step) const { return cta.token(step, p); }

  __device__ __forceinline__ float* stats(int step) const {
    return cta.stats + step % kReadStatsStages * (2 * K + 1);
  }

  /// Starts copying the statistics of a step.
  __device__ __forceinline__ void fetch(int step) const {
    const int64_t t = token(step);
    if (t < p.read.tokens) {
      float* const to = stats(step);
      if (lane < K) {
        copy_float(to + lane, &p.read.logits.at(t, lane));
        copy_float(to + K + lane, &p.read.inv_rms.at(t, lane));
      }
      if (kNorm && lane == 0) {
        copy_float(to + 2 * K, &p.read.mix_inv_rms.at(0, t));
      }
    }
    commit_copies();  // also when empty: groups are counted
  }

  /// p of a step, here and for the compute warps.
  __device__ __forceinline__ TermStatistics weigh(int step) const {
    wait_copies<kReadStatsStages - 1>();
    __syncwarp();
    const float* const from = stats(step);
    TermStatistics s = {.logit = lane < K ? from[lane] : -INFINITY,
                        .inv_rms = lane < K ? from[K + lane] : 0.0f,
                        .inv_rms_mix = kNorm ? from[2 * K] : 1.0f,
                        .prob = 0.0f};
    __syncwarp();
    fetch(step + kReadStatsStages);
    const float largest = warp_max(s.logit);
    const float weight = lane < K ? __expf(s.logit - largest) : 0.0f;
    s.prob = __fdividef(weight, warp_sum(weight));
    float* const probs = cta.probs + pair_slot(step) * (K + 1);
    if (lane < K) {
      probs[lane] = s.prob;
    }
    if (lane == 0) {
      probs[K] = s.inv_rms_mix;
    }
    __syncwarp();
    if (lane == 0) {
      cta.head.probs_full[pair_slot(step)].arrive();
    }
    return s;
  }

  /// Sums of a step over the warps of this CTA, to all CTAs of the cluster.
  __device__ __forceinline__ void send(int step) const {
    const int buffer = pair_slot(step);
    const int warps = p.plan.warps;
    Barrier& totals_full = cta.head.totals_full[buffer];
    float* const my_totals = cta.totals + (buffer * p.plan.cluster + cta.rank) * num_sums;
    cta.head.partials_full[buffer].wait(pair_parity(step));
    if (p.plan.cluster > 1 && lane == 0) {
      totals_full.arrive_and_expect((p.plan.cluster - 1) * num_sums * 4);
    }
    for (int i = lane; i < num_sums; i += kWarp) {
      const float* const from = cta.partials + buffer * warps * num_sums + i;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kReadWarpsMax; ++w) {
        sum += w < warps ? from[w * num_sums] : 0.0f;
      }
      my_totals[i] = sum;
    }
    __syncwarp();
    const int quads = num_sums / 4;
    for (int i = lane; i < (p.plan.cluster - 1) * quads; i += kWarp) {
      const int peer = i / quads;
      float* const place = my_totals + i % quads * 4;
      store_to_peer(place, *reinterpret_cast<const float4*>(place), totals_full,
                    peer < cta.rank ? peer : peer + 1);
    }
    __syncwarp();
  }

  /// The weights of a step, from the sums of all CTAs.
  __device__ __forceinline__ void receive(int step, const TermStatistics& s) const {
    const ReadBackwardParams<kReadTermsMax>& read = p.read;
    const int buffer = pair_slot(step);
    if (p.plan.cluster > 1) {
      cta.head.totals_full[buffer].wait_cluster(pair_parity(step));
    }
    float w_dot_z = 0.0f;
    float h_dot_z = 0.0f;
    float along = 0.0f;
    const float* from = cta.totals + buffer * p.plan.cluster * num_sums;
    const int term = lane < K ? lane : 0;
    for (int r = 0; r < p.plan.cluster; ++r, from += num_sums) {
      w_dot_z += from[SumMap<kNorm>::kPerTerm * term];
      if constexpr (kNorm) {
        h_dot_z += from[2 * term + 1];
        along += from[SumMap<kNorm>::y_dot_h(K)];
      }
    }
    along *= s.inv_rms_mix * s.inv_rms_mix * p.inv_dim;  // <rh g dx, h> has one rh already
    const float dp = lane < K ? w_dot_z - along * h_dot_z : 0.0f;
    const float delta = warp_sum(s.prob * dp);
    // With one term p is 1 and the difference is zero by identity, not just by rounding.
    const float dlogit = K == 1 ? dp * 0.0f : s.prob * (dp - delta);
    float4* const weights = cta.weights + buffer * (K + 1);
    if (lane < K) {
      weights[lane] = {s.prob, read.scale * dlogit * s.inv_rms,
                       -dlogit * s.logit * s.inv_rms * s.inv_rms * read.inv_key_dim, 0.0f};
    }
    if (lane == 0) {
      weights[K] = {along, s.inv_rms_mix, 0.0f, 0.0f};
    }
    __syncwarp();
    if (lane == 0) {
      cta.head.weights_full[buffer].arrive();
      if (cta.rank == 0 && read.first_key > 0) {
        if (read.gate.present()) {
          read.gate.at(0, token(step)) = s.prob;
        }
        if (read.dphase1_lse.present()) {
          read.dphase1_lse.at(0, token(step)) = dlogit;
        }
      }
    }
  }

  __device__ __forceinline__ void run() const {
    const auto exists = [&](int step) { return token(step) < p.read.tokens; };
    for (int step = 0; step < kReadStatsStages; ++step) {
      fetch(step);
    }
    TermStatistics now = weigh(0);
    TermStatistics next = exists(1) ? weigh(1) : now;
    send(0);
    for (int step = 0; exists(step); ++step) {
      receive(step, now);
      now = next;
      if (exists(step + 2)) {
        next = weigh(step + 2);
      }
      if (exists(step + 1)) {
        send(step + 1);
      }
    }
    wait_copies<0>();
  }
};

// --------------------------------------------------------------------------------- compute warps

/// The compute warps: their lane's chunk of every token. kTerms: K where it is known, else 0.
template <class T, bool kNorm, int kTerms>
struct ReadBackwardCompute {
  static constexpr int kPerTerm = SumMap<kNorm>::kPerTerm;
  static constexpr int kTermBatch = kTerms > 0 ? kTerms : 4;  // terms whose sums go together

  const HopperReadBackwardParams& p;
  const ReadBackwardCta& cta;
  int lane, warp;
  int local, col;  // first column of the chunk: in this CTA, and in all
  bool active;     // else the lane repeats the last chunk, and nothing comes of it
  Chunk dquery = zero_chunk();
  Chunk dweight = zero_chunk();

  struct Token {
    Chunk w, h;
  };

  __device__ __forceinline__ ReadBackwardCompute(const HopperReadBackwardParams& params,
                                                 const ReadBackwardCta& shared, int warp_of_cta,
                                                 int lane_of_warp)
      : p(params), cta(shared), lane(lane_of_warp), warp(warp_of_cta) {
    local = warp * kReadWarpColumns + lane * kChunk;
    active = local < cta.columns;
    local = min(local, cta.columns - kChunk);
    col = cta.first_column + local;
  }

  /// Whether the chunk is of keys that meet a query.
  __device__ __forceinline__ bool is_key() const {
    return col >= p.read.key_begin && p.read.query.present();
  }

  __device__ __forceinline__ int terms() const { return kTerms > 0 ? kTerms : p.read.num_terms; }

  /// This lane's chunk of a token's row 0.
  __device__ __forceinline__ const char* tile(int slot) const {
    return cta.ring + slot * p.map.stage_bytes + local * 2;
  }
  __device__ __forceinline__ int pitch() const { return p.plan.columns * 2; }
  /// Of a float32 row, from the chunk of row 0; `place` counts all rows.
  __device__ __forceinline__ const char* wide_row(const char* rows, int place) const {
    return rows + (2 * place - p.inputs.narrow) * pitch() + local * 2;
  }

  __device__ __forceinline__ static Chunk load(const char* place) {
    return unpack(Packed<T>{*reinterpret_cast<const uint4*>(place)});
  }
  __device__ __forceinline__ static Chunk load_wide(const char* place) {
    const float4* const from = reinterpret_cast<const float4*>(place);
    return unpack(Packed<float>{from[0], from[1]});
  }

  /// Where this lane has the halves of its chunk of u (0) or g (1), in planes: halves side by side
  /// would meet in the banks of shared memory.
  __device__ __forceinline__ float4& half(int which, int plane) const {
    return cta.vectors[((which * 2 + plane) * p.plan.columns + local) / kChunk];
  }
  __device__ __forceinline__ Chunk vector(int which) const {
    return unpack(Packed<float>{half(which, 0), half(which, 1)});
  }

  /// Brings this warp's columns of u and g in. No other warp reads them.
  __device__ __forceinline__ void fetch_vectors() const {
    Chunk u;
    Chunk g;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int r = col + i - p.read.key_begin;
      u.v[i] = p.read.query.present() && r >= 0 ? p.read.query.at(0, r) : 0.0f;
      g.v[i] = 1.0f;
    }
    if (kNorm && p.read.norm_weight.present()) {
      g = load_chunk(p.read.norm_weight.row(0), col, p.read.dim);
    }
    if (active) {
      half(0, 0) = {u.v[0], u.v[1], u.v[2], u.v[3]};
      half(0, 1) = {u.v[4], u.v[5], u.v[6], u.v[7]};
      if constexpr (kNorm) {
        half(1, 0) = {g.v[0], g.v[1], g.v[2], g.v[3]};
        half(1, 1) = {g.v[4], g.v[5], g.v[6], g.v[7]};
      }
    }
    __syncwarp();  // idle lanes repeat the last chunk, which is of this warp
  }

  /// w and h of a token. `probs` are `stride` floats apart.
  __device__ __forceinline__ Token form(const char* rows, const float* probs, int stride,
                                        float inv_rms_mix) const {
    Token token = {zero_chunk(), zero_chunk()};
    if constexpr (kNorm) {
      const int K = terms();
      const char* z = rows;
#pragma unroll(kTerms > 0 ? kTerms : 4)
      for (int j = 0; j < K; ++j, z += pitch()) {
        add_scaled(token.h, probs[j * stride], load(z));
      }
      if (p.read.round_mix) {
        token.h = unpack(pack<T>(token.h));
      }
      const Chunk dx = load(rows + p.inputs.dx * pitch());
      const Chunk g = vector(1);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        token.w.v[i] = inv_rms_mix * g.v[i] * dx.v[i];
      }
    } else if (p.read.dx.present()) {
      token.w = load(rows + p.inputs.dx * pitch());
    }
    return token;
  }

  /// P1: the sums of a token.
  __device__ __forceinline__ void meet(int step, const RingCursor& ring) const {
    const int K = terms();
    const int num_sums = SumMap<kNorm>::count(K);
    const int buffer = pair_slot(step);
    const float* const probs = cta.probs + buffer * (K + 1);
    float* const partials = cta.partials + (buffer * p.plan.warps + warp) * num_sums;
    if constexpr (kNorm) {
      cta.head.probs_full[buffer].wait(pair_parity(step));
    }
    cta.head.full[ring.slot].wait(ring.parity);
    const char* const rows = tile(ring.slot);
    Token token = form(rows, probs, 1, kNorm ? probs[K] : 1.0f);
    if (!active) {
      token = {zero_chunk(), zero_chunk()};
    }
    if constexpr (kNorm) {
      const float y_dot_h = warp_sum(dot_add(token.w, token.h, 0.0f));  // still times rh
      if (lane == 0) {
        partials[SumMap<kNorm>::y_dot_h(K)] = y_dot_h;
      }
    }
    if (p.read.dmix.present() && active) {
      add(token.w, load(rows + p.inputs.dmix * pitch()));
    }
    const char* z = rows;
#pragma unroll 1
    for (int j0 = 0; j0 < K; j0 += kTermBatch) {
      float values[kPerTerm * kTermBatch];  // (terms, <w, z_j> and <h, z_j>)
#pragma unroll
      for (int i = 0; i < kTermBatch; ++i, z += pitch()) {
        // Beyond the last term: any row will do, for sums that nobody reads.
        const Chunk value = load(kTerms > 0 || j0 + i < K ? z : rows);
        values[kPerTerm * i] = dot_add(token.w, value, 0.0f);
        if constexpr (kNorm) {
          values[kPerTerm * i + 1] = dot_add(token.h, value, 0.0f);
        }
      }
      const float sum = warp_sum_scatter(values);
      constexpr int kLanes = kWarp / (kPerTerm * kTermBatch);
      const int index = kPerTerm * j0 + lane / kLanes;
      if (lane % kLanes == 0 && index < kPerTerm * K) {
        partials[index] = sum;
      }
    }
    __syncwarp();
    if (lane == 0) {
      cta.head.partials_full[buffer].arrive();
    }
  }

  /// dz_j, and its share of du. `dz`: what is added to.
  __device__ __forceinline__ Chunk gradient(const char* z, const float4& weight, const Chunk& dh,
                                            Chunk dz) {
    add_scaled(dz, weight.x, dh);
    const Chunk key = load(is_key() ? z : reinterpret_cast<const char*>(&cta.head.zeros));
    add_scaled(dz, weight.y, vector(0));  // u: read again for each term, registers are scarcer
    add_scaled(dz, weight.z, key);
    add_scaled(dquery, weight.y, key);
    return dz;
  }

  /// Gradients of the sources as G: fresh, or added to the kHeld ones in the ring.
  template <class G, bool kHeld>
  __device__ __forceinline__ void finish_sources(const char* rows, const float4* weights, int64_t t,
                                                 const Chunk& dh) {
    const ReadBackwardParams<kReadTermsMax>& read = p.read;
    constexpr bool kWide = sizeof(G) == 4;
    const int count = p.num_sources;
    const char* z = rows + read.first_key * pitch();
    const char* held =
        kWide ? wide_row(rows, p.inputs.dsources) : rows + p.inputs.dsources * pitch();
    const int64_t offset = t * p.dsources_stride_bytes;
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      Chunk dz = zero_chunk();
      if constexpr (kHeld) {
        dz = kWide ? load_wide(held) : load(held);
        held += (kWide ? 2 : 1) * pitch();
      }
      dz = gradient(z, weights[read.first_key + n], dh, dz);
      z += pitch();
      if (active) {
        store_whole<G>(read.dsources.data[n] + offset, col, pack<G>(dz));
      }
    }
  }

  /// P2: the gradients of a token.
  __device__ __forceinline__ void finish(int step, const RingCursor& ring) {
    const int K = terms();
    const int64_t t = cta.token(step, p);
    const ReadBackwardParams<kReadTermsMax>& read = p.read;
    const float4* const weights = cta.weights + pair_slot(step) * (K + 1);
    const char* const rows = tile(ring.slot);
    cta.head.weights_full[pair_slot(step)].wait(pair_parity(step));
    const float inv_rms_mix = weights[K].y;
    Token token = form(rows, reinterpret_cast<const float*>(weights), 4, inv_rms_mix);
    if constexpr (kNorm) {
      const Chunk dx = load(rows + p.inputs.dx * pitch());
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        dweight.v[i] = fmaf(inv_rms_mix * dx.v[i], token.h.v[i], dweight.v[i]);
      }
      add_scaled(token.w, -weights[K].x, token.h);
    }
    Chunk& dh = token.w;
    if (read.dmix.present()) {
      add(dh, load(rows + p.inputs.dmix * pitch()));
    }
    if (read.dh.present() && active) {
      store_whole<T>(read.dh.row(t).data, col, pack<T>(dh));
    }
    if (read.dphase1_out.present() && active) {
      Chunk out = zero_chunk();
      add_scaled(out, weights[0].x, dh);
      store_whole<T>(read.dphase1_out.row(t).data, col, pack<T>(out));
    }
    if (p.num_sources > 0) {
      if (!read.has_dsources) {
        const char* z = rows + read.first_key * pitch();
        for (int n = 0; n < p.num_sources; ++n, z += pitch()) {
          gradient(z, weights[read.first_key + n], dh, zero_chunk());
        }
      } else if (p.wide_dsources) {
        read.accumulate ? finish_sources<float, true>(rows, weights, t, dh)
                        : finish_sources<float, false>(rows, weights, t, dh);
      } else {
        read.accumulate ? finish_sources<T, true>(rows, weights, t, dh)
                        : finish_sources<T, false>(rows, weights, t, dh);
      }
    }
    if (read.has_partial) {
      Chunk dz = zero_chunk();
      if (p.wide_dpartial_out) {
        dz = load_wide(wide_row(rows, p.inputs.dpartial));
      } else if (read.dpartial_out.present()) {
        dz = load(rows + p.inputs.dpartial * pitch());
      }
      dz = gradient(rows + (K - 1) * pitch(), weights[K - 1], dh, dz);
      if (read.dpartial.present() && active) {
        char* const to = read.dpartial.row(t).data;
        p.wide_dpartial ? store_whole<float>(to, col, pack<float>(dz))
                        : store_whole<T>(to, col, pack<T>(dz));
      }
    }
    __syncwarp();
    if (lane == 0) {
      cta.head.free[ring.slot].arrive();
    }
  }

  __device__ __forceinline__ void run() {
    RingCursor meeting, finishing;
    fetch_vectors();
    meet(0, meeting);  // a cluster has one token at least
    const int steps = cta.steps(p);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        meeting.advance(p.plan.stages);
        meet(step + 1, meeting);
      }
      finish(step, finishing);
      finishing.advance(p.plan.stages);
    }
    begin_next_grid();
    if (active) {
      leave(p.read.dquery_partials, dquery);
      leave(p.read.dweight_partials, dweight);
    }
  }

  /// This cluster's sum over its tokens.
  __device__ __forceinline__ void leave(float* partials, const Chunk& sum) const {
    if (partials != nullptr) {
      float* const row = partials + static_cast<int64_t>(cta.cluster) * p.read.dim;
      store_whole<float>(reinterpret_cast<char*>(row), col, pack<float>(sum));
    }
  }
};

template <class T, bool kNorm, int kTerms>
__global__ void __launch_bounds__(read_resident_warps(kTerms) / 2 * kWarp, 2)
    read_backward_kernel(const __grid_constant__ HopperReadBackwardParams p) {
#if __CUDA_ARCH__ >= 900  // the launcher never runs it on any other architecture
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);
  const int warps = p.plan.warps;
  extern __shared__ __align__(128) char shared[];
  const ReadBackwardCta cta(shared, p);

  if (thread == 0) {
    for (int i = 0; i < p.plan.stages; ++i) {
      cta.head.full[i].init(1);
      cta.head.free[i].init(warps);
    }
    for (int i = 0; i < 2; ++i) {
      cta.head.probs_full[i].init(1);
      cta.head.partials_full[i].init(warps);
      cta.head.totals_full[i].init(1);
      cta.head.weights_full[i].init(1);
    }
    publish_barriers();
    cta.head.zeros = {0, 0, 0, 0};
  }
  // Sums that round up to 16 bytes are sent, but never read.
  for (int i = thread; i < (p.map.vectors - p.map.partials) / 4; i += p.plan.threads()) {
    cta.partials[i] = 0.0f;
  }
  if (p.plan.cluster > 1) {
    __syncwarp();
    cute::cluster_sync();
  } else {
    __syncthreads();
  }
  if (warp < warps) {
    ReadBackwardCompute<T, kNorm, kTerms>(p, cta, warp, lane).run();
  } else if (warp == warps) {
    load_tokens(p, cta, lane);
  } else {
    ReadBackwardWeights<kNorm>(p, cta, lane).run();
  }
#endif
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_BACKWARD_CUH_
