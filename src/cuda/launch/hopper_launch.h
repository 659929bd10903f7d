// What the launchers of the Hopper kernels share: the choice of a plan, launching clusters, and
// checking rows.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "cuda/hopper_plan.h"
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

constexpr int groups_of_eight(int64_t count) { return static_cast<int>(ceil_div(count, 8)); }

/// Depths of the two rings that fit, the deepest first; false when not even the shallowest does.
/// `prefer_slots`: slots to have before more than three stages are taken.
inline bool choose_rings(Plan& plan, const Extents& extents, int prefer_slots, int min_stages) {
  const auto fits = [&](int stages, int slots) {
    plan.stages = stages;
    plan.slots = slots;
    return shared_map(plan, extents).bytes <= kSharedBytesMax;
  };
  for (int slots = prefer_slots; slots >= 1; --slots) {
    for (int stages = kRingMax; stages >= std::max(min_stages, 2); --stages) {
      if (fits(stages, slots)) {
        return true;
      }
    }
  }
  return false;
}

/// Chooses how a call is split. `tile_choices`: the kernels there are, by 16-column tiles of a
/// warp.
///
/// Fewer CTAs a cluster come first, as long as `wanted_stages` fit: a step is then longer, and with
/// it the time in which the exchange between CTAs can hide (about 1 us). Steps that would still be
/// shorter than that take several tokens.
template <class ExtentsOf>
Plan choose_plan(int64_t dim, std::span<const int> tile_choices, int prefer_slots,
                 int wanted_stages, int64_t token_rows, ExtentsOf extents_of) {
  // A multiprocessor's share of the memory bandwidth is 23 bytes a ns: 32 KB take 1.4 us.
  constexpr int64_t kStepBytes = 32 * 1024;
  const Extents extents = extents_of();
  for (int min_stages = wanted_stages; min_stages >= 2; --min_stages) {
    for (int cluster = 1; cluster <= kClusterMax; cluster *= 2) {
      std::optional<Plan> best;
      for (const int tiles : tile_choices) {
        Plan plan;
        plan.cluster = cluster;
        plan.columns = static_cast<int>(round_up(ceil_div(dim, cluster), 8));
        plan.tiles = tiles;
        plan.warps = static_cast<int>(ceil_div(plan.columns, 16 * tiles));
        const bool every_rank_works = (cluster - 1) * plan.columns < dim;
        if (plan.warps > kComputeWarps || !every_rank_works ||
            !choose_rings(plan, extents, prefer_slots, min_stages)) {
          continue;
        }
        for (int batch = 2;
             batch <= kBatchMax && token_rows * plan.columns * 2 * (batch / 2) < kStepBytes;
             batch *= 2) {
          Plan larger = plan;
          larger.batch = batch;
          if (choose_rings(larger, extents, prefer_slots, 3)) {
            plan = larger;
          }
        }
        if (!best || plan.padded_columns() < best->padded_columns() ||
            (plan.padded_columns() == best->padded_columns() && plan.warps > best->warps)) {
          best = plan;
        }
      }
      if (best) {
        return *best;
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

/// Launches `clusters` clusters of `plan.cluster` CTAs.
cudaError_t launch_clusters(const void* kernel, const Plan& plan, int shared_bytes,
                            cudaStream_t stream, void** arguments);

/// Clusters of this plan that run at once on the current device, but no more than there are steps.
cudaError_t resident_clusters(const void* kernel, const Plan& plan, int shared_bytes,
                              int64_t tokens, int* clusters);

/// An error of the CUDA runtime as a status.
Status launch_status(const char* op, const std::string& shapes, cudaError_t error);

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_HOPPER_LAUNCH_H_
