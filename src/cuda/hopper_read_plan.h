// How a `read` of many tokens is laid out on a Hopper GPU: launch choices as data, and the map of
// shared memory that host and kernel derive from them.

#ifndef FLASH_ATTN_RES_CUDA_HOPPER_READ_PLAN_H_
#define FLASH_ATTN_RES_CUDA_HOPPER_READ_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "cuda/hopper_plan.h"

namespace flash_attn_res::cuda::hopper {

inline constexpr int kReadThreadsMax = 1024;
inline constexpr int kReadTokensMax = 48;  // tokens that have rows in the ring
inline constexpr int kReadGroupsMax = 15;  // each has a named barrier; one is the block's

/// Launch choices of one call.
struct ReadPlan {
  int warps = 0;   // of a group, which has a token at a time; 0: not served
  int groups = 0;  // of a block
  int slots = 0;   // rows in the ring
  int tokens = 0;  // tokens that may have rows in the ring
  int lead = 1;    // tokens, counted over all blocks, by which one may run ahead of the rest
  int look = 1;    // tokens of a block from one look at the count to the next

  friend bool operator==(const ReadPlan&, const ReadPlan&) = default;

  FLASH_ATTN_RES_HOPPER_BOTH int threads() const { return (groups * warps + 1) * 32; }
};

/// Where things lie in shared memory, in bytes from its start:
///
///   head   barriers (ReadHead)
///   sums   [groups, 2, sums_floats] float: square and dot of each segment and term, then the
///          square of each segment of the mixture
///   ring   [slots, D] of the storage
struct ReadMap {
  int sums, ring, bytes;
  int sums_floats;
  int terms;  // rounded up to those that are summed at once
};

/// Terms whose sums a warp forms at once.
constexpr int terms_together(int terms) { return terms <= 2 ? 2 : terms <= 4 ? 4 : 8; }

constexpr ReadMap read_map(const ReadPlan& plan, int terms, int dim) {
  const int together = terms_together(terms);
  const int segments = (dim + 255) / 256;
  ReadMap map{};
  map.terms = (terms + together - 1) / together * together;
  map.sums_floats = (segments * (map.terms * 2 + 1) + 1) / 2 * 2;
  map.sums = 2 * kReadTokensMax * 8;
  map.ring = (map.sums + plan.groups * 2 * map.sums_floats * 4 + 127) / 128 * 128;
  map.bytes = map.ring + plan.slots * dim * 2;
  return map;
}

/// Segments of 256 columns that a warp has: two share a softmax; more than four terms leave no
/// registers for two (they spill, 81 instead of 97 % of copy at K, D of 8, 4096 with a norm).
constexpr int read_segments(int terms) { return terms_together(terms) == 8 ? 1 : 2; }

/// As many groups as a block has warps for and shared memory room, each with a token, and a further
/// token on its way; then as many rows as there is room for. `rows` of a token are loaded, `terms`
/// of them are mixed. Not served: tokens that are too wide for one block.
constexpr ReadPlan choose_read(int terms, int rows, int dim, bool norm, int64_t shared_bytes) {
  constexpr int kWarpsMax = kReadThreadsMax / 32 - 1;
  // Without a window 95 to 96 % of copy, with 3 MB 98 to 101; with 12 MB it does nothing, with 0.5
  // it costs up to half. A norm over two terms likes less: 92 to 95 with 3 MB, 95 to 97 with 1.5.
  const int window_bytes = norm && terms <= 2 ? 3 << 19 : 3 << 20;
  constexpr int kLookBytes = 16 * 1024;  // as for the backward: hopper_read_backward_plan.h
  const int warp_columns = 256 * read_segments(terms);
  ReadPlan plan;
  plan.warps = (dim + warp_columns - 1) / warp_columns;
  if (dim % 8 != 0 || plan.warps > kWarpsMax) {
    return {};
  }
  plan.lead = std::max(window_bytes / (rows * dim * 2), 1);
  plan.look = (kLookBytes - 1) / (rows * dim * 2) + 1;
  for (plan.groups = std::min(kWarpsMax / plan.warps, kReadGroupsMax); plan.groups >= 1;
       --plan.groups) {
    plan.slots = static_cast<int>((shared_bytes - read_map(plan, terms, dim).ring) / (dim * 2));
    plan.slots = std::min(plan.slots, (kReadTokensMax - 1) * rows);
    // One more token than there is room for: a barrier is not used again before the token that used
    // it last has made room.
    plan.tokens = (plan.slots + rows - 1) / rows + 1;
    if (plan.slots >= (plan.groups + 1) * rows ||
        (plan.groups == 1 && 2 * plan.slots >= 3 * rows)) {
      return plan;
    }
  }
  return {};
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_HOPPER_READ_PLAN_H_
