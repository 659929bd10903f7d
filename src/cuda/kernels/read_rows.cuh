// `read` with the rows of a token in registers: one token a block, or a cluster of blocks that
// split its columns.
//
// The formulas are those of read_token.cuh.
//
// in    K terms and up to two further updates [T, D] storage; or K - 1 terms of a stored bank, in
//       float8 or float16 with scales [T, 1 or ceil(D / 128)], before a last one in bfloat16; or K
//       of such a bank in float16; u [R], lse [T] float32; g [D]
// out   x, partial' (and a copy of it), h [T, D]; logits, inv_rms, probs [T, K], mix_inv_rms [T];
//       lse of one query [T]; x_scale [T, 1 or ceil(D / 128)]
// bytes every row of a token is read once; K + 1 units of T * D elements, and partial' written
//
// A thread loads its chunks of all rows at once and keeps them as stored until the mixture. Nothing
// else hides latency: blocks are small, live for one token, and there are enough of them on a
// multiprocessor that some load while others compute. Columns are dealt out in segments, one a warp
// and chunk: segment (rank * kChunks + c) * warps + warp. Below sm_90 there is one rank. What a
// warp does once a token is shared by its chunks.
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

#include "cuda/device/chunk.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_chunk.cuh"
#include "cuda/kernels/read_token.cuh"
#include "cuda/policy.h"

namespace flash_attn_res::cuda {

template <class T, int kTerms, int kChunks>
inline constexpr ReadRowsForm kReadRowsForm =
    read_rows_form(/*half=*/sizeof(Packed<T>) == 16, kTerms, kChunks);

/// Scales two to a register, as bfloat16 has them exactly.
template <int kCount>
struct ScalePairs {
  uint32_t pairs[(kCount + 1) / 2] = {};

