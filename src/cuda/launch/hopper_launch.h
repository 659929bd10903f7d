// What the launchers of the Hopper kernels share: the choice of a plan, launching clusters, and
// checking rows.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <tuple>

#include "cuda/hopper_plan.h"
#include "cuda/launch/launch.h"
#include "cuda/policy.h"
#include "flash_attn_res/status.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cuda::hopper {

/// Bytes of shared memory that a CTA may have on sm_90.
inline constexpr int kSharedBytesMax = 227 * 1024;

/// Bytes of the counter of issued steps at the start of a workspace.
inline constexpr int64_t kCounterBytes = 64;

/// A bound for the multiprocessors of a Hopper GPU, for workspaces: H100 and H200 have up to 132.
inline constexpr int kMultiprocessorsMax = 144;

/// Fewer steps a cluster do without the window: they cannot drift apart, and the counter has to be
/// zeroed first.
inline constexpr int kWindowRounds = 4;

constexpr int groups_of_eight(int64_t count) { return static_cast<int>(ceil_div(count, 8)); }

/// Whether the forward should keep clusters within a window of each other. News of the others takes
/// a microsecond or two to come round. On an H100 the window is worth 2 to 6 % where a step takes
/// 1.45 us and more of a multiprocessor's share of the memory. On an H200 it is worth 1 to 2 %
/// where a step takes 1.35 us, and costs as much where it takes 1.0; over float8 (`narrow`) it
/// costs 14 % at 1.35 us (16 sources, 4 queries, D = 2048).
constexpr bool window_pays(int64_t step_bytes, bool narrow, const DeviceLimits& limits) {
  const int64_t tenths_of_us = narrow ? 14 : 13;
  return step_bytes * limits.multiprocessors * 10 >= limits.memory_bytes_per_us * tenths_of_us;
}

/// Whether the next step should be brought into L2 ahead of its copy to shared memory. On an H100,
/// with 25 bytes of memory bandwidth a nanosecond and multiprocessor, it is worth 1 to 9 % of copy;
/// on an H200, with 36, it costs the backward 2 to 9 %.
constexpr bool prefetch_pays(const DeviceLimits& limits) {
  return limits.memory_bytes_per_us <= 30000 * int64_t{limits.multiprocessors};
}

/// Depths of the two rings.
struct Rings {
  int stages, slots;
};

/// Takes the deepest rings that fit: with two softmax warps rather than one (over scaled sources
/// there is one alone), as many slots as possible from `most_slots` down to `least.slots`, then as
/// many stages, but no fewer than `least.stages`. False when none fit.
inline bool choose_rings(Plan& plan, const Extents& extents, int most_slots, Rings least) {
  for (plan.softmax_warps = extents.scaled_rows > 0 ? 1 : 2; plan.softmax_warps >= 1;
       --plan.softmax_warps) {
    for (plan.slots = most_slots; plan.slots >= least.slots; --plan.slots) {
      for (plan.stages = kRingMax; plan.stages >= least.stages; --plan.stages) {
        if (shared_map(plan, extents).bytes <= kSharedBytesMax) {
          return true;
        }
      }
    }
  }
  return false;
}

/// Bytes of a step that are not too few. A multiprocessor's share of an H100's memory bandwidth is
/// 23 bytes a ns: 32 KB take 1.4 us. The backward with more of them has 89 instead of 86 % at D =
/// 1024 and 86 instead of 83 at N, S, D of 4, 6, 2304 (H200), the forward up to 4 less.
inline constexpr int64_t kStepBytes = 32 * 1024;
inline constexpr int64_t kBackwardStepBytes = 44 * 1024;
/// A byte of float8 sources is twice the work; two tokens of 2048 columns with eight queries go
/// together.
inline constexpr int64_t kNarrowStepBytes = 52 * 1024;

/// Columns of a CTA whose warps have eight tiles each.
inline constexpr int64_t kColumnsOfEightTiles = kComputeWarps * 8 * 16;

