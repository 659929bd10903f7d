// How a `read_backward` is laid out on a Hopper GPU: launch choices as data, and the map of shared
// memory that host and kernel derive from them.

#ifndef FLASH_ATTN_RES_CUDA_HOPPER_READ_BACKWARD_PLAN_H_
#define FLASH_ATTN_RES_CUDA_HOPPER_READ_BACKWARD_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "cuda/hopper_plan.h"
#include "cuda/policy.h"

namespace flash_attn_res::cuda::hopper {

inline constexpr int kReadTermsMax = 32;      // a lane has one term
inline constexpr int kReadStagesMax = 8;      // tokens in the ring
inline constexpr int kReadStatsStages = 4;    // tokens whose statistics are under way
inline constexpr int kReadWarpsMax = 10;      // compute warps of a CTA
inline constexpr int kReadWarpColumns = 256;  // of a warp, for each chunk of 8 that a lane has
inline constexpr int kReadServiceWarps = 2;   // one loads, one makes the weights

/// Warps that a multiprocessor holds by registers, a multiple of 4: each of its quarters has a file
/// of its own. A lane with one chunk needs 72 registers for two terms, else 80: with two terms the
/// rows are few and registers are the limit, so that 72 of them, not 80, make room for a third CTA
/// at D = 7168 (advance 87 to 94 % of a copy). With more terms shared memory is the limit. Two
/// chunks need 96.
FLASH_ATTN_RES_HOPPER_BOTH int read_resident_warps(int terms, int chunks) {
  return chunks == 2 ? 20 : terms == 2 ? 28 : 24;
}

/// Chunks of a lane where a CTA has so many columns. Instructions limit the kernel on an H200, and
/// a second chunk shares those that a warp has for a token: barriers, shuffles, weights, addresses.
/// With two terms advance goes from 74 to 91 % of a copy at D = 7168, 75 to 88 at 4096. With more
/// terms there are fewer warps than hide each other's waiting (one-shot with norm over ten: 77 to
/// 61 at D = 2048), and where lanes would idle the gain is gone (87 to 85 at D = 2304). A single
/// warp would have nothing to hide its sums and gradients.
FLASH_ATTN_RES_HOPPER_BOTH int read_chunks(int terms, int columns) {
  constexpr int kPair = 2 * kReadWarpColumns;
  return terms == 2 && columns > kPair && columns % kPair == 0 ? 2 : 1;
}

/// Launch choices of one call.
struct ReadBackwardPlan {
  int cluster = 1;   // CTAs that share a token: each has `columns` of its D columns
  int columns = 0;   // columns of a CTA (the last of a cluster may have fewer); multiple of 8
  int chunks = 1;    // chunks of 8 columns that a lane has, 1 or 2
  int warps = 0;     // compute warps of a token in a CTA; two more serve them
  int groups = 1;    // of so many warps, which take the CTA's tokens in turn; 1 or 2
  int stages = 3;    // tokens in the ring of a CTA: two in use, the others on their way
  int blocks = 1;    // CTAs that one multiprocessor runs at once, by registers and shared memory
  int clusters = 1;  // clusters launched; they take tokens in turn
  int lead = 1;      // tokens, counted over all clusters, by which one may run ahead of the rest
  int look = 1;      // tokens of a cluster from one look at the count to the next

  friend bool operator==(const ReadBackwardPlan&, const ReadBackwardPlan&) = default;

