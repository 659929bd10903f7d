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
//       du and dg of a group's tokens [clusters * groups, D] float, summed by reduce_partials
// bytes K + 1 units of T * D elements read, K written, one more each that is accumulated
// sums  float32: the chunks of a lane, the lanes of a warp by a butterfly, then warps, then CTAs in
//       order. du, dg stay in registers over all tokens of a group of warps, whose number depends
//       on T and the device
//
// Work of a CTA, which has `columns` of a token's D columns:
//
//   compute       P1(i + 1): that token's sums over the warp's columns; then P2(i): the
//    warps        gradients of token i. This order hides the weight warp's work, and with a cluster
//                 the way there and back, behind P1(i + 1). A lane has one or two chunks of 8
//                 columns, 256 apart: all that a warp does once a token, barriers, shuffles,
//                 weights and addresses, serves both. w and h are formed in P1 and in P2: registers
//                 for them would cost a third of the warps. A CTA that has a multiprocessor to
//                 itself has two groups of such warps, which take its tokens in turn, P1(i) then
//                 P2(i): one group works while the other waits for its weights
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
  int cluster_shift;                                     // log2 of the CTAs of a cluster
  int steps, longer;  // tokens that every cluster has, and how many clusters have one more
  int* issued;        // of Window; in any state at the start
};

struct ReadBackwardHead {
  Barrier full[kReadStagesMax];  // a token's rows have been loaded
  Barrier free[kReadStagesMax];  // all compute warps of their group are done with them
  Barrier probs_full[2];         // the weight warp has stored p and rh
  Barrier partials_full[2];      // all compute warps of a group have stored their sums
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
  char* start;  // of shared memory
  ReadBackwardHead& head;
  float* stats;     // (stages, 2 K + 1)
  float* probs;     // (2, K + 1)
  float4* weights;  // (2, K + 1)
  float* partials;  // (2, warps, sums)
  float* totals;    // (2, cluster, sums)
  char* ring;       // (stages, bytes of a token)
  int rank, cluster;
  int first_column, columns;

  __device__ __forceinline__ ReadBackwardCta(char* shared, const HopperReadBackwardParams& p)
      : start(shared),
        head(*reinterpret_cast<ReadBackwardHead*>(shared)),
        stats(reinterpret_cast<float*>(shared + p.map.stats)),
        probs(reinterpret_cast<float*>(shared + p.map.probs)),
        weights(reinterpret_cast<float4*>(shared + p.map.weights)),
        partials(reinterpret_cast<float*>(shared + p.map.partials)),
        totals(reinterpret_cast<float*>(shared + p.map.totals)),
        ring(shared + p.map.ring),
        rank(p.plan.cluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0),
        cluster(static_cast<int>(blockIdx.x >> p.cluster_shift)),
        first_column(rank * p.plan.columns),
        columns(min(p.plan.columns, p.read.dim - first_column)) {}