/// Chooses how a call is split. `tile_choices`: the kernels there are, by 16-column tiles of a
/// warp; `column_bytes`: that a token moves a column; `wanted`: rings that run at full speed;
/// `least_cluster`: CTAs of a cluster, at least; `least_step`: bytes of a step over sources of 16
/// bits, at least where its rings have room.
///
/// Fewer CTAs a cluster come first, as long as the wanted rings fit: a step is then longer, and
/// with it the time in which the exchange between CTAs can hide (about 1 us). Steps that would
/// still be shorter than that take several tokens. Where the wanted rings fit nowhere, two stages
/// and one slot will do; where they leave room for two more stages, P1 runs two steps ahead: with
/// one more the loads are late (86 against 90 %, backward at N, S, D of 4, 16, 2048), and a slot
/// less costs the forward with 24 queries 4 %.
inline Plan choose_plan(int64_t dim, std::span<const int> tile_choices, const Extents& extents,
                        int64_t column_bytes, int most_slots, Rings wanted, int least_cluster,
                        int64_t least_step) {
  const int64_t step_bytes = extents.narrow_rows > 0 ? kNarrowStepBytes : least_step;
  // Slices of 8 or 16 tiles begin with a group of columns that share a scale.
  const int64_t columns_at_once = extents.scaled_rows > 0 && extents.scale_columns == kScaleGroup
                                      ? kScaleGroup
                                  : extents.narrow_rows > 0 ? 16
                                                            : 8;
  for (const Rings least : {wanted, Rings{2, 1}}) {
    for (int cluster = least_cluster; cluster <= kClusterMax; cluster *= 2) {
      std::optional<Plan> best;
      for (const int tiles : tile_choices) {
        Plan plan;
        plan.cluster = cluster;
        plan.columns = static_cast<int>(round_up(ceil_div(dim, cluster), columns_at_once));
        plan.tiles = tiles;
        plan.warps = static_cast<int>(ceil_div(plan.columns, 16 * tiles));
        const bool every_rank_works = static_cast<int64_t>(cluster - 1) * plan.columns < dim;
        if (plan.warps > kComputeWarps || !every_rank_works ||
            !choose_rings(plan, extents, most_slots, least)) {
          continue;
        }
        while (plan.batch < kBatchMax && column_bytes * plan.columns * plan.batch < step_bytes) {
          Plan larger = plan;
          larger.batch *= 2;
          if (!choose_rings(larger, extents, most_slots, wanted)) {
            break;
          }
          plan = larger;
        }
        // Up to a tenth of padding for more warps: 89 against 82 % at N, S, D of 8, 24, 4096.
        const auto wasteful = [](const Plan& p) {
          return p.padded_columns() * 10 > p.columns * 11;
        };
        const auto rank = [&](const Plan& p) {
          return std::tuple(wasteful(p), -p.warps, p.padded_columns());
        };
        if (!best || rank(plan) < rank(*best)) {
          best = plan;
        }
      }
      if (best) {
        Plan further = *best;
        further.lead = 2;
        return choose_rings(further, extents, most_slots, {least.stages + 2, best->slots}) ? further
                                                                                           : *best;
      }
    }
  }
  return {};  // `columns` 0: not served
}

/// Whether every row of the list is bfloat16 (or `other`) and may be copied in bulk.
template <class MatrixType>
bool rows_can_be_copied(std::span<const MatrixType> rows, DType dtype) {
  constexpr uintptr_t kAlignment = 16;
  return std::ranges::all_of(rows, [&](const MatrixType& matrix) {
    const int64_t stride_bytes = matrix.stride * size_of(matrix.dtype);
    return matrix.dtype == dtype && matrix.cols * size_of(dtype) % kAlignment == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % kAlignment == 0 &&
           (matrix.rows <= 1 || stride_bytes % static_cast<int64_t>(kAlignment) == 0);
  });
}

/// How sources of phase 1 are stored, whatever their alignment.
inline SourceLayout layout_of(std::span<const ConstMatrix> sources,
                              std::span<const ConstMatrix> scales) {
  SourceLayout layout;
  if (!scales.empty()) {
    const int64_t dim = sources[0].cols;
    layout.scale_columns =
        static_cast<int>(scales[0].cols == 1 && dim > kScaleGroup ? dim : kScaleGroup);
  }
  const DType dtype = sources[0].dtype;
  layout.kind = dtype == DType::kBFloat16 && scales.empty()      ? SourceKind::kBFloat16
                : dtype == DType::kFloat16                       ? SourceKind::kFloat16
                : dtype == DType::kFloat8E4M3 && !scales.empty() ? SourceKind::kFloat8
                                                                 : SourceKind::kNone;
  return layout;
}

/// Tells parameters of phase 1 how their sources are stored and scaled.
template <class Params>
void set_layout(Params& params, SourceLayout layout, std::span<const ConstMatrix> scales = {}) {
  params.layout = layout;
  params.scales.set_columns(layout.scale_columns);
  for (size_t n = 0; n < scales.size(); ++n) {
    params.scales.set(static_cast<int64_t>(n), scales[n]);
  }
}

/// Launches `clusters` clusters of `plan.cluster` CTAs. `overlap`: see LaunchOptions.
void launch_clusters(Call& call, const void* kernel, const Plan& plan, int shared_bytes,
                     void** arguments, bool overlap);

/// Sets what of the plan the device decides: how many clusters are launched, as many as run at once
/// but no more than there are steps, how many steps each has, and whether the next step is brought
/// into L2. With few steps the window is dropped.
void share_out(Call& call, const void* kernel, int shared_bytes, int64_t tokens, Plan& plan);

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_
