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
// and chunk: segment (rank * kChunks + c) * warps + warp. Below sm_90 there is one rank. What a
// warp does once a token is shared by its chunks; with more than two, u and g come when they are
// used.
//
//   prefetch to L2 -> the grid before has ended
//   load rows, u -> partial' -> sums of this block -> barrier -> softmax, in every warp
//   load g       -> mixture  -> its square         -> barrier -> norm, x
//                            -> its largest value  -> barrier -> x       with one scale a token
//
// A lone token takes as long as its dependent steps and the instructions of one warp: addresses are
// ready before the grid may begin, loads are issued together, and sums of whole keys have no
// branches, so that those of several terms are under way at once.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_

#include <cstdint>
#include <utility>

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

template <class T, int kTerms, int kChunks>
inline constexpr ReadRowsForm kReadRowsForm =
    read_rows_form(/*half=*/sizeof(Packed<T>) == 16, kTerms, kChunks);

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

/// kMerge: two terms, of which the first is a phase-1 result.
template <class T, int kTerms, int kChunks, bool kMerge, bool kQuantized>
__global__ void __launch_bounds__(kReadRowsForm<T, kTerms, kChunks>.max_threads())
    read_rows_kernel(const __grid_constant__ ReadRowsParams p) {
  constexpr unsigned kLanes = kWarp;
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const unsigned ranks = cluster_size();
  const unsigned rank = cluster_rank();
  const uint32_t t = cluster_id() * blockDim.y + threadIdx.y;
  if (t >= p.tokens) {
    return;  // the barriers count the others
  }
  const int K = kMerge ? 2 : p.num_terms;
  const int first_key = kMerge ? 1 : p.first_key;
  const unsigned chunks = static_cast<unsigned>(p.dim) / kChunk;
  const unsigned segments = (chunks + kLanes - 1) / kLanes;

  extern __shared__ float4 shared[];
  const ReadRowsLayout layout = {segments, kTerms, kQuantized};
  float* const term_sums = reinterpret_cast<float*>(shared) + threadIdx.y * layout.floats();
  float* const norm_sums = term_sums + layout.norm_sums();
  __shared__ Mailbox term_mail, norm_mail, largest_mail;
  if (ranks > 1) {
    if (threadIdx.x == 0) {
      term_mail.open(segments * 2 * (kMerge ? 1 : kTerms) * sizeof(float));
      norm_mail.open(segments * sizeof(float));
      if (kQuantized) {
        largest_mail.open(segments * sizeof(float));
      }
    }
    cluster_arrive();
  }
  // `copies` lanes have the same sum, this one as number `copy`: they divide the blocks.
  const auto share = [&](float* place, float sum, Mailbox& mail, unsigned copy, unsigned copies) {
    if (ranks > 1) {
#pragma unroll 1
      for (unsigned r = copy; r < ranks; r += copies) {
        mail.send(place, sum, r);
      }
    } else if (copy == 0) {
      *place = sum;
    }
  };
  const auto wait_for_sums = [&](Mailbox& mail) {
    if (ranks == 1) {
      if (blockDim.x == kLanes) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    } else {
      mail.wait();
    }
  };

  constexpr int kPadded = kChunks == 3 ? 4 : kChunks;  // sums over a warp come in powers of two
  // With more chunks a thread has no registers for what can be loaded later from L1.
  constexpr bool kEarly = kChunks <= 2;
  constexpr int kEarlyUpdates = kEarly ? kReadRowsMaxUpdates : 1;
  unsigned chunk[kChunks];  // of a row; its segment is chunk / 32
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    chunk[c] = (rank * kChunks + c) * blockDim.x + threadIdx.x;
  }

  const auto segment_of = [&](unsigned c) {
    return ((rank * kChunks + c) * blockDim.x + threadIdx.x) / kLanes;
  };

  // Registers have no index: slot s holds term s, but the last slot always the last term. The table
  // of rows is in the order of the slots.
  constexpr int kLast = kTerms - 1;
  constexpr int kAlways = kReadRowsForm<T, kTerms, kChunks>.least_terms - 1;
  const auto in_use = [&](int s) { return s < kAlways || s < K - 1 || s == kLast; };
  const auto term_of = [&](int s) { return s == kLast ? K - 1 : s; };
  const int num_updates = p.num_rows - K;
  // This thread's first chunk of a row; its others follow blockDim.x chunks apart.
  const auto own_chunks = [&](RowRef row) {
    row.data += chunk[0] * row_chunk_bytes<T>(row);
    return row;
  };
  RowRef slot_rows[kTerms];
  RowRef update_rows[kReadRowsMaxUpdates];
