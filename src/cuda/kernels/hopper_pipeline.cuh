// What the forward and the backward of phase 1 on Hopper have in common: who works on which token,
// the barriers, and the warps that load, pace, and add up partial sums.
//
// A cluster of CTAs takes a step of `batch` tokens at a time; each CTA has a slice of the columns.
// Steps are dealt to the clusters in turn, so that all of them read one narrow band of memory:
// giving each a range of its own costs 1 to 5 % of the speed, for DRAM pages are then reopened.
//
//   load warp     one bulk copy a row into the ring of inputs, ahead as far as the ring is deep.
//                 Brings the next step into L2 where that pays; keeps clusters from running ahead
//                 of each other
//   compute       P1(i + lead): products of that step that the softmax needs, summed over the
//    warps        warp's columns; then P2(i): the results of step i, with the weights of its
//                 softmax. This order hides the softmax of a step behind other steps' products:
//                 with a lead of two it has two steps' time
//   softmax       add up the warps' sums, exchange them with the cluster, make the weights. There
//    warps        are one or two, which have steps in turn
//   scale warp    loads the scales of sources that have them, in the place of a softmax warp
//   store warp    one bulk copy a row out of the ring of results (and into it when accumulating)
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
  Barrier input_full[kRingMax];        // a step's inputs have been loaded
  Barrier input_free[kRingMax];        // all compute warps are done with them
  Barrier result_ready[kRingMax];      // a slot may be written (and holds what is accumulated to)
  Barrier result_done[kRingMax];       // all compute warps have written it
  Barrier partials_full[kBuffersMax];  // all compute warps have stored their sums
  Barrier totals_full[kBuffersMax];    // the sums of all CTAs of the cluster are here
  Barrier weights_full[kBuffersMax];   // the softmax warp has stored the weights
};
static_assert(sizeof(SharedHead) <= kHeadBytes);

/// A pointer to shared memory as a value that the compiler keeps, rather than computing it anew at
/// every use: from the block's rank in its cluster, which takes some 40 cycles to read, on.
template <class T>
__device__ __forceinline__ T* keep(T* shared) {
  uint32_t address = cute::cast_smem_ptr_to_uint(shared);
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

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
    for (int i = 0; i < kBuffersMax; ++i) {
      head.partials_full[i].init(plan.warps);
      head.totals_full[i].init(1);
      head.weights_full[i].init(1);
    }
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

/// How many steps all clusters have begun to load.
__device__ __forceinline__ int read_issued(const int* issued) {
  int now;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(issued) : "memory");
  return now;
}

/// Waits until the grid has caught up with this step; a hint only, given up after some 40 us.
/// `seen` is what was read last, and what is read here.
__device__ __forceinline__ void wait_for_window(const int* issued, int& seen, int64_t step,
                                                int window) {
  for (int tries = 0; tries < 50 && step > seen + window; ++tries) {
    seen = read_issued(issued);
  }
}

/// The load warp: the rows of every step into the ring of inputs, those of the step after it into
/// L2. The first `num_sources` have elements of type Source.
template <class Source, int kCapacity>
__device__ __forceinline__ void load_steps(SharedHead& head, const SharedMap& map, const Plan& plan,
                                           const Share& share, const RowTable<kCapacity>& table,
                                           const ScaleTable& scale_table, int num_sources, int rows,
                                           int* issued) {
  constexpr bool kNarrow = kIsNarrow<Source>;
  const int lane = lane_of_warp();
  const int narrow = kNarrow ? num_sources : 0;
  const LaneRows lane_rows(table, rows, share.column, lane, narrow);
  const auto bytes = [&](int row) {
    return kNarrow && row < num_sources ? share.columns : share.columns * 2;
  };
  const CachePolicy load_policy(plan.load_hint);
  const CachePolicy prefetch_policy(plan.prefetch_hint);
  char* const inputs = reinterpret_cast<char*>(&head) + map.inputs;
  int seen = 0;  // steps that all clusters have begun to load, as last read
  RingCursor cursor;
  for (int step = 0; step < share.steps; ++step) {
    if (step >= plan.stages) {
      head.input_free[cursor.slot].wait(cursor.parity ^ 1);
    }
    if (lane == 0) {
      if (plan.window > 0) {
        wait_for_window(issued, seen, static_cast<int64_t>(step) * share.clusters + share.cluster,
                        share.clusters * plan.window / 100);
        if (share.rank == 0) {
          asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(issued) : "memory");
        }
      }
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
          load_row(token + map.input_row(row, num_sources), lane_rows.at(i, t), bytes(row),
                   head.input_full[cursor.slot], load_policy);
        }
      }
    }
    if (plan.prefetch && step + 1 < share.steps) {
      for (int b = 0; b < plan.batch; ++b) {
        const int64_t t = share.clamped(share.token(step + 1, b));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane + i * kWarpLanes;
          if (row < rows) {
            prefetch_row(lane_rows.at(i, t), bytes(row), prefetch_policy);
          }
        }
        if (!std::is_same_v<Source, Bf16> && scale_table.stride > 0 && lane < num_sources) {
          prefetch_line(scale_table.data[lane] + t * scale_table.stride +
                        (share.column >> scale_table.shift));
        }
      }
    }
    if (plan.window > 0 && lane == 0) {
      seen = read_issued(issued);  // arrives while this warp waits for room
    }
    __syncwarp();
    cursor.advance(plan.stages);
  }
}

