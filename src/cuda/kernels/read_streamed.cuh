// `read` and its backward for everything that the other kernels do not take: more rows than
// registers or shared memory hold (long lists of sources, wide streams), widths that are no
// multiple of eight, addresses that are not aligned to 16 bytes. Formulas and results as in
// read_rows and read_backward_staged.
//
// bytes  rows are read from device memory once where L2 still holds them at the second reading
// sums   float32: a thread's chunks in order, lanes, warps; independent of the other tokens, but
//        another order than read_rows has
//
// One token a block at a time, a thread has chunks i, i + threads, ... of each row, and the rows
// are read anew in each pass:
//   forward   partial sum; squares and dots; mixture (with a norm: its square, then again for x)
//   backward  with a norm: <y, h>; then dh, written to scratch memory, and dp; then the gradients
// du and dg of a block's tokens are added up in its own row of the workspace.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_STREAMED_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_STREAMED_CUH_

#include "cuda/device/chunk.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/kernels/read_params.h"

namespace flash_attn_res::cuda {

inline constexpr int kStreamedThreads = 256;
inline constexpr int kStreamedWarps = kStreamedThreads / kWarp;
inline constexpr int kStreamedBatch = 4;  // terms loaded and summed together

/// Shared memory of both kernels: sums of each warp (warps, 2 K), then (3, K) of the token's terms.
constexpr int64_t streamed_shared_bytes(int64_t terms) {
  return (kStreamedWarps * 2 + 3) * terms * static_cast<int64_t>(sizeof(float));
}

/// Sum over the block, in every thread, in a fixed order.
__device__ __forceinline__ float streamed_block_sum(float value) {
  __shared__ float sums[kStreamedWarps];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kStreamedWarps; ++w) {
    total += sums[w];
  }
  return total;
}

/// Columns of the query that meet columns [col, col + 8) of a row.
__device__ __forceinline__ Chunk streamed_query(const FloatView& query, int col, int dim,
                                                int key_begin) {
  Chunk u;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const bool inside = col + i >= key_begin && col + i < dim;
    u.v[i] = inside ? query.at(0, col + i - key_begin) : 0.0f;
  }
  return u;
}

/// exp(logits - largest) / sum, in place, by the whole block. A NaN anywhere gives NaN.
__device__ __forceinline__ void streamed_softmax(float* logits, int terms) {
  float largest = -INFINITY;
  for (int j = 0; j < terms; ++j) {
    largest = fmaxf(largest, logits[j]);
  }
  float sum = 0.0f;
  for (int j = static_cast<int>(threadIdx.x); j < terms; j += kStreamedThreads) {
    sum += expf(logits[j] - largest);
  }
  sum = streamed_block_sum(sum);
  for (int j = static_cast<int>(threadIdx.x); j < terms; j += kStreamedThreads) {
    logits[j] = expf(logits[j] - largest) / sum;
  }
  __syncthreads();
}

/// sum_j p_j z_j at one chunk.
template <class T, class Params>
__device__ __forceinline__ Chunk streamed_mixture(const Params& p, const float* probs, int64_t t,
                                                  int col) {
  Chunk h = zero_chunk();
  for (int j0 = 0; j0 < p.num_terms; j0 += kStreamedBatch) {
    Packed<T> packed[kStreamedBatch];
#pragma unroll
    for (int i = 0; i < kStreamedBatch; ++i) {
      packed[i] = load_packed<T>(p.rows.row(min(j0 + i, p.num_terms - 1), t), col, p.dim);
    }
#pragma unroll
    for (int i = 0; i < kStreamedBatch; ++i) {
      if (j0 + i < p.num_terms) {
        add_scaled(h, probs[j0 + i], unpack(packed[i]));
      }
    }
  }
  return h;
}

/// The norm's weight at one chunk; ones where there is none.
__device__ __forceinline__ Chunk streamed_norm_weight(const ValueView& weight, int col, int dim) {
  if (weight.present()) {
    return load_chunk(weight.row(0), col, dim);
  }
  return {{1, 1, 1, 1, 1, 1, 1, 1}};
}

