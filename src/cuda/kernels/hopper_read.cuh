// `read` of many tokens on Hopper: persistent blocks, rows brought into shared memory by bulk
// copies, several groups of warps that each work on a token of their own.
//
//   partial' = round(partial + updates)                 stored, and used below as rounded
//   r_j = rsqrt(mean(k_j^2) + eps)    logit_j = scale r_j <u, k_j>, or the phase-1 lse
//   p = softmax(logit)                h = sum_j p_j z_j
//   x = h, or h rsqrt(mean(h^2) + norm_eps) g
//
// in    K terms and further updates [T, D] of one 16-bit type; u [R], lse [T] float32; g [D]
// out   x, partial', h [T, D]; logits, inv_rms, probs [T, K], mix_inv_rms [T]
// bytes every row of a token is read once; K + 1 units of T * D elements, and partial' written
// sums  float32, in the order of read_sums.cuh: the bits are those of read_rows.cuh
//
// Work of a block:
//
//   load warp    the rows of the block's tokens, one bulk copy each, into a ring of rows that is as
//                deep as shared memory allows: some 150 KB are always on their way
//   groups       group q has tokens q, q + groups, ... of the block. A warp has one or two segments
//                of a token's columns, a lane one chunk of each. Two barriers of the group a token,
//                one without norm; while one group waits the others work
//
//   wait for the rows -> partial' -> sums of this warp -> barrier -> softmax, in every warp
//                     -> mixture, rows are free -> its square -> barrier -> norm, x
//
// A token's rows are all in shared memory before any of its results is stored: results may take the
// place of what they are computed from.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_CUH_

#include <cstdint>

#include "cuda/device/chunk.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/hopper_barrier.cuh"
#include "cuda/device/hopper_copy.cuh"
#include "cuda/device/hopper_window.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_chunk.cuh"
#include "cuda/hopper_read_plan.h"
#include "cuda/kernels/read_params.h"
#include "cuda/kernels/read_sums.cuh"
#include "cuda/policy.h"

namespace flash_attn_res::cuda::hopper {

struct HopperReadParams {
  ReadRowsParams read;
  ReadPlan plan;
  ReadMap map;
  int* issued;  // of Window
};

struct ReadHead {
  Barrier full[kReadTokensMax];  // a token's rows have been loaded
  Barrier free[kReadTokensMax];  // its group is done with them
};

/// The load warp's only lane. Row r of the block's token i is row i * rows + r of the stream, and
/// lies in slot (i * rows + r) % slots.
__device__ __forceinline__ void load_rows(const HopperReadParams& p, ReadHead& head, char* ring) {
  const int rows = p.read.num_rows;
  const int row_bytes = p.read.dim * 2;
  const CachePolicy policy(CacheHint::kEvictFirst);
  int slot = 0;
  RingCursor token;         // whose rows are loaded
  RingCursor oldest;        // whose rows make room next
  int room = p.plan.slots;  // slots that nobody uses
  Window window(p.issued, p.plan.lead, (p.plan.tokens - 1) * static_cast<int>(gridDim.x));
  int steps_to_look = p.plan.tokens - 1;
  for (int64_t t = blockIdx.x; t < p.read.tokens; t += gridDim.x, --steps_to_look) {
    if (steps_to_look == 0) {
      steps_to_look = p.plan.look;
      window.wait(t);
      window.count(p.plan.look);
    }
    Barrier& full = head.full[token.slot];
    for (int r = 0; r < rows; ++r) {
      if (room == 0) {
        head.free[oldest.slot].wait(oldest.parity);
        oldest.advance(p.plan.tokens);
        room = rows;
      }
      if (r == 0) {
        // The phase of this barrier before this one is over: its token has made room already.
        full.arrive_and_expect(rows * row_bytes);
      }
      load_row(ring + slot * row_bytes, p.read.rows.data[r] + t * p.read.rows.stride_bytes[r],
               row_bytes, full, policy);
      --room;
      slot = slot + 1 == p.plan.slots ? 0 : slot + 1;
    }
    token.advance(p.plan.tokens);
  }
}

/// A barrier over the warps of one group.
__device__ __forceinline__ void synchronize_group(int group, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}

/// T: storage. kTogether: terms whose sums a warp forms at once, 2, 4 or 8.
template <class T, int kTogether>
__global__ void __launch_bounds__(kReadThreadsMax, 1)
    read_kernel(const __grid_constant__ HopperReadParams p) {
#if __CUDA_ARCH__ >= 900  // the launcher never runs it on any other architecture
  constexpr int kSegments = read_segments(kTogether);
  constexpr unsigned kLanes = kWarp;
  using Sums = PairSums<kTogether>;
  const ReadRowsParams& read = p.read;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);

