// How a phase-1 call is laid out on a Hopper GPU: launch choices as data, and the map of shared
// memory that host and kernel derive from them.

#ifndef FLASH_ATTN_RES_CUDA_HOPPER_PLAN_H_
#define FLASH_ATTN_RES_CUDA_HOPPER_PLAN_H_

#include <cstdint>

#ifdef __CUDACC__
#define FLASH_ATTN_RES_HOPPER_BOTH __host__ __device__ __forceinline__ constexpr
#else
#define FLASH_ATTN_RES_HOPPER_BOTH constexpr
#endif

namespace flash_attn_res::cuda::hopper {

inline constexpr int kSourcesMax = 16;  // two mma tiles of sources
inline constexpr int kQueriesMax = 24;  // three mma tiles of queries
inline constexpr int kFewQueries = 4;   // that stand beside their remainders in one tile
inline constexpr int kFewSources = 8;   // one mma tile of sources
inline constexpr int kBatchMax = 4;     // tokens of a step
inline constexpr int kRingMax = 8;      // slots of a ring of buffers
inline constexpr int kClusterMax = 8;   // the largest portable cluster

// Warps of a CTA by their work. The first two warpgroups compute, the third serves them.
inline constexpr int kComputeWarps = 8;
enum class Role : int { kLoad = 8, kStore = 9, kSoftmax = 10, kSoftmaxOrScales = 11 };
inline constexpr int kThreads = 384;

/// L2 eviction priority of a stream.
enum class CacheHint : int32_t { kEvictNormal = 0, kEvictFirst = 1, kEvictLast = 2 };

/// Launch choices of one call.
struct Plan {
  int cluster = 1;        // CTAs that share a token: each has `columns` of its D columns
  int columns = 0;        // columns of a CTA (the last of a cluster may have fewer); multiple of 8
  int tiles = 0;          // 16-column tiles of a compute warp: which kernel is launched
  int warps = 0;          // compute warps at work: warps * tiles * 16 >= columns
  int batch = 1;          // tokens of a step
  int stages = 2;         // steps whose inputs are in shared memory
  int slots = 1;          // steps whose results are in shared memory
  int lead = 1;           // steps that P1 is ahead of P2: 1 or 2
  int softmax_warps = 2;  // that have steps in turn: 1 or 2
  int clusters = 1;       // clusters launched; they take steps in turn
  int rounds = 0;         // steps of every cluster
  int extra = 0;          // the first clusters, which have one step more

  bool prefetch = true;  // the step after the one that is loaded is brought into L2
  int window = 100;      // steps that a cluster may lead, in percent of the clusters; 0: no limit
  CacheHint load_hint = CacheHint::kEvictFirst;
  CacheHint prefetch_hint = CacheHint::kEvictLast;
  CacheHint store_hint = CacheHint::kEvictNormal;

  friend bool operator==(const Plan&, const Plan&) = default;

  /// Columns of a CTA rounded up to whole tiles of its warps; the rest is zero padding.
  FLASH_ATTN_RES_HOPPER_BOTH int padded_columns() const { return warps * tiles * 16; }

  /// Slices of partial sums: always an address to read for each of eight warps.
  FLASH_ATTN_RES_HOPPER_BOTH int slices() const {
    return warps < kComputeWarps ? warps + 1 : kComputeWarps;
  }

  /// Buffers of partial sums and weights, which a step has from its P1 to its P2; the one of a
  /// step, and its phase.
  FLASH_ATTN_RES_HOPPER_BOTH int buffers() const { return 2 * lead; }
  FLASH_ATTN_RES_HOPPER_BOTH int buffer(int step) const { return step & (buffers() - 1); }
  FLASH_ATTN_RES_HOPPER_BOTH uint32_t phase(int step) const {
    return static_cast<uint32_t>(step >> lead) & 1;
  }

  /// Buffers of totals: a softmax warp has two, and uses one again after its peers have answered
  /// what it sent from the other.
  FLASH_ATTN_RES_HOPPER_BOTH int totals() const { return 2 * softmax_warps; }
  FLASH_ATTN_RES_HOPPER_BOTH int total(int step) const { return step & (totals() - 1); }
  FLASH_ATTN_RES_HOPPER_BOTH uint32_t total_phase(int step) const {
    return static_cast<uint32_t>(step >> softmax_warps) & 1;
  }

  /// Bytes between rows in shared memory: 16 more than a multiple of 128, so that eight rows of a
  /// block lie in different banks.
  FLASH_ATTN_RES_HOPPER_BOTH int pitch(int element_bytes) const {
    return (padded_columns() * element_bytes + 127) / 128 * 128 + 16;
  }
};

/// How the sources of phase 1 are stored. Those of float16 may have scales, those of float8 do.
enum class SourceKind : int32_t { kNone, kBFloat16, kFloat16, kFloat8 };
struct SourceLayout {
  SourceKind kind = SourceKind::kBFloat16;  // kNone: in no way that the kernels serve
  int scale_columns = 0;                    // that share a scale; 0: no scales

