// `read`, one token a block at a time, its rows staged in shared memory.
//
//   partial' = round(partial + updates)                 stored, and used below as rounded
//   r_j = rsqrt(mean(k_j^2) + eps)    logit_j = scale r_j <u, k_j>, or the phase-1 lse
//   p = softmax(logit)                h = sum_j p_j z_j
//   x = h, or h rsqrt(mean(h^2) + norm_eps) g
//
// in    K terms and further updates [T, D] storage; u [R], lse [T] float32; g [D]
// out   x, partial', h [T, D]; logits, inv_rms, probs [T, K], mix_inv_rms [T]
// bytes every row of a token is read once; K + 1 units of T * D elements, and partial' written
// sums  float32: a thread's columns in order, then lanes, then warps. They depend on D and the
//       dtypes, never on the other tokens of the call
//
// Blocks stay and walk over tokens with a ring of tiles: while one token is computed, the copies of
// the next `stages` are under way. A thread copies and reads its own chunks (kChunks of them), so
// the only barriers are those of the sums: one for the logits, one for the norm.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_STAGED_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_STAGED_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/tile.cuh"
#include "cuda/kernels/read_params.h"

namespace flash_attn_res::cuda {

inline constexpr int kReadMaxThreads = 512;

/// Blocks of 512 threads that registers must allow: the kernel of two chunks fits 64 of them for
/// 16-bit storage, without spills.
template <class T, int kChunks>
inline constexpr int kReadMinBlocks = kPlanes<T> == 1 && kChunks == 2 ? 2 : 1;

/// Registers of a thread that the policy counts with.
constexpr int read_registers(bool half, int chunks_per_thread) {
  return half && chunks_per_thread == 2 ? 64 : 120;
}

inline constexpr int kReadTermBatch = 4;  // terms whose sums leave the warp together

/// Shared memory of a block, in this order:
///   u              (2, chunks) float4, when there is a query
///   tiles          (stages, rows, planes, chunks) uint4
///   term sums      (2, warps, 2 K) float: square and dot of each term, by parity of the token
///   probabilities  (warps, K) float: each warp keeps its own copy
///   norm sums      (2, warps) float
struct ReadStagedLayout {
  int64_t tiles, term_sums, probs, norm_sums, total;  // byte offsets

  FLASH_ATTN_RES_HOST_DEVICE ReadStagedLayout(bool has_query, int stages, int rows, int planes,
                                              int chunks, int warps, int terms) {
    tiles = has_query ? static_cast<int64_t>(chunks) * 32 : 0;
    term_sums = tiles + static_cast<int64_t>(stages) * rows * planes * chunks * 16;
    probs = term_sums + static_cast<int64_t>(2) * warps * 2 * terms * 4;
    norm_sums = probs + static_cast<int64_t>(warps) * terms * 4;
    total = norm_sums + static_cast<int64_t>(2) * warps * 4;
  }
};

/// Barrier over the block; a block of one warp needs the lighter one.
__device__ __forceinline__ void block_barrier(int warps) {
  if (warps > 1) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

/// Sum over warps of sums[w * stride], in order.
__device__ __forceinline__ float sum_over_warps(const float* sums, int warps, int stride) {
  float total = 0.0f;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    total += sums[w * stride];
  }
  return total;
}

template <class T, int kChunks, int kRows>
__global__ void __launch_bounds__(kReadMaxThreads, kReadMinBlocks<T, kChunks>)
    read_staged_kernel(const __grid_constant__ ReadParams<kRows> p) {
  const int threads = static_cast<int>(blockDim.x);
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;
  const int warps = threads / kWarp;
  const int chunks = p.dim / kChunk;
  const int K = p.num_terms;
  const bool has_query = p.query.present();

  extern __shared__ float4 shared[];
  char* const base = reinterpret_cast<char*>(shared);
  const ReadStagedLayout layout(has_query, p.stages, p.num_rows, kPlanes<T>, chunks, warps, K);
  const SharedVector query = {shared, chunks};
  const TileRing<T> tile = {reinterpret_cast<uint4*>(base + layout.tiles), p.num_rows, chunks};
  float* const all_term_sums = reinterpret_cast<float*>(base + layout.term_sums);
  float* const probs = reinterpret_cast<float*>(base + layout.probs) + warp * K;
  float* const all_norm_sums = reinterpret_cast<float*>(base + layout.norm_sums);

  const auto fetch_token = [&](int64_t t, int stage) {
    if (t < p.tokens) {
      for (int j = 0; j < p.num_rows; ++j) {
        const RowRef row = p.rows.row(j, t);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int chunk = tid + c * threads;
          if (chunk < chunks) {
            tile.fetch(stage, j, chunk, row);
          }
        }
      }
    }
    commit_copies();  // also when empty: groups are counted
  };
  for (int stage = 0; stage < p.stages; ++stage) {
    fetch_token(blockIdx.x + static_cast<int64_t>(stage) * gridDim.x, stage);
  }