  extern __shared__ __align__(128) char shared[];
  ReadHead& head = *reinterpret_cast<ReadHead*>(shared);
  char* const ring = shared + p.map.ring;
  if (thread == 0) {
    for (int i = 0; i < p.plan.tokens; ++i) {
      head.full[i].init(1);
      head.free[i].init(p.plan.warps);
    }
    publish_barriers();
  }
  begin_next_grid();
  __syncthreads();
  wait_for_previous_grid();
  if (warp == p.plan.groups * p.plan.warps) {
    if (lane == 0) {
      load_rows(p, head, ring);
    }
    return;
  }

  const int group = warp / p.plan.warps;
  const int warp_of_group = warp % p.plan.warps;
  const int group_threads = p.plan.warps * kWarp;
  const int K = read.num_terms;
  const int rows = read.num_rows;
  const int row_bytes = read.dim * 2;
  const unsigned chunks = static_cast<unsigned>(read.dim) / kChunk;
  const unsigned segments = (chunks + kLanes - 1) / kLanes;
  const unsigned padded_terms = p.map.terms;

  unsigned chunk[kSegments];  // of a row; its segment is chunk / 32
  Chunk u[kSegments];
#pragma unroll
  for (int c = 0; c < kSegments; ++c) {
    chunk[c] = (warp_of_group * kSegments + c) * kLanes + lane;
    const int col = static_cast<int>(chunk[c]) * kChunk;
    const bool in_key = chunk[c] < chunks && col + kChunk > read.key_begin;
    u[c] = in_key && read.query.present()
               ? load_query_chunk(read.query, col, read.key_begin, read.query_aligned)
               : zero_chunk();
  }

  unsigned slot = static_cast<unsigned>(group * rows) % p.plan.slots;  // of the token's first row
  RingCursor token;
  token.slot = group;  // there are at least as many tokens as groups
  int parity = 0;      // which of two places for sums
  for (int64_t t = blockIdx.x + static_cast<int64_t>(group) * gridDim.x; t < read.tokens;
       t += static_cast<int64_t>(p.plan.groups) * gridDim.x, parity ^= 1) {
    float* const term_sums =
        reinterpret_cast<float*>(shared + p.map.sums) + (group * 2 + parity) * p.map.sums_floats;
    float* const norm_sums = term_sums + segments * padded_terms * 2;
    const float phase1_lse = read.first_key > 0 ? read.phase1_lse.at(0, t) : 0.0f;
    // The 16 bytes of a row that this lane has.
    const auto place = [&](int row, unsigned at) {
      unsigned s = slot + row;
      s = s >= p.plan.slots ? s - p.plan.slots : s;
      return reinterpret_cast<uint4*>(ring + s * row_bytes + at * 16);
    };
    const auto value = [&](int row, unsigned at) { return unpack(Packed<T>{*place(row, at)}); };
    head.full[token.slot].wait(token.parity);

    if (read.partial_out.present()) {
#pragma unroll
      for (int c = 0; c < kSegments; ++c) {
        if (chunk[c] < chunks) {
          Chunk sum = value(K - 1, chunk[c]);
          for (int e = K; e < rows; ++e) {
            add(sum, value(e, chunk[c]));
          }
          const Packed<T> rounded = pack<T>(sum);
          *place(K - 1, chunk[c]) = rounded.bits;
          store_whole<T>(read.partial_out.row(t).data, static_cast<int>(chunk[c]) * kChunk,
                         rounded);
          if (read.snapshot.present()) {
            store_whole<T>(read.snapshot.row(t).data, static_cast<int>(chunk[c]) * kChunk, rounded);
          }
        }
      }
      fence_before_bulk_copies();  // that write here again
    }

    // |k_j|^2 and <u, k_j> of each of this warp's segments.
#pragma unroll
    for (int c = 0; c < kSegments; ++c) {
      const int col = static_cast<int>(chunk[c]) * kChunk;
      for (int first = 0; first < K; first += kTogether) {
        Sums sums;
#pragma unroll
        for (int i = 0; i < Sums::kPairs; ++i) {
          float pair[4] = {};  // (terms, square and dot)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int j = first + 2 * i + k;
            if (j < K && j >= read.first_key && chunk[c] < chunks) {
              Chunk key = value(j, chunk[c]);
              if (read.key_begin > 0) {
                keep_from(key, col, read.key_begin);
              }
              pair[2 * k] = dot_add(key, key, 0.0f);
              pair[2 * k + 1] = dot_add(u[c], key, 0.0f);
            }
          }
          sums.set(i, pair, lane);
        }
        const float sum = sums.finish(lane);
        const unsigned segment = chunk[c] / kLanes;
        if (Sums::is_owner(lane) && segment < segments) {
          term_sums[segment * padded_terms * 2 + 2 * first + Sums::index(lane)] = sum;
        }
      }
    }
    synchronize_group(group, group_threads);