/// The scales of every step, by a warp of their own: they come through registers, a microsecond
/// after they were asked for.
__device__ __forceinline__ void load_scales(SharedHead& head, const SharedMap& map,
                                            const Plan& plan, const Share& share,
                                            const ScaleTable& table, int num_sources) {
  const int lane = lane_of_warp();
  const ScaleCopier scales(num_sources, table.shift, share.column, share.columns);
  Bf16* const all = reinterpret_cast<Bf16*>(reinterpret_cast<char*>(&head) + map.scales);
  RingCursor cursor;
  for (int step = 0; step < share.steps; ++step) {
    if (step >= plan.stages) {
      head.input_free[cursor.slot].wait(cursor.parity ^ 1);
    }
    scales.copy(all + cursor.slot * plan.batch * map.token_scales(), map, table, plan.batch, lane,
                [&](int b) { return share.clamped(share.token(step, b)); });
    __syncwarp();
    if (lane == 0) {
      head.input_full[cursor.slot].arrive();
    }
    cursor.advance(plan.stages);
  }
}

// -------------------------------------------------------------------------------------- compute

/// The steps of a compute warp: `first(step, stage)` is P1, `second(step, stage, result)` P2. An
/// answer of a barrier takes some 90 cycles, so that three lanes ask the three of a round at once;
/// where the answer is no it is waited for.
template <class First, class Second>
__device__ __forceinline__ void compute_steps(SharedHead& head, const Plan& plan,
                                              const Share& share, First&& first, Second&& second) {
  RingCursor ahead;   // stage of P1
  RingCursor behind;  // stage of P2
  RingCursor result;
  const int lane = lane_of_warp();
  for (int step = -plan.lead; step < share.steps; ++step) {
    Barrier& input_full = head.input_full[ahead.slot];
    Barrier& result_ready = head.result_ready[result.slot];
    Barrier& weights_full = head.weights_full[plan.buffer(step)];
    const uint32_t phase = plan.phase(step);
    const Barrier& own = lane == 0 ? input_full : lane == 1 ? result_ready : weights_full;
    const bool yes = own.test(lane == 0 ? ahead.parity : lane == 1 ? result.parity : phase);
    const uint32_t complete = __ballot_sync(0xffffffffu, yes);
    __syncwarp();  // what a lane has seen complete, all may read
    if (step + plan.lead < share.steps) {
      if ((complete & 1) == 0) {
        input_full.wait(ahead.parity);
      }
      first(step + plan.lead, ahead);
      ahead.advance(plan.stages);
    }
    if (step >= 0) {
      if ((complete & 2) == 0) {
        result_ready.wait(result.parity);
      }
      if ((complete & 4) == 0) {
        weights_full.wait(phase);
      }
      second(step, behind, result);
      behind.advance(plan.stages);
      result.advance(plan.slots);
    }
  }
}

/// Works on kTiles tiles, kAtOnce a batch: `load(first, batch)`, then `use(first, batch)`, the next
/// batch being loaded before this one is used (kAhead). The compiler keeps loads, products and
/// stores in the order in which they are written, and an ldmatrix takes as long as some five
/// products: one tile after the other, P1 of 16 tiles took 1040 cycles.
template <int kTiles, int kAtOnce, class Batch, bool kAhead = true, class Load, class Use>
__device__ __forceinline__ void for_batches(Load&& load, Use&& use) {
  Batch batch[2];
  if constexpr (kAhead) {
    load(0, batch[0]);
  }
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    const int next = first + kAtOnce;
    Batch& own = batch[first / kAtOnce % 2];
    if (!kAhead) {
      load(first, own);
    } else if (next < kTiles) {
      load(next, batch[next / kAtOnce % 2]);
    }
    use(first, own);
  }
}

