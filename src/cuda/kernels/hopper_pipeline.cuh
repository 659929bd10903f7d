// What the forward and the backward of phase 1 on Hopper have in common: who works on which token,
// the barriers, and the warps that load, pace, and add up partial sums.
//
// A cluster of CTAs takes a step of `batch` tokens at a time; each CTA has a slice of the columns.
// Steps are dealt to the clusters in turn, so that all of them read one narrow band of memory:
// giving each a range of its own costs 1 to 5 % of the speed, for DRAM pages are then reopened.
//
//   load warp     one bulk copy a row into the ring of inputs, ahead as far as the ring is deep;
//                 and the scales of sources that have them
//   compute       P1(i + 1): products of step i + 1 that the softmax needs, summed over the warp's
//    warps        columns; then P2(i): the results of step i, with the weights of its softmax.
//                 This order hides the softmax of a step behind the P2 of the one before.
//   softmax warp  adds up the warps' sums, exchanges them with the cluster, makes the weights
//   store warp    one bulk copy a row out of the ring of results (and into it when accumulating)
//   pace warp     brings the next step into L2; keeps clusters from running ahead of each other
//
// Determinism: every sum has a fixed order that depends on the shapes and the number of clusters
// only. Pacing changes when a step runs, never what it computes.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_PIPELINE_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_PIPELINE_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/device/hopper_barrier.cuh"
#include "cuda/device/hopper_copy.cuh"
#include "cuda/device/hopper_mma.cuh"
#include "cuda/device/hopper_narrow.cuh"
#include "cuda/hopper_plan.h"

namespace flash_attn_res::cuda::hopper {

inline constexpr int kWarpLanes = 32;

/// This thread's warp, as a value that the compiler knows to be the same in all its lanes: it then
/// stays in a uniform register, and so does what follows from it.
__device__ __forceinline__ int warp_of_cta() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
}

/// This thread's lane. Read anew at each use, so that no register holds it from one role to
/// another.
__device__ __forceinline__ int lane_of_warp() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/// The first bytes of shared memory.
struct SharedHead {
  Barrier input_full[kRingMax];    // a step's inputs have been loaded
  Barrier input_free[kRingMax];    // all compute warps are done with them
  Barrier result_ready[kRingMax];  // a slot may be written (and holds what is accumulated to)
  Barrier result_done[kRingMax];   // all compute warps have written it
  Barrier partials_full[2];        // all compute warps have stored their sums
  Barrier totals_full[2];          // the sums of all CTAs of the cluster are here
  Barrier weights_full[2];         // the softmax warp has stored the weights
  int loading;                     // the step that the load warp is at
  int issued;                      // how many steps all clusters have begun to load, as last read
};
static_assert(sizeof(SharedHead) <= kHeadBytes);

/// A table of rows to copy: [T, D] tensors.
template <int kCapacity>
struct RowTable {
  const char* data[kCapacity];
  int64_t stride[kCapacity];  // bytes

  void set(int64_t row, const ConstMatrix& matrix) {
    data[row] = static_cast<const char*>(matrix.data);
    stride[row] = matrix.stride * size_of(matrix.dtype);
  }
};

/// The two rows that a lane copies: `lane` and `lane + 32` of a table. The first `narrow` have
/// elements of one byte, the others of two.
struct LaneRows {
  const char* data[2];
  int64_t stride[2];

  template <int kCapacity>
  __device__ __forceinline__ LaneRows(const RowTable<kCapacity>& table, int rows, int column,
                                      int lane, int narrow = 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(lane + i * kWarpLanes, rows - 1);
      data[i] = table.data[row] + (row < narrow ? column : column * 2);
      stride[i] = table.stride[row];
    }
  }
  __device__ __forceinline__ const char* at(int i, int64_t t) const {
    return data[i] + t * stride[i];
  }
};

/// Which tokens are this CTA's, and which columns.
struct Share {
  int64_t tokens;  // T
  int clusters, cluster, rank, batch;
  int steps;    // steps of this cluster
  int column;   // first column of this CTA
  int columns;  // its number of columns

  __device__ __forceinline__ Share(const Plan& plan, int64_t num_tokens, int dim)
      : tokens(num_tokens), clusters(plan.clusters), batch(plan.batch) {
    rank = plan.cluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    cluster = static_cast<int>(blockIdx.x) / plan.cluster;
    steps = plan.rounds + (cluster < plan.extra ? 1 : 0);
    column = rank * plan.columns;
    columns = min(plan.columns, dim - column);
  }