    // Every warp computes the softmax for itself: lane l has term l.
    constexpr int kLeast = kTogether == 2 ? 1 : kTogether == 4 ? 3 : 5;
    constexpr int kMost = kTogether < 8 ? kTogether : kReadRowsMaxTerms;
    TermLogit own = term_logit<kLeast, kMost>(read, term_sums, padded_terms, K - 1, segments, lane);
    if (lane < read.first_key || lane >= K) {
      own = {lane < K ? phase1_lse : -INFINITY, 0.0f};
    }
    const float prob = kTogether < 8 || K <= 8
                           ? softmax_over_lanes<kTogether>(own.logit, lane < K)
                           : softmax_over_lanes<kReadRowsMaxTerms>(own.logit, lane < K);
    if (warp_of_group == 0 && lane < K) {
      store_statistics(read, t, lane, own, prob);
    }

    Chunk h[kSegments];
#pragma unroll
    for (int c = 0; c < kSegments; ++c) {
      h[c] = zero_chunk();
    }
#pragma unroll 2
    for (int j = 0; j < K; ++j) {
      const float p_j = __shfl_sync(kAllLanes, prob, j);
#pragma unroll
      for (int c = 0; c < kSegments; ++c) {
        if (chunk[c] < chunks) {
          add_scaled(h[c], p_j, value(j, chunk[c]));
        }
      }
    }
    __syncwarp();
    if (lane == 0) {
      head.free[token.slot].arrive();
    }
    slot = (slot + static_cast<unsigned>(p.plan.groups * rows)) % p.plan.slots;
    token.slot += p.plan.groups;
    if (token.slot >= p.plan.tokens) {
      token.slot -= p.plan.tokens;
      token.parity ^= 1;
    }

    if (read.mix.present()) {
#pragma unroll
      for (int c = 0; c < kSegments; ++c) {
        if (chunk[c] < chunks) {
          store_whole<T>(read.mix.row(t).data, static_cast<int>(chunk[c]) * kChunk, pack<T>(h[c]));
        }
      }
    }
    if (read.norm) {
      float squares[kSegments];
#pragma unroll
      for (int c = 0; c < kSegments; ++c) {
        if (read.round_mix) {
          h[c] = unpack(pack<T>(h[c]));
        }
        squares[c] = dot_add(h[c], h[c], 0.0f);
      }
      const float sum = warp_sum_scatter(squares);
      // Lanes 0, 32 / kSegments, ... have the sums of the warp's segments.
      constexpr int kShare = kWarp / kSegments;
      const unsigned own = static_cast<unsigned>(warp_of_group * kSegments + lane / kShare);
      if (lane % kShare == 0 && own < segments) {
        norm_sums[own] = sum;
      }
      synchronize_group(group, group_threads);
      const float square = sum_of_segments(norm_sums, segments, lane);
      const float inv_rms_mix = rsqrtf(square * read.inv_dim + read.norm_eps);
      if (warp_of_group == 0 && lane == 0 && read.mix_inv_rms.present()) {
        read.mix_inv_rms.at(0, t) = inv_rms_mix;
      }
#pragma unroll
      for (int c = 0; c < kSegments; ++c) {
        if (chunk[c] < chunks) {
          const Chunk weight = read.norm_weight.present()
                                   ? load_shared_chunk(read.norm_weight.row(0), chunk[c])
                                   : Chunk{{1, 1, 1, 1, 1, 1, 1, 1}};
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            h[c].v[i] = h[c].v[i] * inv_rms_mix * weight.v[i];
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kSegments; ++c) {
      if (chunk[c] < chunks) {
        store_whole<T>(read.x.row(t).data, static_cast<int>(chunk[c]) * kChunk, pack<T>(h[c]));
      }
    }
  }
#endif
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_READ_CUH_