  FLASH_ATTN_RES_HOPPER_BOTH int compute_warps() const { return groups * warps; }
  FLASH_ATTN_RES_HOPPER_BOTH int threads() const {
    return (compute_warps() + kReadServiceWarps) * 32;
  }
};

/// Groups of warps of a CTA. Where shared memory has room for one CTA alone, its eight to ten warps
/// do not hide each other's waiting, and nine of them are three to one scheduler and two to the
/// others: a second group takes one-shot with norm over ten sources at D = 2304 from 69 to 87 % of
/// a copy on an H200, over sixteen at D = 2048 from 84 to 94. With two terms rows are few, CTAs
/// several.
FLASH_ATTN_RES_HOPPER_BOTH int read_groups(int terms, const ReadBackwardPlan& plan) {
  const bool alone = plan.blocks == 1 && plan.cluster == 1 && terms != 2;
  const bool room = 2 * plan.warps + kReadServiceWarps <= read_resident_warps(terms, plan.chunks);
  return alone && room ? 2 : 1;
}

/// Sizes of one call that fix its shared memory.
struct ReadBackwardExtents {
  int terms;        // K
  int narrow_rows;  // rows of 16-bit values of a token: terms, dx, dmix, dpartial_out, dsources
  int wide_rows;    // rows of float32 values: dpartial_out, and dsources that are added to
  int sums;         // sums over D of a token, a multiple of 4: see the kernel
};

/// Where things lie in shared memory, in bytes from its start:
///
///   head      barriers (ReadBackwardHead)
///   stats     [stats stages, 2 K + 1] float: logits, inv_rms, rh, as they come in
///   probs     [2, K + 1] float: p_j, and rh
///   weights   [2, K + 1] float4: p_j and the factors of u and z_j in dz_j; the last: along
///   partials  [2, warps, sums] float: each warp's share of the sums over D
///   totals    [2, cluster, sums] float: each CTA's share
///   vectors   [2, 2, columns / 8] float4: u and g, the two halves of each chunk in planes
///   ring      [stages, narrow rows * columns * 2 + wide rows * columns * 4]
struct ReadBackwardMap {
  int stats, probs, weights, partials, totals, vectors, ring, stage_bytes, bytes;
};

inline constexpr int kReadHeadBytes = 208;

FLASH_ATTN_RES_HOPPER_BOTH ReadBackwardMap read_backward_map(const ReadBackwardPlan& plan,
                                                             const ReadBackwardExtents& extents) {
  ReadBackwardMap map{};
  map.stats = kReadHeadBytes;
  map.probs = map.stats + kReadStatsStages * (2 * extents.terms + 1) * 4;
  map.weights = (map.probs + 2 * (extents.terms + 1) * 4 + 15) / 16 * 16;
  map.partials = map.weights + 2 * (extents.terms + 1) * 16;
  map.totals = map.partials + 2 * plan.warps * extents.sums * 4;
  map.vectors = map.totals + 2 * plan.cluster * extents.sums * 4;
  map.ring = (map.vectors + 2 * plan.columns * 4 + 127) / 128 * 128;
  map.stage_bytes = (extents.narrow_rows + 2 * extents.wide_rows) * plan.columns * 2;
  map.bytes = map.ring + plan.stages * map.stage_bytes;
  return map;
}

/// Launch choices; `clusters` is still to be set from the device. `columns` is 0 where nothing
/// fits.
inline ReadBackwardPlan choose_read_backward(const ReadBackwardExtents& extents, int64_t dim,
                                             const DeviceLimits& limits) {
  constexpr int64_t kReserved = 1024;  // the system takes 1 KB of shared memory a block
  constexpr int kBlocksMax = 8;
  constexpr int kStagesLeast = 3;  // with two, all that is in shared memory is in use
  constexpr int kStagesWanted = 4;
  // A fourth token in the ring is worth 1 to 3 % where three are less than this in all rings of a
  // multiprocessor, and costs up to 0.6 % where they are more.
  constexpr int64_t kRingEnough = 144 * 1024;
  constexpr int kStagesDeep = 5;
  // Less costs up to 40 %, more up to 3 %: 2 to 4 MB are best at all of D = 2048 (K = 2, 4), 2304
  // (K = 2, 10), 4096, 5120 and 7168 (K = 2, 8).
  constexpr int64_t kWindowBytes = 3 << 20;
  // The counter takes some 200 operations a microsecond; tokens of 16 KB come 150 a microsecond.
  // And its answer takes about as long as such a token: of an H200 at D = 1024, 2048 and 2304 an
  // advance has 85, 91 and 88 % with a look at every 16 KB, 93, 100 and 92 at every 32.
  const int64_t look_bytes = (extents.terms == 2 ? 32 : 16) * 1024;
  constexpr int64_t kLongToken = 24 * 1024;  // looks at each

  ReadBackwardPlan plan;
  const int64_t token_bytes = (extents.narrow_rows + 2 * extents.wide_rows) * dim * 2;
  plan.lead = static_cast<int>(std::max<int64_t>(kWindowBytes / token_bytes, 1));
  plan.look = static_cast<int>(
      std::max<int64_t>(ceil_div(look_bytes, token_bytes), token_bytes < kLongToken ? 2 : 1));
  // Tokens on their way in each ring hide the loads, several CTAs of a multiprocessor each other's
  // exchanges of sums. A wider cluster makes room for both, but has one exchange more a token: so
  // the narrowest comes first that gives two CTAs, or needs no exchange; then what fits at all.
  for (const int least_blocks : {2, 1}) {
    for (int cluster = 1; cluster <= kClusterMax; cluster *= 2) {
      plan.cluster = cluster;
      plan.columns = static_cast<int>(round_up(ceil_div(dim, cluster), 8));
      plan.chunks = read_chunks(extents.terms, plan.columns);
      plan.warps = static_cast<int>(ceil_div(plan.columns, plan.chunks * kReadWarpColumns));
      const bool every_rank_works = static_cast<int64_t>(cluster - 1) * plan.columns < dim;
      if (plan.warps > kReadWarpsMax || !every_rank_works) {
        continue;
      }
      const auto fits = [&](int blocks, int stages) {
        plan.stages = stages;
        const int64_t bytes = read_backward_map(plan, extents).bytes;
        return bytes <= limits.shared_per_block &&
               blocks * (bytes + kReserved) <= limits.shared_per_multiprocessor;
      };
      const int least = cluster == 1 ? 1 : least_blocks;
      plan.blocks = std::clamp(
          read_resident_warps(extents.terms, plan.chunks) * 32 / plan.threads(), 1, kBlocksMax);
      // Of CTAs with two chunks a lane, two with deep rings are better than three with shallow ones
      // (advance at D = 2048 88 instead of 80 %), four than five (at D = 1024 86 instead of 82),
      // and one than a cluster (merge at D = 4096 94 instead of 87), if it is not shallow. Three
      // with four tokens each are better than two: one-shot of two at D = 2048, with norm, 72
      // for 66.
      const bool alone = plan.chunks == 2 && cluster == 1;
      while (alone && plan.blocks > 2 &&
             !fits(plan.blocks, plan.blocks > 3 ? kStagesDeep : kStagesWanted)) {
        --plan.blocks;
      }
      while (plan.blocks > least && !fits(plan.blocks, kStagesLeast)) {
        --plan.blocks;
      }
      if (plan.blocks < least) {
        continue;  // registers do not hold so many
      }
      const int64_t ring_bytes =
          int64_t{kStagesLeast} * plan.blocks * read_backward_map(plan, extents).stage_bytes;
      const int most = alone                      ? kStagesDeep
                       : ring_bytes < kRingEnough ? kStagesWanted
                                                  : kStagesLeast;
      for (int stages = most; stages >= (alone && plan.blocks == 1 ? kStagesWanted : kStagesLeast);
           --stages) {
        if (fits(plan.blocks, stages)) {
          plan.groups = read_groups(extents.terms, plan);
          return plan;
        }
      }
    }
  }
  return {};
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_HOPPER_READ_BACKWARD_PLAN_H_