// ------------------------------------------------------------------------------------- the sums

// A softmax warp takes 1 to 2 us a step, as much as the step's bytes or more. So there are two
// where shared memory has room for their sums, and each has few instructions a lane, loads that do
// not wait for each other, and no branch that differs between lanes.

__device__ __forceinline__ void add_to(float4& sum, const float4& value) {
  sum.x += value.x;
  sum.y += value.y;
  sum.z += value.z;
  sum.w += value.w;
}

/// Adds up the partial sums of a step: over the warps of this CTA, then over the CTAs of the
/// cluster, in that order.
struct Sums {
  float* partials;  // [buffers, slices, rows, cols]
  float* totals;    // [totals, cluster, rows, cols]
  const Plan& plan;
  int rows;  // of all tokens of a step
  int cols;  // N rounded up to a multiple of 4
  int warps, slices, cluster, rank;

  __device__ __forceinline__ Sums(SharedHead& head, const SharedMap& map, const Plan& call_plan,
                                  const Extents& extents, int cta_rank)
      : partials(reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + map.partials)),
        totals(reinterpret_cast<float*>(reinterpret_cast<char*>(&head) + map.totals)),
        plan(call_plan),
        rows(plan.batch * extents.partial_rows),
        cols(extents.partial_cols),
        warps(plan.warps),
        slices(plan.slices()),
        cluster(plan.cluster),
        rank(cta_rank) {}

  /// Row `row` of what a warp adds up in `step`. Not to be computed once more for every store.
  __device__ __forceinline__ float* partial_row(int step, int warp, int row) const {
    return keep(partials + ((plan.buffer(step) * slices + warp) * rows + row) * cols);
  }

  /// Adds up the warps' sums of `step` and sends them to the other CTAs of the cluster. Called by
  /// the softmax warp when the partial sums are complete; their memory is free for it afterwards.
  __device__ __forceinline__ void send(SharedHead& head, int step, int lane) const {
    const int buffer = plan.total(step);
    const int quads = rows * cols / 4;
    const float4* const from =
        reinterpret_cast<const float4*>(partials) + plan.buffer(step) * slices * quads;
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
      // What these copies read and write is used again two of this warp's steps on, after its
      // peers have answered it once more, each when it was done with this step.
      if (lane < cluster && lane != rank) {
        copy_to_peer(to, quads * 16, head.totals_full[buffer], lane);
      }
    }
    __syncwarp();
  }

  /// Waits until the sums of all CTAs are here.
  __device__ __forceinline__ void receive(SharedHead& head, int step) const {
    if (cluster > 1) {
      head.totals_full[plan.total(step)].wait_cluster(plan.total_phase(step));
    }
  }

  /// Memory that the softmax warp may use between `send` and its weights.
  __device__ __forceinline__ float* scratch(int step) const {
    return partials + plan.buffer(step) * slices * rows * cols;
  }

  /// `kCount` consecutive columns of a row of sums over all columns of D, after `receive`. Columns
  /// beyond the last hold no sums: what is read there must not be used.
  template <int kCount>
  __device__ __forceinline__ void read(int step, int row, int col, float (&values)[kCount]) const {
    const float* const first =
        totals + (plan.total(step) * cluster * rows + row) * cols + (col < cols ? col : 0);
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

/// The first step of this softmax warp; none if the plan has one warp and this is the other.
__device__ __forceinline__ int first_softmax_step(const Plan& plan, int steps) {
  const int warp = warp_of_cta() - static_cast<int>(Role::kSoftmax);
  return warp < plan.softmax_warps ? warp : steps;
}

/// Whether this warp is the scale warp.
template <class Source>
__device__ __forceinline__ bool is_scale_warp(const SharedMap& map) {
  return !std::is_same_v<Source, Bf16> && map.scale_groups > 0 &&
         warp_of_cta() == static_cast<int>(Role::kSoftmaxOrScales);
}

/// How the lanes of a softmax warp share a token: `kParts` neighbouring lanes have one query, and
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
