// `read` with the rows of a token in registers: one token a block, or a cluster of blocks that
// split its columns.
//
//   partial' = round(partial + updates)                 stored, and used below as rounded
//   r_j = rsqrt(mean(k_j^2) + eps)    logit_j = scale r_j <u, k_j>, or the phase-1 lse
//   p = softmax(logit)                h = sum_j p_j z_j
//   x = h, or h rsqrt(mean(h^2) + norm_eps) g; stored as it is, or quantised (device/quantize.cuh)
//
// in    K terms and up to two further updates [T, D] storage; u [R], lse [T] float32; g [D]
// out   x, partial' (and a copy of it), h [T, D]; logits, inv_rms, probs [T, K], mix_inv_rms [T];
//       x_scale [T, 1 or ceil(D / 128)]
// bytes every row of a token is read once; K + 1 units of T * D elements, and partial' written
// sums  float32, over D in the order of read_sums.cuh: a token has the same bits however it is
//       spread over threads and blocks
//
// A thread loads its chunks of all rows at once and keeps them as stored until the mixture. Nothing
// else hides latency: blocks are small, live for one token, and there are enough of them on a
// multiprocessor that some load while others compute. Columns are dealt out in segments, one a warp
// and chunk: segment (rank * kChunks + c) * warps + warp. Below sm_90 there is one rank.
//
//   load rows -> partial' -> sums of this block -> barrier -> softmax, in every warp
//             -> mixture  -> its square         -> barrier -> norm, x
//                         -> its largest value  -> barrier -> x       with one scale a token

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_chunk.cuh"
#include "cuda/kernels/read_params.h"
#include "cuda/kernels/read_sums.cuh"
#include "cuda/policy.h"

namespace flash_attn_res::cuda {

template <class T, int kTerms>
inline constexpr ReadRowsForm kReadRowsForm =
    read_rows_form(/*half=*/sizeof(Packed<T>) == 16, kTerms);

/// Shared memory of one token: sums of all its segments, also those of other blocks.
struct ReadRowsLayout {
  unsigned segments;
  unsigned terms;  // that the kernel is compiled for
  bool quantized;

  /// Floats before the sums of the norm: (segments, terms, 2), square and dot of each term.
  FLASH_ATTN_RES_HOST_DEVICE unsigned norm_sums() const { return segments * terms * 2; }
  /// Floats before the largest absolute values of x: (segments).
  FLASH_ATTN_RES_HOST_DEVICE unsigned largest() const { return norm_sums() + segments; }
  FLASH_ATTN_RES_HOST_DEVICE unsigned floats() const {
    return (largest() + (quantized ? segments : 0) + 1) & ~1u;
  }
};

/// The bits of the largest absolute value of a chunk.
__device__ __forceinline__ uint32_t largest_bits(const Chunk& c) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    largest = max(largest, absolute_bits(c.v[i]));
  }
  return largest;
}

template <class T, int kTerms, bool kQuantized>
__global__ void __launch_bounds__(kReadRowsForm<T, kTerms>.max_threads())
    read_rows_kernel(const __grid_constant__ ReadRowsParams p) {
  constexpr int kChunks = kReadRowsForm<T, kTerms>.chunks;
  constexpr unsigned kLanes = kWarp;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const unsigned ranks = cluster_size();
  const unsigned rank = cluster_rank();
  const uint32_t t = cluster_id() * blockDim.y + threadIdx.y;
  if (t >= p.tokens) {
    return;  // the barriers count the others
  }
  begin_next_grid();
  const int K = p.num_terms;
  const unsigned chunks = static_cast<unsigned>(p.dim) / kChunk;
  const unsigned segments = (chunks + kLanes - 1) / kLanes;

  extern __shared__ float4 shared[];
  const ReadRowsLayout layout = {segments, kTerms, kQuantized};
  float* const term_sums = reinterpret_cast<float*>(shared) + threadIdx.y * layout.floats();
  float* const norm_sums = term_sums + layout.norm_sums();
  __shared__ Mailbox term_mail, norm_mail, largest_mail;
  if (ranks > 1) {
    if (threadIdx.x == 0) {
      term_mail.open(segments * 2 * kTerms * sizeof(float));
      norm_mail.open(segments * sizeof(float));
      if (kQuantized) {
        largest_mail.open(segments * sizeof(float));
      }
    }
    cluster_arrive();
  }
  const auto share = [&](float* place, float sum, Mailbox& mail) {
    if (ranks == 1) {
      *place = sum;
    } else {
#pragma unroll 1
      for (unsigned r = 0; r < ranks; ++r) {
        mail.send(place, sum, r);
      }
    }
  };
  const auto wait_for_sums = [&](Mailbox& mail) {
    if (ranks == 1) {
      __syncthreads();
    } else {
      mail.wait();
    }
  };

  unsigned chunk[kChunks];  // of a row; its segment is chunk / 32
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    chunk[c] = (rank * kChunks + c) * blockDim.x + threadIdx.x;
  }

  // Where the rows are is in the cache of constants by the time that the grid before this one ends.