// The launcher puts partial_out in the place of the last term before the first pass over the terms,
// so that what is read back is what was stored: `first_partial` is that term as it came in.
template <class T, int kRows>
__global__ void __launch_bounds__(kStreamedThreads, 2)
    read_streamed_kernel(const __grid_constant__ ReadParams<kRows> p,
                         const __grid_constant__ ValueView first_partial) {
  extern __shared__ float4 shared[];
  const int K = p.num_terms;
  float* const warp_sums = reinterpret_cast<float*>(shared);  // (warps, 2 K)
  float* const probs = warp_sums + kStreamedWarps * 2 * K;    // (K)
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;
  const bool has_query = p.query.present();

  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    if (p.partial_out.present()) {
      for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
        Chunk sum = load_chunk(first_partial.row(t), col, p.dim);
        for (int j = K; j < p.num_rows; ++j) {
          add(sum, load_chunk(p.rows.row(j, t), col, p.dim));
        }
        store_chunk(p.partial_out.row(t), col, p.dim, sum);
      }
    }

    for (int j0 = p.first_key; j0 < K; j0 += kStreamedBatch) {
      float sums[2 * kStreamedBatch] = {};  // (terms, square and dot)
      for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
        if (col + kChunk <= p.key_begin) {
          continue;
        }
        Packed<T> packed[kStreamedBatch];
#pragma unroll
        for (int i = 0; i < kStreamedBatch; ++i) {
          packed[i] = load_packed<T>(p.rows.row(min(j0 + i, K - 1), t), col, p.dim);
        }
        const Chunk u = has_query ? streamed_query(p.query, col, p.dim, p.key_begin) : zero_chunk();
#pragma unroll
        for (int i = 0; i < kStreamedBatch; ++i) {
          Chunk key = unpack(packed[i]);
          keep_from(key, col, p.key_begin);
          sums[2 * i] = dot_add(key, key, sums[2 * i]);
          sums[2 * i + 1] = dot_add(u, key, sums[2 * i + 1]);
        }
      }
      const float sum = warp_sum_scatter(sums);
      constexpr int kLanes = kWarp / (2 * kStreamedBatch);
      const int index = 2 * j0 + lane / kLanes;
      if (lane % kLanes == 0 && index < 2 * K) {
        warp_sums[warp * 2 * K + index] = sum;
      }
    }
    __syncthreads();
    for (int j = tid; j < K; j += kStreamedThreads) {
      float logit = 0.0f;
      float inv_rms = 0.0f;
      if (j < p.first_key) {
        logit = p.phase1_lse.at(0, t);
      } else {
        float square = 0.0f;
        float dot = 0.0f;
        for (int w = 0; w < kStreamedWarps; ++w) {
          square += warp_sums[w * 2 * K + 2 * j];
          dot += warp_sums[w * 2 * K + 2 * j + 1];
        }
        inv_rms = rsqrtf(square * p.inv_key_dim + p.eps);
        logit = has_query ? p.scale * inv_rms * dot : 0.0f;
      }
      probs[j] = logit;
      if (p.logits.present()) {
        p.logits.at(t, j) = logit;
      }
      if (p.inv_rms.present()) {
        p.inv_rms.at(t, j) = inv_rms;
      }
    }
    __syncthreads();
    streamed_softmax(probs, K);
    if (p.probs.present()) {
      for (int j = tid; j < K; j += kStreamedThreads) {
        p.probs.at(t, j) = probs[j];
      }
    }

    float square = 0.0f;
    for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
      Chunk h = streamed_mixture<T>(p, probs, t, col);
      if (p.mix.present()) {
        store_chunk(p.mix.row(t), col, p.dim, h);
      }
      if (!p.norm) {
        store_chunk(p.x.row(t), col, p.dim, h);
      } else {
        h = p.round_mix ? round_to(p.x.dtype, h) : h;
        square = dot_add(h, h, square);
      }
    }
    if (p.norm) {
      const float inv_rms_mix =
          rsqrtf(streamed_block_sum(square) / static_cast<float>(p.dim) + p.norm_eps);
      if (tid == 0 && p.mix_inv_rms.present()) {
        p.mix_inv_rms.at(0, t) = inv_rms_mix;
      }
      for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
        Chunk h = streamed_mixture<T>(p, probs, t, col);
        h = p.round_mix ? round_to(p.x.dtype, h) : h;
        const Chunk g = streamed_norm_weight(p.norm_weight, col, p.dim);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          h.v[i] = h.v[i] * inv_rms_mix * g.v[i];
        }
        store_chunk(p.x.row(t), col, p.dim, h);
      }
    }
    __syncthreads();  // probs and warp_sums are free for the next token
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kStreamedThreads, 2)
    read_backward_streamed_kernel(const __grid_constant__ ReadBackwardParams<kRows> p) {
  extern __shared__ float4 shared[];
  const int K = p.num_terms;
  float* const warp_sums = reinterpret_cast<float*>(shared);  // (warps, 2 K), half of it used
  float* const probs = warp_sums + kStreamedWarps * 2 * K;    // (K)
  float* const query_weights = probs + K;                     // (K)
  float* const key_weights = query_weights + K;               // (K)
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid % kWarp;
  const int warp = tid / kWarp;
  const bool has_query = p.query.present();

  // This block's rows of [blocks, padded D] float32; a thread touches its own chunks alone.
  const int64_t padded_dim = (static_cast<int64_t>(p.dim) + kChunk - 1) / kChunk * kChunk;
  const auto own_row = [&](float* data) {
    return RowRef{reinterpret_cast<char*>(data + blockIdx.x * padded_dim), DType::kFloat32, true};
  };
  const int padded = static_cast<int>(padded_dim);
  const RowRef dh_row = own_row(p.dh_scratch);
  const RowRef dquery_row = own_row(p.dquery_partials);
  const RowRef dweight_row = own_row(p.dweight_partials);
  for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
    if (p.dquery_partials != nullptr) {
      store_chunk(dquery_row, col, padded, zero_chunk());
    }
    if (p.dweight_partials != nullptr) {
      store_chunk(dweight_row, col, padded, zero_chunk());
    }
  }

  for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    for (int j = tid; j < K; j += kStreamedThreads) {
      probs[j] = p.logits.at(t, j);
    }
    __syncthreads();
    streamed_softmax(probs, K);

    const bool normed = p.norm && p.dx.present();
    const float inv_rms_mix = normed ? p.mix_inv_rms.at(0, t) : 1.0f;
    float along = 0.0f;
    if (normed) {
      // The mixture waits in the scratch row for the next pass.
      float y_dot_h = 0.0f;
      for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
        Chunk h = streamed_mixture<T>(p, probs, t, col);
        h = p.round_mix ? round_to(p.mix_dtype, h) : h;
        Chunk y = load_chunk(p.dx.row(t), col, p.dim);
        if (p.dweight_partials != nullptr) {
          Chunk dweight = load_chunk(dweight_row, col, padded);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            dweight.v[i] = fmaf(y.v[i] * inv_rms_mix, h.v[i], dweight.v[i]);
          }
          store_chunk(dweight_row, col, padded, dweight);
        }
        const Chunk g = streamed_norm_weight(p.norm_weight, col, p.dim);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          y.v[i] *= g.v[i];
        }
        y_dot_h = dot_add(y, h, y_dot_h);
        store_chunk(dh_row, col, padded, h);
      }
      along = inv_rms_mix * inv_rms_mix * inv_rms_mix / static_cast<float>(p.dim) *
              streamed_block_sum(y_dot_h);
    }
    for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
      Chunk dh = zero_chunk();
      if (p.dx.present()) {
        const Chunk dx = load_chunk(p.dx.row(t), col, p.dim);
        if (normed) {
          const Chunk h = load_chunk(dh_row, col, padded);
          const Chunk g = streamed_norm_weight(p.norm_weight, col, p.dim);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            dh.v[i] = inv_rms_mix * (dx.v[i] * g.v[i]) - along * h.v[i];
          }
        } else {
          dh = dx;
        }
      }
      if (p.dmix.present()) {
        add(dh, load_chunk(p.dmix.row(t), col, p.dim));
      }
      store_chunk(dh_row, col, padded, dh);
    }

    for (int j0 = 0; j0 < K; j0 += kStreamedBatch) {
      float sums[kStreamedBatch] = {};
      for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
        Packed<T> packed[kStreamedBatch];
#pragma unroll
        for (int i = 0; i < kStreamedBatch; ++i) {
          packed[i] = load_packed<T>(p.rows.row(min(j0 + i, K - 1), t), col, p.dim);
        }
        const Chunk dh = load_chunk(dh_row, col, padded);
#pragma unroll
        for (int i = 0; i < kStreamedBatch; ++i) {
          sums[i] = dot_add(dh, unpack(packed[i]), sums[i]);
        }
      }
      const float dp = warp_sum_scatter(sums);
      constexpr int kLanes = kWarp / kStreamedBatch;
      if (lane % kLanes == 0 && j0 + lane / kLanes < K) {
        warp_sums[warp * K + j0 + lane / kLanes] = dp;
      }
    }
    __syncthreads();
    float delta = 0.0f;
    for (int j = tid; j < K; j += kStreamedThreads) {
      float dp = 0.0f;
      for (int w = 0; w < kStreamedWarps; ++w) {
        dp += warp_sums[w * K + j];
      }
      query_weights[j] = dp;
      delta = fmaf(probs[j], dp, delta);
    }
    delta = streamed_block_sum(delta);
    for (int j = tid; j < K; j += kStreamedThreads) {
      const float dp = query_weights[j];
      // With one term p is 1 and the difference is zero by identity, not just by rounding.
      const float dlogit = K == 1 ? dp * 0.0f : probs[j] * (dp - delta);
      const float inv_rms = p.inv_rms.at(t, j);
      query_weights[j] = p.scale * dlogit * inv_rms;
      key_weights[j] = dlogit * p.logits.at(t, j) * inv_rms * inv_rms * p.inv_key_dim;
      if (j < p.first_key) {
        if (p.gate.present()) {
          p.gate.at(0, t) = probs[j];
        }
        if (p.dphase1_lse.present()) {
          p.dphase1_lse.at(0, t) = dlogit;
        }
      }
    }
    __syncthreads();

    for (int col = tid * kChunk; col < p.dim; col += kStreamedThreads * kChunk) {
      const Chunk dh = load_chunk(dh_row, col, padded);
      if (p.dh.present()) {  // not sooner: it may take the place of phase 1's result
        store_chunk(p.dh.row(t), col, p.dim, dh);
      }
      if (p.dphase1_out.present()) {
        Chunk out = zero_chunk();
        add_scaled(out, probs[0], dh);
        store_chunk(p.dphase1_out.row(t), col, p.dim, out);
      }
      const bool in_key = has_query && col + kChunk > p.key_begin;
      const Chunk u = in_key ? streamed_query(p.query, col, p.dim, p.key_begin) : zero_chunk();
      Chunk dquery = in_key && p.dquery_partials != nullptr ? load_chunk(dquery_row, col, padded)
                                                            : zero_chunk();
      for (int j = p.first_key; j < K; ++j) {
        const bool is_partial = p.has_partial && j == K - 1;
        const ValueView& before = p.dpartial_out;
        Chunk dz = zero_chunk();
        if (is_partial && before.present()) {
          dz = load_chunk(before.row(t), col, p.dim);
        } else if (!is_partial && p.has_dsources && p.accumulate) {
          dz = load_chunk(p.dsources.row(j - p.first_key, t), col, p.dim);
        }
        add_scaled(dz, probs[j], dh);
        if (in_key) {
          Chunk key = unpack(load_packed<T>(p.rows.row(j, t), col, p.dim));
          keep_from(key, col, p.key_begin);
          add_scaled(dz, query_weights[j], u);
          add_scaled(dz, -key_weights[j], key);
          add_scaled(dquery, query_weights[j], key);
        }
        if (is_partial && p.dpartial.present()) {
          store_chunk(p.dpartial.row(t), col, p.dim, dz);
        } else if (!is_partial && p.has_dsources) {
          store_chunk(p.dsources.row(j - p.first_key, t), col, p.dim, dz);
        }
      }
      if (in_key && p.dquery_partials != nullptr) {
        store_chunk(dquery_row, col, padded, dquery);
      }
    }
    __syncthreads();  // probs and the weights are free for the next token
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_STREAMED_CUH_