  /// Of float8_e8m0 bits.
  __device__ __forceinline__ void set(int i, uint32_t bits) {
    const uint32_t half = __float_as_uint(scale_from_bits(bits)) >> 16;
    pairs[i / 2] |= i % 2 == 0 ? half : half << 16;
  }
  __device__ __forceinline__ float get(int i) const {
    return __uint_as_float(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & 0xffff0000u);
  }
};

/// kMerge: two terms, of which the first is a phase-1 result. Read: AnyRead, or UsualRead where the
/// launcher finds the call to be one, or that over a stored bank.
template <class T, int kTerms, int kChunks, bool kMerge, bool kQuantized, class Read>
__global__ void __launch_bounds__(kReadRowsForm<T, kTerms, kChunks>.max_threads())
    read_rows_kernel(const __grid_constant__ typename Read::Params p) {
  using Token = ReadToken<T, kTerms, kChunks, kReadRowsForm<T, kTerms, kChunks>.least_terms, kMerge,
                          kQuantized, Read>;
  constexpr unsigned kLanes = kWarp;
  constexpr int kLast = Token::kLast;
  const unsigned ranks = cluster_size();
  const unsigned rank = cluster_rank();
  const uint32_t t = cluster_id() * blockDim.y + threadIdx.y;
  if (t >= p.tokens) {
    return;  // the barriers count the others
  }
  Token token(p, rank * kChunks * blockDim.x + threadIdx.x, blockDim.x);

  extern __shared__ float4 shared[];
  float* const sums = reinterpret_cast<float*>(shared) + threadIdx.y * token.layout().floats();
  __shared__ Mailbox mail[3];
  const auto box = [&](Meeting meeting) -> Mailbox& { return mail[static_cast<int>(meeting)]; };
  if (ranks > 1) {
    if (threadIdx.x == 0) {
      box(Meeting::kTerms).open(token.segments * 2 * (kMerge ? 1 : kTerms) * sizeof(float));
      box(Meeting::kNorm).open(token.segments * sizeof(float));
      if (kQuantized) {
        box(Meeting::kLargest).open(token.segments * sizeof(float));
      }
    }
    cluster_arrive();
  }
  // `copies` lanes have the same sum, this one as number `copy`: they divide the blocks.
  const auto share = [&](float* place, float sum, Meeting meeting, unsigned copy, unsigned copies) {
    if (ranks > 1) {
#pragma unroll 1
      for (unsigned r = copy; r < ranks; r += copies) {
        box(meeting).send(place, sum, r);
      }
    } else if (copy == 0) {
      *place = sum;
    }
  };
  const auto meet = [&](Meeting meeting) {
    if (ranks == 1) {
      if (blockDim.x == kLanes) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    } else {
      box(meeting).wait();
    }
  };

  // This thread's first chunk of a row; its others follow blockDim.x chunks apart.
  RowRef slot_rows[kTerms];
  RowRef update_rows[Token::kMaxUpdates];
#pragma unroll
  for (int s = 0; s < kTerms; ++s) {
    slot_rows[s] = token.own_chunks(s, p.rows.row(s, t));
  }
#pragma unroll
  for (int e = 0; e < Token::kMaxUpdates; ++e) {
    update_rows[e] = token.own_chunks(kTerms + e, p.rows.row(kTerms + e, t));
  }

  // What memory must fetch is on its way to L2 while the grid before this one ends. Blocks that
  // begin later than that would only lose time.
  constexpr unsigned kEarlyBlocks = 1024;
  if (grids_overlap() && blockIdx.x < kEarlyBlocks) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (token.in_row(c)) {
#pragma unroll
        for (int s = 0; s < kTerms; ++s) {
          if (token.in_use(s)) {
            if constexpr (Token::kStored) {
              if (s < Token::kBank) {
                prefetch_row_chunk<typename Token::Stored>(slot_rows[s], c * blockDim.x);
                continue;
              }
            }
            prefetch_row_chunk<T>(slot_rows[s], c * blockDim.x);
          }
        }
#pragma unroll
        for (int e = 0; e < Token::kMaxUpdates; ++e) {
          if (e < token.num_updates()) {
            prefetch_row_chunk<T>(update_rows[e], c * blockDim.x);
          }
        }
        if (token.whole_key()) {
          prefetch_row_chunk<AnyAligned>(
              RowRef{reinterpret_cast<char*>(p.query.data), DType::kFloat32, true}, token.chunk[c]);
        }
        if (p.norm_weight.present()) {
          prefetch_row_chunk<AnyAligned>(p.norm_weight.row(0), token.chunk[c]);
        }
      }
    }
  }
  wait_for_previous_grid();
  begin_next_grid();  // not before: grids that wait in line take time from the one that runs

  // The new partial sum's rows, then terms in the order of their sums, which begin while the last
  // rows are on their way.
  const auto load_slot = [&](int s) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const bool here = token.in_use(s) && token.in_row(c);
      if constexpr (Token::kStored) {
        if (s < Token::kBank) {
          token.slots[s][c] = {};
          if (here) {
            token.slots[s][c] =
                load_row_chunk<typename Token::Stored>(slot_rows[s], c * blockDim.x);
          }
          continue;
        }
      }
      token.typed(s, c) = {};
      if (here) {
        token.typed(s, c) = load_row_chunk<T>(slot_rows[s], c * blockDim.x);
      }
    }
  };
  const bool new_partial = token.has_update();
  load_slot(kLast);
  Packed<T> updates[Token::kMaxUpdates][kChunks];
  if (new_partial) {
#pragma unroll
    for (int e = 0; e < Token::kMaxUpdates; ++e) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        updates[e][c] = {};
        if (e < token.num_updates() && token.in_row(c)) {
          updates[e][c] = load_row_chunk<T>(update_rows[e], c * blockDim.x);
        }
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kLast; ++s) {
    load_slot(s);
  }
  ScalePairs<Token::kStored ? Token::kBank * kChunks : 1> scales;
  if constexpr (Token::kStored) {
#pragma unroll
    for (int s = 0; s < Token::kBank; ++s) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (token.in_use(s) && token.in_row(c)) {
          scales.set(s * kChunks + c, p.scales_of(s, t)[token.chunk[c] * kChunk >> p.scale_shift]);
        }
      }
    }
  }
  token.load_early_query();
  if (new_partial) {
    token.add_updates(t, [&](int e, int c) { return updates[e][c]; });
  }
  if (ranks > 1) {
    cluster_wait();  // every mailbox is open
  }
  token.finish(
      t, sums, [] { return cluster_rank() == 0; }, share, meet,
      [&](int s, int c) { return scales.get(s * kChunks + c); });
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_ROWS_CUH_
