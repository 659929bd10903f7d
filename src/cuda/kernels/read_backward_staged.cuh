// Backward of `read`, one token a block at a time, its rows staged in shared memory.
//
//   p = softmax(logits)       h = sum_j p_j z_j       y = g dx
//   dh        = dmix + dx, or dmix + rh y - h (rh^3 / D) <y, h>
//   dp_j      = <dh, z_j>     delta = sum_j p_j dp_j  dlogit_j = p_j (dp_j - delta)
//   dz_j      = p_j dh + on the key's columns: scale dlogit_j r_j u - dlogit_j logit_j r_j^2/R k_j
//   du        = sum_t,j scale dlogit_j r_j k_j        dg = sum_t dx h rh
//
// in    K terms, dx, dmix, dpartial_out [T, D] storage; logits, inv_rms [T, K], rh [T], u [R], g
// [D] out   dsources (overwritten or added to), dpartial, dphase1_out, dh [T, D]; dphase1_lse, gate
// [T];
//       du and dg of this block's tokens [blocks, D] float32, summed by reduce_partials
// bytes K + 1 units of T * D elements read, K written, one more each that is accumulated
// sums  float32: a thread's columns in order, then lanes, then warps; du and dg stay in registers
//       over all of a block's tokens, whose number depends on T and on the number of
//       multiprocessors
//
// Blocks stay and walk over tokens with a ring of tiles: while one token is computed, the copies of
// the next `stages` are under way. A thread copies and reads its own chunks (kChunks of them), so
// the only barriers are those of the sums. A row's place in the ring is refilled as soon as its
// gradient has been stored, while the rows after it are still in use.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_BACKWARD_STAGED_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_BACKWARD_STAGED_CUH_

#include "cuda/device/block.cuh"
#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/tile.cuh"
#include "cuda/kernels/read_params.h"

namespace flash_attn_res::cuda {

inline constexpr int kReadTermBatch = 4;  // terms whose sums leave the warp together

/// Shared memory of a block, in this order:
///   u             (2, chunks) float4, when there is a query
///   tiles         (stages, rows, planes, chunks) uint4
///   term sums     (2, warps, K) float, by parity of the token
///   norm sums     (2, warps) float
///   coefficients  (warps, 3, K) float: p_j, scale dlogit_j r_j, dlogit_j logit_j r_j^2 / R
struct ReadBackwardStagedLayout {
  int64_t tiles, term_sums, norm_sums, coefficients, total;  // byte offsets