  /// Token b of a step. The last step may reach beyond T: `clamped` then repeats the last token,
  /// whose weights are zero there and whose results are not stored.
  __device__ __forceinline__ int64_t token(int step, int b) const {
    return (static_cast<int64_t>(step) * clusters + cluster) * batch + b;
  }
  __device__ __forceinline__ int64_t clamped(int64_t token) const {
    return token < tokens ? token : tokens - 1;
  }
};

__device__ __forceinline__ void synchronize(bool whole_cluster) {
  if (whole_cluster) {
    __syncwarp();  // the barrier of a cluster wants whole warps
    cute::cluster_sync();
  } else {
    __syncthreads();
  }
}

__device__ __forceinline__ int read_posted(const int& place) {
  return *static_cast<const volatile int*>(&place);
}
__device__ __forceinline__ void post(int& place, int value) {
  *static_cast<volatile int*>(&place) = value;
}

// ---------------------------------------------------------------------------------- setting up

/// Initialises barriers, and zeroes weights, partial sums, scales and inputs: weights of rows that
/// do not exist, sums of warps that do not, and columns of padding stay zero ever after. All
/// threads call it; it ends with a barrier.
__device__ __forceinline__ void set_up(SharedHead& head, const SharedMap& map, const Plan& plan) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kRingMax; ++i) {
      head.input_full[i].init(map.scale_groups > 0 ? 2 : 1);  // rows; scales
      head.input_free[i].init(plan.warps);
      head.result_ready[i].init(1);
      head.result_done[i].init(plan.warps);
    }
    for (int i = 0; i < 2; ++i) {
      head.partials_full[i].init(plan.warps);
      head.totals_full[i].init(1);
      head.weights_full[i].init(1);
    }
    head.loading = 0;
    head.issued = 0;
    publish_barriers();
  }
  char* const base = reinterpret_cast<char*>(&head);
  for (int i = map.weights + thread * 16; i < map.totals; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(base + i) = {0, 0, 0, 0};
  }
  for (int i = map.scales + thread * 16; i < map.results; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(base + i) = {0, 0, 0, 0};
  }
  fence_before_bulk_copies();
  synchronize(plan.cluster > 1);
}

// ---------------------------------------------------------------------------------- load, pace

/// Waits until the grid has caught up with this step; a hint only, given up after some 40 us.
__device__ __forceinline__ void wait_for_window(const SharedHead& head, int64_t step, int window) {
  for (int tries = 0; tries < 1000 && step > read_posted(head.issued) + window; ++tries) {
    __nanosleep(40);
  }
}

/// The load warp: the rows of every step into the ring of inputs. The first `num_sources` have
/// elements of type Source, and scales if there are any.
template <class Source, int kCapacity>
__device__ __forceinline__ void load_steps(SharedHead& head, const SharedMap& map, const Plan& plan,
                                           const Share& share, const RowTable<kCapacity>& table,
                                           const ScaleTable& scale_table, int num_sources, int rows,
                                           int* issued) {
  constexpr bool kNarrow = kIsNarrow<Source>;
  const int lane = lane_of_warp();
  const int narrow = kNarrow ? num_sources : 0;
  const LaneRows lane_rows(table, rows, share.column, lane, narrow);
  const int bytes = share.columns * 2;
  const CachePolicy policy(plan.load_hint);
  char* const inputs = reinterpret_cast<char*>(&head) + map.inputs;
  const ScaleCopier scales(num_sources, scale_table.shift, share.column, share.columns);
  RingCursor cursor;
  for (int step = 0; step < share.steps; ++step) {
    if (step >= plan.stages) {
      head.input_free[cursor.slot].wait(cursor.parity ^ 1);
    }
    if (lane == 0) {
      if (plan.window > 0) {
        wait_for_window(head, static_cast<int64_t>(step) * share.clusters + share.cluster,
                        share.clusters * plan.window / 100);
        if (share.rank == 0) {
          asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(issued) : "memory");
        }
      }
      post(head.loading, step);
      head.input_full[cursor.slot].arrive_and_expect(plan.batch * (2 * rows - narrow) *
                                                     share.columns);
    }
    __syncwarp();
    char* token = inputs + cursor.slot * map.stage_bytes;  // (batch, token_bytes)
    for (int b = 0; b < plan.batch; ++b, token += map.token_bytes) {
      const int64_t t = share.clamped(share.token(step, b));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane + i * kWarpLanes;
        if (row < rows) {
          const bool is_narrow = kNarrow && row < num_sources;
          load_row(token + map.input_row(row, num_sources), lane_rows.at(i, t),
                   is_narrow ? share.columns : bytes, head.input_full[cursor.slot], policy);
        }
      }
    }
    if (!std::is_same_v<Source, Bf16> && map.scale_groups > 0) {
      scales.copy(reinterpret_cast<Bf16*>(reinterpret_cast<char*>(&head) + map.scales) +
                      cursor.slot * plan.batch * map.token_scales(),
                  map, scale_table, plan.batch, lane,
                  [&](int b) { return share.clamped(share.token(step, b)); });
      __syncwarp();
      if (lane == 0) {
        head.input_full[cursor.slot].arrive();
      }
    }
    __syncwarp();
    cursor.advance(plan.stages);
  }
}