#pragma unroll
  for (int s = 0; s < kTerms; ++s) {
    asm volatile("" ::"l"(p.rows.data[s]), "l"(p.rows.stride_bytes[s]));
  }
  wait_for_previous_grid();

  // Registers have no index: slot s holds term s, but the last slot always the last term.
  constexpr int kLast = kTerms - 1;
  const auto in_use = [&](int s) { return s < K - 1 || s == kLast; };
  const auto term_of = [&](int s) { return s == kLast ? K - 1 : s; };
  Packed<T> slots[kTerms][kChunks];
#pragma unroll
  for (int s = kLast; s >= 0; --s) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      slots[s][c] = {};
      if (in_use(s) && chunk[c] < chunks) {
        slots[s][c] = load_row_chunk<T>(p.rows.row(term_of(s), t), chunk[c]);
      }
    }
  }
  const float phase1_lse = p.first_key > 0 ? p.phase1_lse.at(0, t) : 0.0f;

  const bool new_partial = p.partial_out.present();
  const auto dtype_of = [&](int s) {
    return s == kLast && new_partial ? p.partial_out.dtype
                                     : static_cast<DType>(p.rows.dtype[term_of(s)]);
  };
  if (new_partial) {
    const int num_updates = p.num_rows - K;
    Packed<T> updates[kReadRowsMaxUpdates][kChunks];
#pragma unroll
    for (int e = 0; e < kReadRowsMaxUpdates; ++e) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (e < num_updates && chunk[c] < chunks) {
          updates[e][c] = load_row_chunk<T>(p.rows.row(K + e, t), chunk[c]);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
        Chunk sum = unpack_row_chunk<T>(slots[kLast][c], static_cast<DType>(p.rows.dtype[K - 1]));
#pragma unroll
        for (int e = 0; e < kReadRowsMaxUpdates; ++e) {
          if (e < num_updates) {
            add(sum, unpack_row_chunk<T>(updates[e][c], static_cast<DType>(p.rows.dtype[K + e])));
          }
        }
        slots[kLast][c] = pack_row_chunk<T>(sum, p.partial_out.dtype);
        store_row_chunk<T>(p.partial_out.row(t), chunk[c], slots[kLast][c]);
        if (p.snapshot.present()) {
          store_row_chunk<T>(p.snapshot.row(t), chunk[c], slots[kLast][c]);
        }
      }
    }
  }
  if (ranks > 1) {
    cluster_wait();  // every mailbox is open
  }

  // |k_j|^2 and <u, k_j> of each of this warp's segments.
  using Sums = PairSums<kTerms>;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int col = static_cast<int>(chunk[c]) * kChunk;
    const bool in_key = chunk[c] < chunks && col + kChunk > p.key_begin;
    const Chunk u = in_key && p.query.present()
                        ? load_query_chunk(p.query, col, p.key_begin, p.query_aligned)
                        : zero_chunk();
#pragma unroll
    for (int s0 = 0; s0 < kTerms; s0 += 2 * Sums::kPairs) {
      Sums sums;
#pragma unroll
      for (int i = 0; i < Sums::kPairs; ++i) {
        float pair[4] = {};  // (terms, square and dot)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int s = s0 + 2 * i + k;
          if (s < kTerms && in_use(s) && term_of(s) >= p.first_key) {
            Chunk key = unpack_row_chunk<T>(slots[s][c], dtype_of(s));
            if (p.key_begin > 0) {
              keep_from(key, col, p.key_begin);
            }
            pair[2 * k] = dot_add(key, key, 0.0f);
            pair[2 * k + 1] = dot_add(u, key, 0.0f);
          }
        }
        sums.set(i, pair, lane);
      }
      const float sum = sums.finish(lane);
      const int index = 2 * s0 + Sums::index(lane);
      if (Sums::is_owner(lane) && index < 2 * kTerms && chunk[c] / kLanes < segments) {
        share(term_sums + chunk[c] / kLanes * 2 * kTerms + index, sum, term_mail);
      }
    }
  }
  wait_for_sums(term_mail);

  // Every warp computes the softmax for itself: lane l has term l.
  TermLogit own = term_logit<kReadRowsForm<T, kTerms>.least_terms, kTerms>(p, term_sums, kTerms,
                                                                           kLast, segments, lane);
  if (lane < p.first_key || lane >= K) {
    own = {lane < K ? phase1_lse : -INFINITY, 0.0f};
  }
  const auto [logit, inv_rms] = own;
  const float prob = softmax_over_lanes<kTerms>(logit, lane < K);
  if (threadIdx.x < kLanes && rank == 0 && lane < K) {
    store_statistics(p, t, lane, {logit, inv_rms}, prob);
  }

  Chunk h[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    h[c] = zero_chunk();
  }