  FLASH_ATTN_RES_HOPPER_BOTH int bytes() const { return kind == SourceKind::kFloat8 ? 1 : 2; }
  FLASH_ATTN_RES_HOPPER_BOTH int narrow_rows(int num_sources) const {
    return bytes() == 1 ? num_sources : 0;
  }
  FLASH_ATTN_RES_HOPPER_BOTH int scaled_rows(int num_sources) const {
    return scale_columns > 0 ? num_sources : 0;
  }
};

/// Sizes of one call that fix its shared memory.
struct Extents {
  int input_rows;         // rows of a token loaded a step: N, or N + S in the backward
  int result_rows;        // rows of a token in the ring of results: S, or N in the backward
  int result_bytes;       // bytes of a result element
  int partial_rows;       // rows of partial sums of a token: S + 1, or S in the backward
  int partial_cols;       // N rounded up to a multiple of 4
  int weight_floats;      // mixing weights of a token, a multiple of 4
  int narrow_rows = 0;    // of the input rows those in float8, which come first: N, or 0
  int scaled_rows = 0;    // of the input rows those with scales, which come first: N, or 0
  int scale_columns = 0;  // columns that share a scale
};

/// Where the weights of a token lie, in floats from their start. Rows are queries, columns sources,
/// both rounded up to eights; what does not exist is zero. The pitch lets eight rows be read side
/// by side without bank conflicts.
struct WeightMap {
  int pitch;    // of a row
  int prob;     // [S, pitch] forward: p; backward: p gate, the weights of dout in dv
  int query;    // [S, pitch] backward: w, the weights of u in dv and of v in du
  int key;      // [N] backward: the weights of v in dv
  int scale;    // backward: a power of two near the largest |w|
  int forward;  // floats of a token in the forward
  int backward;
};

FLASH_ATTN_RES_HOPPER_BOTH WeightMap weight_map(int query_groups, int source_groups) {
  WeightMap map{};
  map.pitch = 8 * source_groups + 4;
  map.prob = 0;
  map.query = 8 * query_groups * map.pitch;
  map.key = 2 * map.query;
  map.scale = map.key + 8 * source_groups;
  map.forward = map.query;
  map.backward = map.scale + 4;
  return map;
}

/// Where things lie in shared memory, in bytes from its start:
///
///   head      barriers (SharedHead)
///   weights   [buffers, batch, weight_floats] float: see WeightMap
///   partials  [buffers, slices, batch * partial_rows, partial_cols] float: sums over a warp's
///             columns; one slice a warp, and one of zeros where fewer than eight warps work
///   totals    [totals, cluster, batch * partial_rows, partial_cols] float: sums over a CTA's
///             columns
///   scratch   [warps, tiles * 32 + 256]: where rows that do not exist are stored
///   scales    [stages, batch, scale_groups, scale_pitch] bfloat16: a group has those of all
///             sources
///   inputs    [stages, batch, token_bytes]: narrow rows, source_pitch apart, then the others
///   results   [slots, batch * result_rows, result_pitch]
struct SharedMap {
  int weights, partials, totals, scratch, inputs, results, bytes;
  int pitch, source_pitch, result_pitch, token_bytes, stage_bytes, slot_bytes;
  int scales, scale_groups;  // groups of a CTA's columns; 0: no scales
  int scale_pitch;           // sources of a group, rounded up to eights: those that fill up have 0

  /// Scales of a token.
  FLASH_ATTN_RES_HOPPER_BOTH int token_scales() const { return scale_groups * scale_pitch; }

  /// Where row `row` of a token lies; the first `num_sources` are the sources.
  FLASH_ATTN_RES_HOPPER_BOTH int input_row(int row, int num_sources) const {
    return row < num_sources ? row * source_pitch
                             : num_sources * source_pitch + (row - num_sources) * pitch;
  }
};

inline constexpr int kHeadBytes = 512;
inline constexpr int kBuffersMax = 4;  // of partial sums, weights, totals

FLASH_ATTN_RES_HOPPER_BOTH int scratch_bytes_per_warp(int tiles) { return tiles * 32 + 256; }

FLASH_ATTN_RES_HOPPER_BOTH SharedMap shared_map(const Plan& plan, const Extents& e) {
  SharedMap map{};
  map.pitch = plan.pitch(2);
  map.result_pitch = plan.pitch(e.result_bytes);
  map.source_pitch = e.narrow_rows > 0 ? plan.pitch(1) : map.pitch;
  map.token_bytes = e.narrow_rows * map.source_pitch + (e.input_rows - e.narrow_rows) * map.pitch;
  map.stage_bytes = plan.batch * map.token_bytes;
  map.slot_bytes = plan.batch * e.result_rows * map.result_pitch;
  const int sums = plan.batch * e.partial_rows * e.partial_cols * 4;
  const bool ragged = e.result_rows % 8 != 0;
  map.weights = kHeadBytes;
  map.partials = map.weights + plan.buffers() * plan.batch * e.weight_floats * 4;
  map.totals = map.partials + plan.buffers() * plan.slices() * sums;
  map.scratch = map.totals + plan.totals() * plan.cluster * sums;
  map.scales = map.scratch + (ragged ? plan.warps * scratch_bytes_per_warp(plan.tiles) : 0);
  // A CTA's columns may begin and end inside a group. Groups of padding have zeros.
  map.scale_groups = e.scaled_rows == 0 ? 0 : (plan.padded_columns() - 1) / e.scale_columns + 2;
  map.scale_pitch = (e.scaled_rows + 7) / 8 * 8;
  map.inputs = map.scales + plan.stages * plan.batch * map.token_scales() * 2;
  map.inputs = (map.inputs + 127) / 128 * 128;
  map.results = map.inputs + plan.stages * map.stage_bytes;
  map.bytes = map.results + plan.slots * map.slot_bytes;
  return map;
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_HOPPER_PLAN_H_