/// The pace warp: prefetches the step after the one that is being loaded, and reads how far the
/// grid has come.
template <class Source, int kCapacity>
__device__ __forceinline__ void pace_steps(SharedHead& head, const Plan& plan, const Share& share,
                                           const RowTable<kCapacity>& table,
                                           const ScaleTable& scale_table, int num_sources, int rows,
                                           const int* issued) {
  constexpr bool kNarrow = kIsNarrow<Source>;
  const int lane = lane_of_warp();
  const LaneRows lane_rows(table, rows, share.column, lane, kNarrow ? num_sources : 0);
  const int bytes = share.columns * 2;
  const CachePolicy policy(plan.prefetch_hint);
  int next = 1;  // the step to prefetch
  while (true) {
    int loading = 0;
    if (lane == 0) {
      loading = read_posted(head.loading);
      if (plan.window > 0) {
        int now;
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(issued) : "memory");
        post(head.issued, now);
      }
    }
    loading = __shfl_sync(0xffffffffu, loading, 0);
    if (loading >= share.steps - 1) {
      return;
    }
    if (!plan.prefetch || next > loading + 1) {
      __nanosleep(64);
      continue;
    }
    if (next == loading + 1) {
      for (int b = 0; b < plan.batch; ++b) {
        const int64_t t = share.clamped(share.token(next, b));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane + i * kWarpLanes;
          if (row < rows) {
            const bool is_narrow = kNarrow && row < num_sources;
            prefetch_row(lane_rows.at(i, t), is_narrow ? share.columns : bytes, policy);
          }
        }
        if (!std::is_same_v<Source, Bf16> && scale_table.stride > 0 && lane < num_sources) {
          prefetch_line(scale_table.data[lane] + t * scale_table.stride +
                        (share.column >> scale_table.shift));
        }
      }
    }
    next = max(next + 1, loading + 1);
  }
}

// ------------------------------------------------------------------------------------- the sums

// The softmax warp is on the critical path of every step: what it does must take less time than the
// step's bytes, some 2 us. So it has few instructions a lane, loads that do not wait for each
// other, and no branch that differs between lanes.

__device__ __forceinline__ void add_to(float4& sum, const float4& value) {
  sum.x += value.x;
  sum.y += value.y;
  sum.z += value.z;
  sum.w += value.w;
}

/// Adds up the partial sums of a step: over the warps of this CTA, then over the CTAs of the
/// cluster, in that order.
struct Sums {
  float* partials;  // [2, slices, rows, cols]
  float* totals;    // [2, cluster, rows, cols]
  int rows;         // of all tokens of a step
  int cols;         // N rounded up to a multiple of 4
  int warps, slices, cluster, rank;

