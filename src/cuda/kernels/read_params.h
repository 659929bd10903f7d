// Parameters of the kernels of `read` and `read_backward`, shared by their forms.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_PARAMS_H_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_PARAMS_H_

#include <type_traits>

#include "cuda/device/params.h"
#include "cuda/policy.h"

namespace flash_attn_res::cuda {

/// Rows of one token: phase 1, sources, partial sum, and two more updates.
inline constexpr int kMaxReadRows = static_cast<int>(kMaxSources) + 4;

/// Rows of the staged kernel's smaller table: a launch copies its parameters.
inline constexpr int kMaxStagedRows = 64;

/// Most softmax terms of the staged kernel: two a lane.
inline constexpr int kMaxStagedTerms = 64;

/// The table of the kernels that take rows one after the other: it alone has scales in it.
template <int kRows>
using ReadTable = std::conditional_t<kRows == kMaxReadRows, ScaledTable<kRows>, ValueTable<kRows>>;

template <int kRows>
struct ReadParams {
  // The K terms (phase 1, sources, partial sum) and then the further updates. Without a partial sum
  // the first update stands in its place.
  ReadTable<kRows> rows;
  int num_terms;     // K
  int num_rows;      // K + further updates
  int first_key;     // 1 when term 0 is phase 1, which has no key; else 0
  bool has_partial;  // the last term is the partial sum

  FloatView phase1_lse;  // [1, T]
  FloatView query;       // [1, R]; absent when K == 1
  bool query_aligned;    // whole chunks of columns meet 16-byte pieces of it
  float scale, eps;
  float inv_key_dim;   // 1 / R
  float inv_dim;       // 1 / D
  int dim, key_begin;  // D, D - R

  bool norm;
  bool round_mix;
  ValueView norm_weight;  // [1, D], optional
  float norm_eps;

  ValueView x, partial_out, mix;     // [T, D]
  FloatView logits, inv_rms, probs;  // [T, K], optional
  FloatView mix_inv_rms;             // [1, T], optional
  FloatView lse;                     // [1, T], optional: of `attend` with one query
  ValueView snapshot;                // [T, D], a copy of partial_out, optional
  FloatView x_scale;                 // [T, groups] of a quantised x
  int x_scale_groups;
  bool x_scale_power_of_two;
  int64_t tokens;
};

/// Those of the kernels that have room for 32 terms.
using ReadRowsParams = ReadParams<kReadRowsMaxTerms + kReadRowsMaxUpdates>;

/// Terms of a read over a stored bank: its sources, and the partial sum where there is one.
inline constexpr int kMaxStoredTerms = 10;

/// The same over a stored bank: scales of its sources, by slot.
struct StoredReadParams : ReadRowsParams {
  const uint8_t* scales[kMaxStoredTerms];  // [T, D / W] float8_e8m0
  int64_t scale_stride;                    // elements, the same for all
  int scale_shift;                         // 2^scale_shift columns share a scale

  /// Where token t's scales of slot s begin.
  FLASH_ATTN_RES_HOST_DEVICE const uint8_t* scales_of(int s, int64_t t) const {
    return scales[s] + t * scale_stride;
  }
};

template <int kRows>
struct ReadBackwardParams {
  ReadTable<kRows> rows;  // the K terms
  int num_terms;
  int first_key;
  bool has_partial;

  FloatView query;  // [1, R]
  float scale;
  float inv_key_dim;  // 1 / R
  int dim, key_begin;

  bool norm;
  bool round_mix;
  DType mix_dtype;            // of x, for round_mix
  ValueView norm_weight;      // [1, D], optional
  FloatView logits, inv_rms;  // [T, K]
  FloatView mix_inv_rms;      // [1, T]

  ValueView dx, dmix, dpartial_out;  // [T, D], optional

  ValueView dphase1_out, dh, dpartial;  // [T, D], optional
  FloatView dphase1_lse, gate;          // [1, T], optional
  ValueTable<kRows> dsources;           // N x [T, D]
  bool has_dsources;
  bool accumulate;

  float* dquery_partials;   // [blocks, D], optional; columns before the key hold zeros
  float* dweight_partials;  // [blocks, D], optional
  float* dh_scratch;        // streamed kernel: [blocks, D]
  int64_t tokens;
  int stages;  // staged kernel: tiles in the ring
};

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_PARAMS_H_