#pragma unroll
  for (int s = 0; s < kTerms; ++s) {
    slot_rows[s] = own_chunks(p.rows.row(s, t));
  }
#pragma unroll
  for (int e = 0; e < kReadRowsMaxUpdates; ++e) {
    update_rows[e] = own_chunks(p.rows.row(kTerms + e, t));
  }
  const RowRef query_row = {reinterpret_cast<char*>(p.query.data), DType::kFloat32, true};
  const bool whole_key = p.key_begin == 0 && p.query_aligned && p.query.present();

  // What memory must fetch is on its way to L2 while the grid before this one ends. Blocks that
  // begin later than that would only lose time.
  constexpr unsigned kEarlyBlocks = 1024;
  if (grids_overlap() && blockIdx.x < kEarlyBlocks) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
#pragma unroll
        for (int s = 0; s < kTerms; ++s) {
          if (in_use(s)) {
            prefetch_row_chunk<T>(slot_rows[s], c * blockDim.x);
          }
        }
#pragma unroll
        for (int e = 0; e < kReadRowsMaxUpdates; ++e) {
          if (e < num_updates) {
            prefetch_row_chunk<T>(update_rows[e], c * blockDim.x);
          }
        }
        if (whole_key) {
          prefetch_row_chunk<AnyAligned>(query_row, chunk[c]);
        }
        if (p.norm_weight.present()) {
          prefetch_row_chunk<AnyAligned>(p.norm_weight.row(0), chunk[c]);
        }
      }
    }
  }
  wait_for_previous_grid();
  begin_next_grid();  // not before: grids that wait in line take time from the one that runs

  // The new partial sum's rows, then terms in the order of their sums, which begin while the last
  // rows are on their way.
  Packed<T> slots[kTerms][kChunks];
  const auto load_slot = [&](int s) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      slots[s][c] = {};
      if (in_use(s) && chunk[c] < chunks) {
        slots[s][c] = load_row_chunk<T>(slot_rows[s], c * blockDim.x);
      }
    }
  };
  const bool new_partial = p.partial_out.present();
  load_slot(kLast);
  Packed<T> updates[kEarlyUpdates][kChunks];
  if (new_partial) {
#pragma unroll
    for (int e = 0; e < kEarlyUpdates; ++e) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        updates[e][c] = {};
        if (e < num_updates && chunk[c] < chunks) {
          updates[e][c] = load_row_chunk<T>(update_rows[e], c * blockDim.x);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kLast; ++s) {
    load_slot(s);
  }
  // Of a whole key there is no question to ask: what lies beyond a row meets zeros.
  const auto load_query = [&]<bool kWholeKey>(int c) {
    if (kWholeKey) {
      return unpack(
          load_whole<float>(query_row.data, static_cast<int>(min(chunk[c], chunks - 1)) * kChunk));
    }
    const int col = static_cast<int>(chunk[c]) * kChunk;
    const bool in_key = chunk[c] < chunks && col + kChunk > p.key_begin && p.query.present();
    return in_key ? load_query_chunk(p.query, col, p.key_begin, p.query_aligned) : zero_chunk();
  };
  Chunk early_query[kEarly ? kChunks : 1];
  if constexpr (kEarly) {
    if (whole_key) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        early_query[c] = load_query.template operator()<true>(c);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        early_query[c] = load_query.template operator()<false>(c);
      }
    }
  }

  const auto dtype_in = [&](int row) { return static_cast<DType>(p.rows.dtype[row]); };
  const auto dtype_of = [&](int s) {
    return s == kLast && new_partial ? p.partial_out.dtype : dtype_in(s);
  };
  if (new_partial) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (chunk[c] < chunks) {
        Chunk sum = unpack_row_chunk<T>(slots[kLast][c], dtype_in(kLast));
#pragma unroll
        for (int e = 0; e < kReadRowsMaxUpdates; ++e) {
          if (e < num_updates) {
            const Packed<T> update = e < kEarlyUpdates
                                         ? updates[e < kEarlyUpdates ? e : 0][c]
                                         : load_row_chunk<T>(update_rows[e], c * blockDim.x);
            add(sum, unpack_row_chunk<T>(update, dtype_in(kTerms + e)));
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

  // |k_j|^2 and <u, k_j> of each of this warp's segments: of up to eight terms of a segment at
  // once, and of so many segments that they are eight pairs.
  const auto sum_terms = [&]<int kFirst, bool kWholeKey>() {
    constexpr int kTermPairs = PairSums<(kTerms - kFirst < 8 ? kTerms - kFirst : 8)>::kPairs;
    constexpr int kTogether = kChunks * kTermPairs < 8 ? kChunks : 8 / kTermPairs;
    using Sums = PairSums<2 * kTermPairs * kTogether>;
    constexpr unsigned kCopies = 8 / Sums::kPairs;
#pragma unroll
    for (int first_chunk = 0; first_chunk < kChunks; first_chunk += kTogether) {
      Sums sums;
#pragma unroll
      for (int d = 0; d < kTogether; ++d) {
        const int c = first_chunk + d;
        const int col = static_cast<int>(chunk[c]) * kChunk;
        const Chunk u =
            kEarly ? early_query[kEarly ? c : 0] : load_query.template operator()<kWholeKey>(c);
#pragma unroll
        for (int i = 0; i < kTermPairs; ++i) {
          float pair[4] = {};  // (terms, square and dot)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int s = kFirst + 2 * i + k;
            if (s < kTerms && in_use(s) && (s > 0 || first_key == 0)) {
              Chunk key = unpack_row_chunk<T>(slots[s][c], dtype_of(s));
              if (!kWholeKey) {
                keep_from(key, col, p.key_begin);
              }
              pair[2 * k] = dot_add(key, key, 0.0f);
              pair[2 * k + 1] = dot_add(u, key, 0.0f);
            }
          }
          sums.set(d * kTermPairs + i, pair, lane);
        }
      }
      const float sum = sums.finish(lane);
      constexpr int kPerSegment = 4 * kTermPairs;
      const int own = Sums::index(lane);
      const int index = 2 * kFirst + (kTogether > 1 ? own % kPerSegment : own);
      const int own_chunk = first_chunk + (kTogether > 1 ? own / kPerSegment : 0);
      const unsigned segment = segment_of(own_chunk);
      if (index < 2 * kTerms && own_chunk < kChunks && segment < segments) {
        share(term_sums + segment * 2 * kTerms + index, sum, term_mail,
              static_cast<unsigned>(lane) % kCopies, kCopies);
      }
    }
  };
  // The one key of a merge: the sums of all this warp's segments at once.
  const auto sum_partial = [&]<bool kWholeKey>() {
    float sums[2 * kPadded] = {};  // (segments, square and dot)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Chunk u =
          kEarly ? early_query[kEarly ? c : 0] : load_query.template operator()<kWholeKey>(c);
      Chunk key = unpack_row_chunk<T>(slots[kLast][c], dtype_of(kLast));
      if (!kWholeKey) {
        keep_from(key, static_cast<int>(chunk[c]) * kChunk, p.key_begin);
      }
      sums[2 * c] = dot_add(key, key, 0.0f);
      sums[2 * c + 1] = dot_add(u, key, 0.0f);
    }
    const float sum = warp_sum_scatter(sums);
    constexpr unsigned kCopies = kLanes / (2 * kPadded);
    const unsigned index = static_cast<unsigned>(lane) / kCopies;
    const unsigned segment = segment_of(index / 2);
    if (index / 2 < kChunks && segment < segments) {
      share(term_sums + (segment * kTerms + kLast) * 2 + index % 2, sum, term_mail,
            static_cast<unsigned>(lane) % kCopies, kCopies);
    }
  };
  const auto sum_all_terms =
      [&]<bool kWholeKey, int... kGroup>(std::integer_sequence<int, kGroup...>) {
        (sum_terms.template operator()<8 * kGroup, kWholeKey>(), ...);
      };
  using Groups = std::make_integer_sequence<int, (kTerms + 7) / 8>;
  if constexpr (kMerge) {
    whole_key ? sum_partial.template operator()<true>() : sum_partial.template operator()<false>();
  } else {
    whole_key ? sum_all_terms.template operator()<true>(Groups{})
              : sum_all_terms.template operator()<false>(Groups{});
  }

  // On their way during the barrier.
  const float phase1_lse = first_key > 0 ? p.phase1_lse.at(0, t) : 0.0f;
  Chunk early_weight[kEarly ? kChunks : 1];
  if constexpr (kEarly) {
    if (p.norm && p.norm_weight.present()) {
      for_shared_chunks(p.norm_weight.row(0), chunk, chunks,
                        [&](int c, const Chunk& weight) { early_weight[c] = weight; });
    }
  }
  wait_for_sums(term_mail);

  // Every warp computes the softmax for itself: lane l has term l.
  TermLogit own = term_logit<kReadRowsForm<T, kTerms, kChunks>.least_terms, kTerms>(
      p, term_sums, kTerms, kLast, segments, lane);
  if (lane < first_key || lane >= K) {
    own = {lane < K ? phase1_lse : -INFINITY, 0.0f};
  }
  const auto [logit, inv_rms] = own;
  const float prob = softmax_over_lanes<kTerms>(logit, lane < K);
  if (threadIdx.x < kLanes && rank == 0 && lane < K) {
    store_statistics(p, t, lane, {logit, inv_rms}, prob);
  }

  // Chunk by chunk where a thread has several: what a chunk's rows took, its mixture takes.
  Chunk h[kChunks];
  float probs[kTerms];
  const auto prob_of = [&](int s) { return __shfl_sync(kAllLanes, prob, term_of(s)); };
  if (kChunks > 1) {
#pragma unroll
    for (int s = 0; s < kTerms; ++s) {
      if (in_use(s)) {
        probs[s] = prob_of(s);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    h[c] = zero_chunk();
#pragma unroll
    for (int s = 0; s < kTerms; ++s) {
      if (in_use(s)) {
        add_scaled(h[c], kChunks > 1 ? probs[s] : prob_of(s),
                   unpack_row_chunk<T>(slots[s][c], dtype_of(s)));
      }
    }
    if (chunk[c] < chunks) {
      if (p.mix.present()) {
        store_row_chunk<T>(p.mix.row(t), chunk[c], pack_row_chunk<T>(h[c], p.mix.dtype));
      }
      if (!kQuantized && !p.norm) {
        store_row_chunk<T>(p.x.row(t), chunk[c], pack_row_chunk<T>(h[c], p.x.dtype));
      }
    }
  }
  if (!kQuantized && !p.norm) {
    return;
  }

  if (p.norm) {
    float squares[kPadded] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (p.round_mix) {
        h[c] = round_to(p.x.dtype, h[c]);
      }
      squares[c] = dot_add(h[c], h[c], 0.0f);
    }
    const float sum = warp_sum_scatter(squares);
    // Of each segment of the warp kGroup lanes have the sum.
    constexpr unsigned kGroup = kLanes / kPadded;
    const unsigned own = segment_of(lane / kGroup);
    if (lane / kGroup < kChunks && own < segments) {
      share(norm_sums + own, sum, norm_mail, lane % kGroup, kGroup);
    }
    wait_for_sums(norm_mail);
    const float square = sum_of_segments<1>(norm_sums, segments, lane);
    const float inv_rms_mix = rsqrtf(square * p.inv_dim + p.norm_eps);
    if (threadIdx.x == 0 && rank == 0 && p.mix_inv_rms.present()) {
      p.mix_inv_rms.at(0, t) = inv_rms_mix;
    }
    const auto normalise = [&](int c, const Chunk& weight) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        h[c].v[i] = h[c].v[i] * inv_rms_mix * weight.v[i];
      }
    };
    if (!p.norm_weight.present()) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        normalise(c, {{1, 1, 1, 1, 1, 1, 1, 1}});
      }
    } else if constexpr (kEarly) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        normalise(c, early_weight[c]);
      }
    } else {
      for_shared_chunks(p.norm_weight.row(0), chunk, chunks, normalise);
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
        if (chunk[c] / kLanes < segments) {
          share(term_sums + layout.largest() + chunk[c] / kLanes, __uint_as_float(of_segment),
                largest_mail, static_cast<unsigned>(lane), kLanes);
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