  __device__ __forceinline__ Sums(SharedHead& head, const SharedMap& map, const Plan& plan,
                                  const Extents& extents, int cta_rank)
      : partials(reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + map.partials)),
        totals(reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + map.totals)),
        rows(plan.batch * extents.partial_rows),
        cols(extents.partial_cols),
        warps(plan.warps),
        slices(plan.slices()),
        cluster(plan.cluster),
        rank(cta_rank) {}

  __device__ __forceinline__ float* partial_row(int step, int warp, int row) const {
    return partials + ((pair_slot(step) * slices + warp) * rows + row) * cols;
  }

  /// Adds up the warps' sums of `step` and sends them to the other CTAs of the cluster. Called by
  /// the softmax warp when the partial sums are complete; their memory is free for it afterwards.
  __device__ __forceinline__ void send(SharedHead& head, int step, int lane) const {
    const int buffer = pair_slot(step);
    const int quads = rows * cols / 4;
    const float4* const from = reinterpret_cast<const float4*>(partials) + buffer * slices * quads;
    float4* const to = reinterpret_cast<float4*>(totals) + (buffer * cluster + rank) * quads;
    if (cluster > 1 && lane == 0) {
      head.totals_full[buffer].arrive_and_expect((cluster - 1) * quads * 16);
    }
    for (int i = lane; i < quads; i += kWarpLanes) {
      float4 sum = from[i];
#pragma unroll
      for (int w = 1; w < kComputeWarps; ++w) {
        add_to(sum, from[min(w, warps) * quads + i]);  // slice `warps` is zero
      }
      to[i] = sum;
    }
    if (cluster > 1) {
      fence_before_bulk_copies();
      __syncwarp();
      // What these copies read is written again two steps on, after the peers have answered once
      // more.
      if (lane < cluster && lane != rank) {
        copy_to_peer(to, quads * 16, head.totals_full[buffer], lane);
      }
    }
    __syncwarp();
  }

  /// Waits until the sums of all CTAs are here.
  __device__ __forceinline__ void receive(SharedHead& head, int step) const {
    if (cluster > 1) {
      head.totals_full[pair_slot(step)].wait_cluster(pair_parity(step));
    }
  }

  /// Memory that the softmax warp may use between `send` and its weights.
  __device__ __forceinline__ float* scratch(int step) const {
    return partials + pair_slot(step) * slices * rows * cols;
  }

  /// `kCount` consecutive columns of a row of sums over all columns of D, after `receive`. Columns
  /// beyond the last hold no sums: what is read there must not be used.
  template <int kCount>
  __device__ __forceinline__ void read(int step, int row, int col, float (&values)[kCount]) const {
    const float* const first =
        totals + (pair_slot(step) * cluster * rows + row) * cols + (col < cols ? col : 0);
    switch (cluster) {
      case 1:
        return read_peers<1>(first, values);
      case 2:
        return read_peers<2>(first, values);
      case 4:
        return read_peers<4>(first, values);
      default:
        return read_peers<8>(first, values);
    }
  }

 private:
  template <int kPeers, int kCount>
  __device__ __forceinline__ void read_peers(const float* first, float (&values)[kCount]) const {
#pragma unroll
    for (int peer = 0; peer < kPeers; ++peer) {
      const float* const from = first + peer * rows * cols;
#pragma unroll
      for (int i = 0; i < kCount; i += kCount < 4 ? 2 : 4) {
        if constexpr (kCount < 4) {
          const float2 pair = *reinterpret_cast<const float2*>(from + i);
          add(values[i], pair.x, peer);
          add(values[i + 1], pair.y, peer);
        } else {
          const float4 quad = *reinterpret_cast<const float4*>(from + i);
          add(values[i], quad.x, peer);
          add(values[i + 1], quad.y, peer);
          add(values[i + 2], quad.z, peer);
          add(values[i + 3], quad.w, peer);
        }
      }
    }
  }

  static __device__ __forceinline__ void add(float& sum, float value, int peer) {
    sum = peer == 0 ? value : sum + value;
  }
};

/// How the lanes of the softmax warp share a token: `kParts` neighbouring lanes have one query, and
/// each of them `kSources` consecutive sources.
template <int kQueryGroups, int kSourceGroups>
struct SoftmaxLane {
  static constexpr int kParts = kQueryGroups == 1 ? 4 : kQueryGroups == 2 ? 2 : 1;
  static constexpr int kSources = 8 * kSourceGroups / kParts;

  int query;         // s
  int first_source;  // n of the first source

  explicit __device__ __forceinline__ SoftmaxLane(int lane)
      : query(lane / kParts), first_source(lane % kParts * kSources) {}

  /// Over the lanes of a query, in each of them.
  static __device__ __forceinline__ float sum(float value) {
#pragma unroll
    for (int offset = 1; offset < kParts; offset *= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  }
  static __device__ __forceinline__ float max(float value) {
#pragma unroll
    for (int offset = 1; offset < kParts; offset *= 2) {
      value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
  }
};

/// Stores a lane's values side by side; `place` is aligned to as many bytes as they have, or 16.
template <int kCount>
__device__ __forceinline__ void store_vector(float* place, const float (&values)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      *reinterpret_cast<float4*>(place + i) = {values[i], values[i + 1], values[i + 2],
                                               values[i + 3]};
    }
  } else {
    static_assert(kCount == 2);
    *reinterpret_cast<float2*>(place) = {values[0], values[1]};
  }
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_PIPELINE_CUH_