  FLASH_ATTN_RES_HOST_DEVICE ReadBackwardStagedLayout(bool has_query, int stages, int rows,
                                                      int planes, int chunks, int warps,
                                                      int terms) {
    tiles = has_query ? static_cast<int64_t>(chunks) * 32 : 0;
    term_sums = tiles + static_cast<int64_t>(stages) * rows * planes * chunks * 16;
    norm_sums = term_sums + static_cast<int64_t>(2) * warps * terms * 4;
    coefficients = norm_sums + static_cast<int64_t>(2) * warps * 4;
    total = coefficients + static_cast<int64_t>(warps) * 3 * terms * 4;
  }
};

inline constexpr int kReadBackwardMaxThreads = 512;

/// Registers of a thread that the policy counts with.
inline constexpr int kReadBackwardRegisters = 128;

template <class T, int kChunks, bool kNorm, int kRows>
__global__ void __launch_bounds__(kReadBackwardMaxThreads, 1)
    read_backward_staged_kernel(const __grid_constant__ ReadBackwardParams<kRows> p) {
  const int threads = static_cast<int>(blockDim.x);
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;
  const int warps = threads / kWarp;
  const int chunks = p.dim / kChunk;
  const int K = p.num_terms;
  const bool has_query = p.query.present();

  // Rows of a tile: the terms, then the gradients that came in.
  const int dx_row = K;
  const int dmix_row = dx_row + (p.dx.present() ? 1 : 0);
  const int dpartial_row = dmix_row + (p.dmix.present() ? 1 : 0);
  const int rows = dpartial_row + (p.dpartial_out.present() ? 1 : 0);

  extern __shared__ float4 shared[];
  char* const base = reinterpret_cast<char*>(shared);
  const ReadBackwardStagedLayout layout(has_query, p.stages, rows, kPlanes<T>, chunks, warps, K);
  const SharedVector query = {shared, chunks};
  const TileRing<T> tile = {reinterpret_cast<uint4*>(base + layout.tiles), rows, chunks};
  float* const all_term_sums = reinterpret_cast<float*>(base + layout.term_sums);
  float* const all_norm_sums = reinterpret_cast<float*>(base + layout.norm_sums);
  float* const probs = reinterpret_cast<float*>(base + layout.coefficients) + warp * 3 * K;
  float* const query_weights = probs + K;
  float* const key_weights = query_weights + K;

  const auto fetch_row = [&](int64_t t, int stage, int index, const RowRef& row) {
    if (t < p.tokens) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          tile.fetch(stage, index, chunk, row);
        }
      }
    }
  };
  const auto fetch_gradients = [&](int64_t t, int stage) {
    if (p.dx.present()) {
      fetch_row(t, stage, dx_row, p.dx.row(t));
    }
    if (p.dmix.present()) {
      fetch_row(t, stage, dmix_row, p.dmix.row(t));
    }
    if (p.dpartial_out.present()) {
      fetch_row(t, stage, dpartial_row, p.dpartial_out.row(t));
    }
  };
  for (int stage = 0; stage < p.stages; ++stage) {
    const int64_t t = blockIdx.x + static_cast<int64_t>(stage) * gridDim.x;
    for (int j = 0; j < K; ++j) {
      fetch_row(t, stage, j, p.rows.row(j, t));
    }
    fetch_gradients(t, stage);
    commit_copies();
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

  const auto term_dtype = [&](int j) { return static_cast<DType>(p.rows.dtype[j]); };

  Chunk dquery[kChunks];
  Chunk dweight[kNorm ? kChunks : 1];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    dquery[c] = zero_chunk();
    dweight[kNorm ? c : 0] = zero_chunk();
  }

  // Statistics of a token, terms l and l + 32 in lane l; those of the next are loaded early.
  float next_logit[2], next_inv_rms[2], next_inv_rms_mix;
  const auto load_statistics = [&](int64_t t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + i * kWarp;
      const bool valid = i * kWarp < K && j < K && t < p.tokens;
      next_logit[i] = valid ? p.logits.at(t, j) : -INFINITY;
      next_inv_rms[i] = valid ? p.inv_rms.at(t, j) : 0.0f;
    }
    next_inv_rms_mix = p.mix_inv_rms.present() && t < p.tokens ? p.mix_inv_rms.at(0, t) : 1.0f;
  };
  load_statistics(blockIdx.x);

  int stage = 0;
  int parity = 0;
  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    float logit[2], inv_rms[2], prob[2];
    const float inv_rms_mix = next_inv_rms_mix;
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      logit[i] = next_logit[i];
      inv_rms[i] = next_inv_rms[i];
      largest = fmaxf(largest, logit[i]);
    }
    load_statistics(t + gridDim.x);
    largest = warp_max(largest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      prob[i] = i * kWarp < K && lane + i * kWarp < K ? expf(logit[i] - largest) : 0.0f;
      sum += prob[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * kWarp < K && lane + i * kWarp < K) {
        prob[i] /= sum;
        probs[lane + i * kWarp] = prob[i];
      }
    }
    __syncwarp();
    wait_copies(p.stages - 1);

    // dh. With the norm it holds the mixture first.
    Chunk dh[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      dh[c] = zero_chunk();
    }
    if (kNorm && p.dx.present()) {
      const auto norm_weight = [&](int chunk) {
        return p.norm_weight.present() ? load_chunk(p.norm_weight.row(0), chunk * kChunk, p.dim)
                                       : Chunk{{1, 1, 1, 1, 1, 1, 1, 1}};
      };
#pragma unroll 4
      for (int j = 0; j < K; ++j) {
        const float weight = probs[j];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int chunk = tid + c * threads;
          if (chunk < chunks) {
            add_scaled(dh[c], weight, tile.get(stage, j, chunk, term_dtype(j)));
          }
        }
      }
      float y_dot_h = 0.0f;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          if (p.round_mix) {
            dh[c] = round_to(p.mix_dtype, dh[c]);
          }
          const Chunk dx = tile.get(stage, dx_row, chunk, p.dx.dtype);
          const Chunk g = norm_weight(chunk);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            Chunk& sum = dweight[kNorm ? c : 0];
            sum.v[i] = fmaf(dx.v[i] * inv_rms_mix, dh[c].v[i], sum.v[i]);
            y_dot_h = fmaf(g.v[i] * dx.v[i], dh[c].v[i], y_dot_h);
          }
        }
      }
      y_dot_h = warp_sum(y_dot_h);
      float* const norm_sums = all_norm_sums + parity * warps;
      if (lane == 0) {
        norm_sums[warp] = y_dot_h;
      }
      block_barrier(warps);
      y_dot_h = sum_over_warps(norm_sums, warps, 1);
      const float along =
          inv_rms_mix * inv_rms_mix * inv_rms_mix / static_cast<float>(p.dim) * y_dot_h;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = tid + c * threads;
        if (chunk < chunks) {
          const Chunk dx = tile.get(stage, dx_row, chunk, p.dx.dtype);
          const Chunk g = norm_weight(chunk);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            dh[c].v[i] = inv_rms_mix * (g.v[i] * dx.v[i]) - along * dh[c].v[i];
          }
        }
      }
    } else if (p.dx.present()) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (tid + c * threads < chunks) {
          dh[c] = tile.get(stage, dx_row, tid + c * threads, p.dx.dtype);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = tid + c * threads;
      if (chunk < chunks) {
        if (p.dmix.present()) {
          add(dh[c], tile.get(stage, dmix_row, chunk, p.dmix.dtype));
        }
        if (p.dh.present()) {
          store_chunk_as<T>(p.dh.row(t), chunk * kChunk, p.dim, dh[c]);
        }
        if (p.dphase1_out.present()) {
          Chunk out = zero_chunk();
          add_scaled(out, probs[0], dh[c]);
          store_chunk_as<T>(p.dphase1_out.row(t), chunk * kChunk, p.dim, out);
        }
      }
    }

    // dp_j = <dh, z_j>
    float* const term_sums = all_term_sums + parity * warps * K;
    for (int j0 = 0; j0 < K; j0 += kReadTermBatch) {
      float sums[kReadTermBatch] = {};
#pragma unroll
      for (int i = 0; i < kReadTermBatch; ++i) {
        if (j0 + i < K) {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const int chunk = tid + c * threads;
            if (chunk < chunks) {
              sums[i] = dot_add(dh[c], tile.get(stage, j0 + i, chunk, term_dtype(j0 + i)), sums[i]);
            }
          }
        }
      }
      const float dp = warp_sum_scatter(sums);
      constexpr int kLanes = kWarp / kReadTermBatch;
      if (lane % kLanes == 0 && j0 + lane / kLanes < K) {
        term_sums[warp * K + j0 + lane / kLanes] = dp;
      }
    }
    block_barrier(warps);

    float dp[2], delta = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + i * kWarp;
      dp[i] = i * kWarp < K && j < K ? sum_over_warps(term_sums + j, warps, K) : 0.0f;
      delta = fmaf(prob[i], dp[i], delta);
    }
    delta = warp_sum(delta);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = lane + i * kWarp;
      if (i * kWarp < K && j < K) {
        // With one term p is 1 and the difference is zero by identity, not just by rounding.
        const float dlogit = K == 1 ? dp[i] * 0.0f : prob[i] * (dp[i] - delta);
        query_weights[j] = p.scale * dlogit * inv_rms[i];
        key_weights[j] = dlogit * logit[i] * inv_rms[i] * inv_rms[i] * p.inv_key_dim;
        if (warp == 0 && j < p.first_key) {
          if (p.gate.present()) {
            p.gate.at(0, t) = prob[i];
          }
          if (p.dphase1_lse.present()) {
            p.dphase1_lse.at(0, t) = dlogit;
          }
        }
      }
    }
    __syncwarp();

    // dz_j and du; row by row the ring is refilled.
    const int64_t next = t + static_cast<int64_t>(p.stages) * gridDim.x;
    for (int j = 0; j < K; ++j) {
      if (j >= p.first_key) {
        const bool is_partial = p.has_partial && j == K - 1;
        const float weight = probs[j];
        const float query_weight = query_weights[j];
        const float key_weight = key_weights[j];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int chunk = tid + c * threads;
          const int col = chunk * kChunk;
          if (chunk < chunks) {
            Chunk dz = zero_chunk();
            if (is_partial) {
              if (p.dpartial_out.present()) {
                dz = tile.get(stage, dpartial_row, chunk, p.dpartial_out.dtype);
              }
            } else if (p.has_dsources && p.accumulate) {
              dz = load_chunk_as<T>(p.dsources.row(j - p.first_key, t), col, p.dim);
            }
            add_scaled(dz, weight, dh[c]);
            if (has_query && col + kChunk > p.key_begin) {
              Chunk key = tile.get(stage, j, chunk, term_dtype(j));
              keep_from(key, col, p.key_begin);
              add_scaled(dz, query_weight, query.get(chunk));
              add_scaled(dz, -key_weight, key);
              add_scaled(dquery[c], query_weight, key);
            }
            if (is_partial) {
              if (p.dpartial.present()) {
                store_chunk_as<T>(p.dpartial.row(t), col, p.dim, dz);
              }
            } else if (p.has_dsources) {
              store_chunk_as<T>(p.dsources.row(j - p.first_key, t), col, p.dim, dz);
            }
          }
        }
      }
      fetch_row(next, stage, j, p.rows.row(j, next));
    }
    fetch_gradients(next, stage);
    commit_copies();
    stage = stage + 1 == p.stages ? 0 : stage + 1;
    parity ^= 1;
  }
  wait_copies<0>();

#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = tid + c * threads;
    if (chunk < chunks) {
      const int64_t first = static_cast<int64_t>(blockIdx.x) * p.dim + chunk * kChunk;
      float4* const to_query = reinterpret_cast<float4*>(p.dquery_partials + first);
      float4* const to_weight = reinterpret_cast<float4*>(p.dweight_partials + first);
      if (p.dquery_partials != nullptr) {
        to_query[0] = {dquery[c].v[0], dquery[c].v[1], dquery[c].v[2], dquery[c].v[3]};
        to_query[1] = {dquery[c].v[4], dquery[c].v[5], dquery[c].v[6], dquery[c].v[7]};
      }
      if (kNorm && p.dweight_partials != nullptr) {
        const Chunk& sum = dweight[kNorm ? c : 0];
        to_weight[0] = {sum.v[0], sum.v[1], sum.v[2], sum.v[3]};
        to_weight[1] = {sum.v[4], sum.v[5], sum.v[6], sum.v[7]};
      }
    }
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_BACKWARD_STAGED_CUH_