  if (has_query) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = tid + c * threads;
      if (chunk < chunks) {
        Chunk u;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int r = chunk * kChunk + i - p.key_begin;
          u.v[i] = r >= 0 ? p.query.at(0, r) : 0.0f;
        }
        query.put(chunk, u);
      }
    }
  }

  // For AnyType the partial sum may leave its storage type when updates are added.
  const bool new_partial = p.partial_out.present();
  const auto term_dtype = [&](int j) {
    return new_partial && j == K - 1 ? DType::kFloat32 : static_cast<DType>(p.rows.dtype[j]);
  };

  int stage = 0;
  int parity = 0;
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    wait_copies(p.stages - 1);

    if (new_partial) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          Chunk sum = tile.get(stage, K - 1, chunk, static_cast<DType>(p.rows.dtype[K - 1]));
          for (int j = K; j < p.num_rows; ++j) {
            add(sum, tile.get(stage, j, chunk, static_cast<DType>(p.rows.dtype[j])));
          }
          sum = round_to(p.partial_out.dtype, sum);
          store_chunk_as<T>(p.partial_out.row(t), chunk * kChunk, p.dim, sum);
          tile.put(stage, K - 1, chunk, sum);
        }
      }
    }

    // |k_j|^2 and <u, k_j> of this warp's columns.
    float* const term_sums = all_term_sums + parity * warps * 2 * K;
    for (int j0 = p.first_key; j0 < K; j0 += kReadTermBatch) {
      float sums[2 * kReadTermBatch] = {};  // (terms, square and dot)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          const Chunk u = has_query ? query.get(chunk) : zero_chunk();
#pragma unroll
          for (int i = 0; i < kReadTermBatch; ++i) {
            if (j0 + i < K) {
              Chunk key = tile.get(stage, j0 + i, chunk, term_dtype(j0 + i));
              keep_from(key, chunk * kChunk, p.key_begin);
              sums[2 * i] = dot_add(key, key, sums[2 * i]);
              sums[2 * i + 1] = dot_add(u, key, sums[2 * i + 1]);
            }
          }
        }
      }
      const float sum = warp_sum_scatter(sums);
      constexpr int kLanes = kWarp / (2 * kReadTermBatch);
      const int index = 2 * j0 + lane / kLanes;
      if (lane % kLanes == 0 && index < 2 * K) {
        term_sums[warp * 2 * K + index] = sum;
      }
    }
    block_barrier(warps);

    // Every warp computes the softmax for itself: lane l has terms l and l + 32.
    float logit[2] = {-INFINITY, -INFINITY};
    float inv_rms[2] = {};
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + i * kWarp;
      if (i * kWarp < K && j < K) {
        if (j < p.first_key) {
          logit[i] = p.phase1_lse.at(0, t);
        } else {
          const float square = sum_over_warps(term_sums + 2 * j, warps, 2 * K);
          const float dot = sum_over_warps(term_sums + 2 * j + 1, warps, 2 * K);
          inv_rms[i] = rsqrtf(square * p.inv_key_dim + p.eps);
          logit[i] = has_query ? p.scale * inv_rms[i] * dot : 0.0f;
        }
        largest = fmaxf(largest, logit[i]);
      }
    }
    largest = warp_max(largest);
    float weight[2] = {};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * kWarp < K && lane + i * kWarp < K) {
        weight[i] = expf(logit[i] - largest);
        sum += weight[i];
      }
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + i * kWarp;
      if (i * kWarp < K && j < K) {
        const float prob = weight[i] / sum;
        probs[j] = prob;
        if (warp == 0) {
          if (p.logits.present()) {
            p.logits.at(t, j) = logit[i];
          }
          if (p.inv_rms.present()) {
            p.inv_rms.at(t, j) = inv_rms[i];
          }
          if (p.probs.present()) {
            p.probs.at(t, j) = prob;
          }
        }
      }
    }
    __syncwarp();

    Chunk h[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      h[c] = zero_chunk();
    }
#pragma unroll 4
    for (int j = 0; j < K; ++j) {
      const float prob = probs[j];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          add_scaled(h[c], prob, tile.get(stage, j, chunk, term_dtype(j)));
        }
      }
    }
    fetch_token(t + static_cast<int64_t>(p.stages) * gridDim.x, stage);

    float inv_rms_mix = 1.0f;
    if (p.norm) {
      float square = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (p.mix.present() && tid + c * threads < chunks) {
          store_chunk_as<T>(p.mix.row(t), (tid + c * threads) * kChunk, p.dim, h[c]);
        }
        if (p.round_mix) {
          h[c] = round_to(p.x.dtype, h[c]);
        }
        square = dot_add(h[c], h[c], square);
      }
      square = warp_sum(square);
      float* const norm_sums = all_norm_sums + parity * warps;
      if (lane == 0) {
        norm_sums[warp] = square;
      }
      block_barrier(warps);
      inv_rms_mix =
          rsqrtf(sum_over_warps(norm_sums, warps, 1) / static_cast<float>(p.dim) + p.norm_eps);
      if (tid == 0 && p.mix_inv_rms.present()) {
        p.mix_inv_rms.at(0, t) = inv_rms_mix;
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = tid + c * threads;
      if (chunk < chunks) {
        if (p.norm) {
          const Chunk g = p.norm_weight.present()
                              ? load_chunk(p.norm_weight.row(0), chunk * kChunk, p.dim)
                              : Chunk{{1, 1, 1, 1, 1, 1, 1, 1}};
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            h[c].v[i] = h[c].v[i] * inv_rms_mix * g.v[i];
          }
        } else if (p.mix.present()) {
          store_chunk_as<T>(p.mix.row(t), chunk * kChunk, p.dim, h[c]);
        }
        store_chunk_as<T>(p.x.row(t), chunk * kChunk, p.dim, h[c]);
      }
    }
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    parity ^= 1;
  }
  wait_copies<0>();
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_STAGED_CUH_