  /// Tokens are dealt to the clusters in turn, one a step.
  __device__ __forceinline__ int64_t token(int step, const HopperReadBackwardParams& p) const {
    return cluster + static_cast<int64_t>(step) * p.plan.clusters;
  }
  __device__ __forceinline__ int steps(const HopperReadBackwardParams& p) const {
    return p.steps + (cluster < p.longer ? 1 : 0);
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
    // Sums over rh g dx come without rh, but for those of w where dmix was added to it.
    along *= s.inv_rms_mix * s.inv_rms_mix * s.inv_rms_mix * p.inv_dim;
    if (kNorm && !read.dmix.present()) {
      w_dot_z *= s.inv_rms_mix;
    }
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

/// The compute warps: their lane's chunks of every token, one after the other, which saves
/// registers. kTerms: K where it is known, else 0, which goes with one chunk. kGroups: groups of
/// warps; a number that is known only at run time makes a lone one 5 to 7 % slower.
/// kUsual: of a block's site (two terms) or of sources with gradients of their own (any number), as
/// training has them: whole keys, columns that divide evenly among the lanes, nothing optional.
/// Such a kernel asks nothing at run time: advance takes 646 instructions a warp instead of 843.
/// kDmix: whether there is dmix; a branch around it, though all take the same side, costs copies of
/// all that it changes.
template <class T, bool kNorm, int kTerms, int kChunks, int kGroups, bool kUsual, bool kDmix>
struct ReadBackwardCompute {
  static constexpr int kPerTerm = SumMap<kNorm>::kPerTerm;
  static constexpr int kTermBatch = kTerms > 0 ? kTerms : 4;  // terms whose sums go together
  static_assert(kTerms > 0 || kChunks == 1);

  const HopperReadBackwardParams& p;
  const ReadBackwardCta& cta;
  int lane, warp;
  int group;            // of warps, which takes every token or every other
  int first;            // column of this CTA where chunk 0 begins; chunk c begins 256 c later
  char* here[kChunks];  // a lane's chunk in a row that begins where shared memory does
  Chunk dquery[kChunks];
  Chunk dweight[kChunks];

  /// One chunk of a token.
  struct Token {
    Chunk w, h;
  };

  __device__ __forceinline__ ReadBackwardCompute(const HopperReadBackwardParams& params,
                                                 const ReadBackwardCta& shared, int warp_of_cta,
                                                 int lane_of_warp)
      : p(params), cta(shared), lane(lane_of_warp), warp(warp_of_cta), group(0) {
    if (kGroups == 2 && warp >= p.plan.warps) {
      warp -= p.plan.warps;
      group = 1;
    }
    first = warp * (kChunks * kReadWarpColumns) + lane * kChunk;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      here[c] = cta.start + local(c) * 2;
      dquery[c] = zero_chunk();
      dweight[c] = zero_chunk();
    }
  }

  /// Else the lane repeats the CTA's last chunk as its chunk c, and nothing comes of it.
  __device__ __forceinline__ bool active(int c) const {
    return kUsual || first + c * kReadWarpColumns < cta.columns;
  }
  /// First column of chunk c in this CTA.
  __device__ __forceinline__ int local(int c) const {
    const int column = first + c * kReadWarpColumns;
    return kUsual ? column : min(column, cta.columns - kChunk);
  }
  /// First column in all of an active chunk c.
  __device__ __forceinline__ int col(int c) const {
    return cta.first_column + first + c * kReadWarpColumns;
  }

  /// Whether the chunk is of keys that meet a query.
  __device__ __forceinline__ bool is_key(int c) const {
    return kUsual || (col(c) >= p.read.key_begin && p.read.query.present());
  }

  __device__ __forceinline__ int terms() const { return kTerms > 0 ? kTerms : p.read.num_terms; }

  // Rows are named by their distance in bytes from the start of shared memory, which all lanes
  // share and uniform registers hold.

  /// A token's row 0.
  __device__ __forceinline__ int tile(int slot) const {
    return p.map.ring + slot * p.map.stage_bytes;
  }
  __device__ __forceinline__ int pitch() const { return p.plan.columns * 2; }
  /// A float32 row, from row 0; `place` counts all rows.
  __device__ __forceinline__ int wide_row(int rows, int place) const {
    return rows + (2 * place - p.inputs.narrow) * pitch();
  }

  /// Chunk c of a row.
  __device__ __forceinline__ Chunk load(int row, int c) const { return load_at(here[c] + row); }
  __device__ __forceinline__ Chunk load_wide(int row, int c) const {
    const char* const place = here[c] + (here[c] - cta.start) + row;
    const float4* const from = reinterpret_cast<const float4*>(place);
    return unpack(Packed<float>{from[0], from[1]});
  }
  /// Chunk c of a row where `condition` holds, else zeros.
  __device__ __forceinline__ Chunk load_if(bool condition, int row, int c) const {
    if (kUsual) {
      return load(row, c);
    }
    return load_at(condition ? here[c] + row : reinterpret_cast<const char*>(&cta.head.zeros));
  }
  __device__ __forceinline__ static Chunk load_at(const char* place) {
    return unpack(Packed<T>{*reinterpret_cast<const uint4*>(place)});
  }

  /// Where this lane has the halves of chunk c of u (0) or g (1), in planes as long as a row of the
  /// ring: halves side by side would meet in the banks of shared memory.
  __device__ __forceinline__ float4& half(int which, int plane, int c) const {
    return *reinterpret_cast<float4*>(here[c] + p.map.vectors + (which * 2 + plane) * pitch());
  }
  __device__ __forceinline__ Chunk vector(int which, int c) const {
    return unpack(Packed<float>{half(which, 0, c), half(which, 1, c)});
  }

  /// Brings this warp's columns of u and g in. Other warps read none of them but the last chunk,
  /// which idle lanes repeat: theirs are sums of zero times g, which must be a number by then.
  __device__ __forceinline__ void fetch_vectors() const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (active(c)) {
        Chunk u;
        Chunk g;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int r = col(c) + i - p.read.key_begin;
          u.v[i] = p.read.query.present() && r >= 0 ? p.read.query.at(0, r) : 0.0f;
          g.v[i] = 1.0f;
        }
        if (kNorm && p.read.norm_weight.present()) {
          g = load_chunk(p.read.norm_weight.row(0), col(c), p.read.dim);
        }
        half(0, 0, c) = {u.v[0], u.v[1], u.v[2], u.v[3]};
        half(0, 1, c) = {u.v[4], u.v[5], u.v[6], u.v[7]};
        if constexpr (kNorm) {
          half(1, 0, c) = {g.v[0], g.v[1], g.v[2], g.v[3]};
          half(1, 1, c) = {g.v[4], g.v[5], g.v[6], g.v[7]};
        }
      }
    }
    asm volatile("bar.sync 1, %0;" ::"r"(kGroups * p.plan.warps * kWarp) : "memory");
  }

  /// h of chunk c of a token. `probs` are `stride` floats apart. kMeet: zero in idle lanes.
  template <bool kMeet>
  __device__ __forceinline__ Chunk form_mix(int c, int rows, const float* probs, int stride) const {
    const int K = terms();
    Chunk h = zero_chunk();
    int z = rows;
#pragma unroll(kTerms > 0 ? kTerms : 4)
    for (int j = 0; j < K; ++j, z += pitch()) {
      add_scaled(h, !kMeet || active(c) ? probs[j * stride] : 0.0f, load(z, c));
    }
    return !kUsual && p.read.round_mix ? unpack(pack<T>(h)) : h;
  }

  /// w and h of chunk c for the sums, zero in idle lanes. With a norm and without dmix, w is still
  /// to be multiplied by rh, which is left to the weight warp. Adds to <g dx, h>.
  __device__ __forceinline__ Token form(int c, int rows, const float* probs, float& y_dot_h) const {
    Token token = {};
    if constexpr (kNorm) {
      token.h = form_mix<true>(c, rows, probs, 1);
    }
    token.w = load_if(active(c) && (kNorm || p.read.dx.present()), rows + p.inputs.dx * pitch(), c);
    if constexpr (kNorm) {
      const Chunk g = vector(1, c);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        token.w.v[i] *= g.v[i];
      }
      y_dot_h = dot_add(token.w, token.h, y_dot_h);
    }
    if constexpr (kDmix) {
      Chunk w = load_if(active(c), rows + p.inputs.dmix * pitch(), c);
      add_scaled(w, kNorm ? probs[terms()] : 1.0f, token.w);
      token.w = w;
    }
    return token;
  }

  /// Sums that go together: <w, z_j> and with a norm <h, z_j> of each of some terms.
  using Sums = float[kPerTerm * kTermBatch];

  /// Adds what chunk c of terms j0, j0 + 1 .. gives. `z`: row of term j0.
  __device__ __forceinline__ void add_sums(Sums& sums, const Token& token, int c, int rows, int z,
                                           int j0) const {
#pragma unroll
    for (int i = 0; i < kTermBatch; ++i, z += pitch()) {
      // Beyond the last term: any row will do, for sums that nobody reads.
      const Chunk value = load(kTerms > 0 || j0 + i < terms() ? z : rows, c);
      sums[kPerTerm * i] = dot_add(token.w, value, sums[kPerTerm * i]);
      if constexpr (kNorm) {
        sums[kPerTerm * i + 1] = dot_add(token.h, value, sums[kPerTerm * i + 1]);
      }
    }
  }

  /// The warp's sums of terms j0, j0 + 1 ..
  __device__ __forceinline__ void share(float* partials, Sums& sums, int j0) const {
    const float sum = warp_sum_scatter(sums);
    constexpr int kLanes = kWarp / (kPerTerm * kTermBatch);
    const int index = kPerTerm * j0 + static_cast<int>(static_cast<unsigned>(lane) / kLanes);
    if (static_cast<unsigned>(lane) % kLanes == 0 && index < kPerTerm * terms()) {
      partials[index] = sum;
    }
  }

  /// P1: the sums of a token. Those of a lane's chunks are added up before lanes meet.
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
    const int rows = tile(ring.slot);
    float y_dot_h = 0.0f;
    if constexpr (kTerms > 0) {
      Sums sums = {};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const Token token = form(c, rows, probs, y_dot_h);
        if constexpr (kChunks == 1) {
          __syncwarp();  // registers do not suffice to keep the terms: they are loaded again
        }
        add_sums(sums, token, c, rows, rows, 0);
        __syncwarp();  // nor do they for the next chunk's rows, which would be loaded early
      }
      share(partials, sums, 0);
    } else {
      const Token token = form(0, rows, probs, y_dot_h);
      int z = rows;
#pragma unroll 1
      for (int j0 = 0; j0 < K; j0 += kTermBatch, z += kTermBatch * pitch()) {
        Sums sums = {};
        add_sums(sums, token, 0, rows, z, j0);
        share(partials, sums, j0);
      }
    }
    if constexpr (kNorm) {
      y_dot_h = warp_sum(y_dot_h);
      if (lane == 0) {
        partials[SumMap<kNorm>::y_dot_h(K)] = y_dot_h;
      }
    }
    __syncwarp();
    if (lane == 0) {
      cta.head.partials_full[buffer].arrive();
    }
  }

  /// Adds dz_j to dz, and its share to du. `z`: the term's row.
  __device__ __forceinline__ void gradient(int c, int z, const float4& weight, const Chunk& dh,
                                           Chunk& dz) {
    add_scaled(dz, weight.x, dh);
    const Chunk key = load_if(is_key(c), z, c);
    add_scaled(dz, weight.y, vector(0, c));  // u: read again for each term, registers are scarcer
    add_scaled(dz, weight.z, key);
    add_scaled(dquery[c], weight.y, key);
  }

  /// Gradients of the sources as G: fresh, or added to the kHeld ones in the ring.
  template <class G, bool kHeld>
  __device__ __forceinline__ void finish_sources(int c, int rows, const float4* weights, int64_t t,
                                                 const Chunk& dh) {
    const ReadBackwardParams<kReadTermsMax>& read = p.read;
    constexpr bool kWide = sizeof(G) == 4;
    const int count = p.num_sources;
    int z = rows + read.first_key * pitch();
    int held = kWide ? wide_row(rows, p.inputs.dsources) : rows + p.inputs.dsources * pitch();
    const int64_t offset = t * p.dsources_stride_bytes;
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      Chunk dz = zero_chunk();
      if constexpr (kHeld) {
        dz = kWide ? load_wide(held, c) : load(held, c);
        held += (kWide ? 2 : 1) * pitch();
      }
      gradient(c, z, weights[read.first_key + n], dh, dz);
      z += pitch();
      if (active(c)) {
        store_whole<G>(read.dsources.data[n] + offset, col(c), pack<G>(dz));
      }
    }
  }

  /// The gradients of chunk c of token t.
  __device__ __forceinline__ void finish_chunk(int c, int64_t t, int rows, const float4* weights) {
    const int K = terms();
    const ReadBackwardParams<kReadTermsMax>& read = p.read;
    const int dx = rows + p.inputs.dx * pitch();
    Chunk dh;
    if constexpr (kNorm) {
      const float along = weights[K].x;
      const float inv_rms_mix = weights[K].y;
      const Chunk h = form_mix<false>(c, rows, reinterpret_cast<const float*>(weights), 4);
      const Chunk y = load(dx, c);
      const Chunk g = vector(1, c);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float scaled = inv_rms_mix * y.v[i];
        dweight[c].v[i] = fmaf(scaled, h.v[i], dweight[c].v[i]);
        dh.v[i] = fmaf(-along, h.v[i], g.v[i] * scaled);
      }
    } else {
      dh = load_if(read.dx.present(), dx, c);
    }
    if constexpr (kDmix) {
      add(dh, load(rows + p.inputs.dmix * pitch(), c));
    }
    if (kUsual ? kTerms == 2 && kNorm : read.dh.present() && active(c)) {
      store_whole<T>(read.dh.row(t).data, col(c), pack<T>(dh));
    }
    if (!kUsual && read.dphase1_out.present() && active(c)) {
      Chunk out = zero_chunk();
      add_scaled(out, weights[0].x, dh);
      store_whole<T>(read.dphase1_out.row(t).data, col(c), pack<T>(out));
    }
    if (kUsual && kTerms != 2) {
      finish_sources<T, false>(c, rows, weights, t, dh);
    } else if (!kUsual && p.num_sources > 0) {
      if (read.dsources.data[0] == nullptr) {  // no gradients are asked for
        int z = rows + read.first_key * pitch();
        for (int n = 0; n < p.num_sources; ++n, z += pitch()) {
          Chunk unused = zero_chunk();
          gradient(c, z, weights[read.first_key + n], dh, unused);
        }
      } else if (p.wide_dsources) {
        read.accumulate ? finish_sources<float, true>(c, rows, weights, t, dh)
                        : finish_sources<float, false>(c, rows, weights, t, dh);
      } else {
        read.accumulate ? finish_sources<T, true>(c, rows, weights, t, dh)
                        : finish_sources<T, false>(c, rows, weights, t, dh);
      }
    }
    if (kUsual && kChunks == 2) {
      // Or the partial sum's row is unpacked early, and registers do not suffice.
      __syncwarp();
    }
    if (kUsual ? kTerms == 2 : read.has_partial) {
      Chunk dz = zero_chunk();
      if (kUsual) {
        dz = load(rows + p.inputs.dpartial * pitch(), c);
      } else if (p.wide_dpartial_out) {
        dz = load_wide(wide_row(rows, p.inputs.dpartial), c);
      } else if (read.dpartial_out.present()) {
        dz = load(rows + p.inputs.dpartial * pitch(), c);
      }
      gradient(c, rows + (K - 1) * pitch(), weights[K - 1], dh, dz);
      if (kUsual || (read.dpartial.present() && active(c))) {
        char* const to = read.dpartial.row(t).data;
        !kUsual&& p.wide_dpartial ? store_whole<float>(to, col(c), pack<float>(dz))
                                  : store_whole<T>(to, col(c), pack<T>(dz));
      }
    }
  }

  /// P2: the gradients of a token.
  __device__ __forceinline__ void finish(int step, const RingCursor& ring) {
    const int64_t t = cta.token(step, p);
    const float4* const weights = cta.weights + pair_slot(step) * (terms() + 1);
    cta.head.weights_full[pair_slot(step)].wait(pair_parity(step));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      finish_chunk(c, t, tile(ring.slot), weights);
      __syncwarp();
    }
    if (lane == 0) {
      cta.head.free[ring.slot].arrive();
    }
  }

  __device__ __forceinline__ void run() {
    RingCursor meeting, finishing;
    fetch_vectors();
    const int steps = cta.steps(p);
    // A lone group is a token ahead with its sums; of two one waits while the other works.
    constexpr int kAhead = kGroups == 1 ? 1 : 0;
    const auto advance = [&](RingCursor& ring, int tokens) {
#pragma unroll
      for (int i = 0; i < tokens; ++i) {
        ring.advance(p.plan.stages);
      }
    };
    advance(meeting, group);
    advance(finishing, group);
#pragma unroll 1
    for (int step = group; step < steps + kAhead; step += kGroups) {
      if (step < steps) {
        meet(step, meeting);
        advance(meeting, kGroups);
      }
      if (step >= kAhead) {
        finish(step - kAhead, finishing);
        advance(finishing, kGroups);
      }
    }
    begin_next_grid();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (active(c)) {
        leave(p.read.dquery_partials, dquery[c], c);
        leave(p.read.dweight_partials, dweight[c], c);
      }
    }
  }

  /// This group's sum over its tokens.
  __device__ __forceinline__ void leave(float* partials, const Chunk& sum, int c) const {
    if (partials != nullptr) {
      const int64_t place = cta.cluster * kGroups + group;
      float* const row = partials + place * p.read.dim;
      int column = col(c);
      if (kChunks == 1) {  // formed anew, or it would spend the loop over tokens in local memory
        int thread;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        thread -= group * p.plan.warps * kWarp;
        column = cta.first_column + thread / kWarp * (kChunks * kReadWarpColumns) +
                 thread % kWarp * kChunk + c * kReadWarpColumns;
      }
      store_whole<float>(reinterpret_cast<char*>(row), column, pack<float>(sum));
    }
  }
};

template <class T, bool kNorm, int kTerms, int kChunks, int kGroups, bool kUsual>
__global__ void __launch_bounds__(read_resident_warps(kTerms, kChunks) * kWarp, 1)
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
  if (warp < kGroups * warps) {
    if (!kUsual && p.read.dmix.present()) {
      ReadBackwardCompute<T, kNorm, kTerms, kChunks, kGroups, false, !kUsual>(p, cta, warp, lane)
          .run();
    } else {
      ReadBackwardCompute<T, kNorm, kTerms, kChunks, kGroups, kUsual, false>(p, cta, warp, lane)
          .run();
    }
  } else if (warp == kGroups * warps) {
    load_tokens(p, cta, lane);
  } else {
    ReadBackwardWeights<kNorm>(p, cta, lane).run();
  }
#endif
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_BACKWARD_CUH_