#pragma unroll
  for (int s = 0; s < kTerms; ++s) {
    if (in_use(s)) {
      const float p_s = __shfl_sync(kAllLanes, prob, term_of(s));
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        add_scaled(h[c], p_s, unpack_row_chunk<T>(slots[s][c], dtype_of(s)));
      }
    }
  }
  if (p.mix.present()) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
        store_row_chunk<T>(p.mix.row(t), chunk[c], pack_row_chunk<T>(h[c], p.mix.dtype));
      }
    }
  }

  if (p.norm) {
    Chunk weight[kChunks];  // on its way during the barrier
    float squares[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      weight[c] = {{1, 1, 1, 1, 1, 1, 1, 1}};
      if (p.norm_weight.present() && chunk[c] < chunks) {
        weight[c] = load_shared_chunk(p.norm_weight.row(0), chunk[c]);
      }
      if (p.round_mix) {
        h[c] = round_to(p.x.dtype, h[c]);
      }
      squares[c] = dot_add(h[c], h[c], 0.0f);
    }
    const float sum = warp_sum_scatter(squares);
    // Lanes 0, 32 / kChunks, ... have the sums of the warp's segments.
    constexpr int kGroup = kWarp / kChunks;
    const unsigned own = ((rank * kChunks + lane / kGroup) * blockDim.x + threadIdx.x) / kLanes;
    if (lane % kGroup == 0 && own < segments) {
      share(norm_sums + own, sum, norm_mail);
    }
    wait_for_sums(norm_mail);
    const float square = sum_of_segments(norm_sums, segments, lane);
    const float inv_rms_mix = rsqrtf(square * p.inv_dim + p.norm_eps);
    if (threadIdx.x == 0 && rank == 0 && p.mix_inv_rms.present()) {
      p.mix_inv_rms.at(0, t) = inv_rms_mix;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        h[c].v[i] = h[c].v[i] * inv_rms_mix * weight[c].v[i];
      }
    }
  }
  if constexpr (kQuantized) {
    uint32_t largest[kChunks];  // of a chunk, then of the values that share its scale
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      largest[c] = largest_bits(h[c]);  // zero beyond the row
    }
    if (p.x_scale_groups == 1) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const uint32_t of_segment = __reduce_max_sync(kAllLanes, largest[c]);
        if (lane == 0 && chunk[c] / kLanes < segments) {
          share(term_sums + layout.largest() + chunk[c] / kLanes, __uint_as_float(of_segment),
                largest_mail);
        }
      }
      wait_for_sums(largest_mail);
      uint32_t of_token = 0;
#pragma unroll 8
      for (unsigned g = 0; g < segments; ++g) {
        of_token = max(of_token, __float_as_uint(term_sums[layout.largest() + g]));
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        largest[c] = of_token;
      }
    } else {
      constexpr unsigned kHalf = 0xffffu;  // lanes of a group of 128 columns
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        largest[c] = __reduce_max_sync(lane < 16 ? kHalf : ~kHalf, largest[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
        const float scale = group_scale(largest[c], p.x_scale_power_of_two);
        store_fp8_chunk(p.x.row(t), chunk[c], h[c], __frcp_rn(scale));
        const unsigned group = p.x_scale_groups == 1 ? 0 : chunk[c] / 16;
        if (p.x_scale_groups == 1 ? chunk[c] == 0 : lane % 16 == 0) {
          p.x_scale.at(t, group) = scale;
        }
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
        store_row_chunk<T>(p.x.row(t), chunk[c], pack_row_chunk<T>(h[c], p.x.dtype));
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_
