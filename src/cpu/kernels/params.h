// What the host hands to a kernel: plain structs, filled in by backend.cpp.
//
// They repeat the public argument structs with pointers in place of std::span and floats in place
// of doubles, because code compiled for one instruction set must not call inline functions that
// other code shares (simd/target.h says why). Absent views have dtype kNone. Scratch is one
// chunk's own slice of the workspace; every array in it starts on a cache line.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_PARAMS_H_
#define FLASH_ATTN_RES_CPU_KERNELS_PARAMS_H_

#include <stdint.h>

#include "flash_attn_res/types.h"

namespace flash_attn_res::cpu {

/// Elements of a row that are worked on in turn. Rows that many products share (u, dh, du, v of
/// attend) are kept as (pieces, rows, kPiece) floats: one piece of all of them is contiguous. In
/// place, rows of a power of two bytes would all fall on the same few sets of the L1 cache and
/// evict each other.
inline constexpr int64_t kPiece = 256;

/// Elements of a row whose products with another row are summed on their own.
inline constexpr int64_t kRun = 4 * kPiece;

/// Tokens whose parts of a parameter gradient are summed on their own before they join the sum of
/// the chunk: one chain of float32 additions over a whole chunk loses a factor of its square root.
inline constexpr int64_t kTokensPerSum = 16;

/// attend: see attend.h.
struct AttendParams {
  int64_t T, D, R, N, S;
  const ConstMatrix* sources;        // (N) views of [T, D]
  const ConstMatrix* source_scales;  // (N) views of [T, 1] or [T, groups], or null
  ConstMatrix queries;               // [S, R]
  float scale;
  float eps;
  const Matrix* out;  // (S) views of [T, D]
  Matrix lse;         // [S, T]
  Matrix logits;      // [T, S * N]
  Matrix inv_rms;     // [T, N]
  Matrix probs;       // [T, S * N]
  bool stream;        // results go past the caches
};

struct AttendScratch {
  float* logits;   // (S,N)
  float* probs;    // (S,N)
  float* inv_rms;  // (N)
  float* lse;      // (S)
  float* queries;  // (pieces,S,kPiece)  u
  float* v_plain;  // (pieces,N,kPiece)  the token's sources before the key slice
  float* v_key;    // (pieces,N,kPiece)  the token's sources on the key slice
};

struct AttendBackwardParams {
  int64_t T, D, R, N, S;
  const ConstMatrix* sources;        // (N) views of [T, D]
  const ConstMatrix* source_scales;  // (N) views of [T, 1] or [T, groups], or null
  ConstMatrix queries;               // [S, R]
  float scale;
  ConstMatrix lse;          // [S, T]
  ConstMatrix logits;       // [T, S * N]
  ConstMatrix inv_rms;      // [T, N]
  const ConstMatrix* dout;  // (S) views of [T, D], or null
  ConstMatrix gate;         // [S, T]
  ConstMatrix dlse;         // [S, T]
  const Matrix* dsources;   // (N) views of [T, D], or null
  bool accumulate_dsources;
  bool stream;
};

struct AttendBackwardScratch {
  float* probs;       // (S,N)  p, then p * gate: the factor of dout in dv
  float* dp;          // (S,N)  dp, then scale * dlogit * r: the factor of u in dv and of k in du
  float* dp_plain;    // (S,N)  the part of dp before the key slice
  float* key_factor;  // (N)    -sum_s dlogit logit r^2 / R: the factor of k in dv
  float* queries;     // (pieces,S,kPiece)  u
  float* dh_plain;    // (pieces,S,kPiece)  dout before the key slice
  float* dh_key;      // (pieces,S,kPiece)  dout on the key slice
  float* v_plain;     // (pieces,N,kPiece)  the sources before the key slice
  float* v_key;       // (pieces,N,kPiece)  the sources on the key slice
  float* dqueries;    // (pieces,S,kPiece)  this chunk's part of du, or null
  float* recent;      // (pieces,S,kPiece)  that of its last few tokens (see kTokensPerSum), or null
};

/// read: see read.h.
struct ReadParams {
  int64_t T, D, R, N, K;
  ConstMatrix phase1_out;            // [T, D]
  ConstMatrix phase1_lse;            // [1, T]
  const ConstMatrix* sources;        // (N) views of [T, D]
  const ConstMatrix* source_scales;  // (N) views of [T, 1] or [T, groups], or null
  ConstMatrix partial;               // [T, D]
  const ConstMatrix* updates;        // (num_updates) views of [T, D]
  int64_t num_updates;
  ConstMatrix query;  // [1, R]
  float scale;
  float eps;
  bool normed;              // OutputNorm::kRms
  ConstMatrix norm_weight;  // [1, D]
  float norm_eps;
  bool round_mix;      // MixRounding::kStorage
  DType mix_dtype;     // what it rounds to
  Matrix x;            // [T, D]
  Matrix x_scale;      // [T, 1] or [T, groups], with x in float8 and only then
  bool power_of_two;   // ScaleRounding::kPowerOfTwo
  Matrix partial_out;  // [T, D]
  Matrix snapshot;     // [T, D], of the dtype of the sum
  Matrix mix;          // [T, D]
  Matrix logits;       // [T, K]
  Matrix inv_rms;      // [T, K]
  Matrix mix_inv_rms;  // [1, T]
  Matrix probs;        // [T, K]
  bool stream;
};

struct ReadScratch {
  float* logits;         // (K)
  float* probs;          // (K)
  float* inv_rms;        // (K)
  float* query;          // (R)  u as packed floats
  float* mix;            // (D)  h, where the output norm needs it twice
  float* norm_weight;    // (D)  g as packed floats
  float* x;              // (D)  x in float32, where it is quantised
  unsigned char* total;  // (D)  partial' in its storage dtype
};

struct ReadBackwardParams {
  int64_t T, D, R, N, K;
  ConstMatrix phase1_out;            // [T, D]
  const ConstMatrix* sources;        // (N) views of [T, D]
  const ConstMatrix* source_scales;  // (N) views of [T, 1] or [T, groups], or null
  ConstMatrix partial;               // [T, D]
  ConstMatrix query;                 // [1, R]
  float scale;
  bool normed;
  ConstMatrix norm_weight;  // [1, D]
  bool round_mix;
  ConstMatrix logits;        // [T, K]
  ConstMatrix inv_rms;       // [T, K]
  ConstMatrix mix_inv_rms;   // [1, T]
  ConstMatrix dx;            // [T, D]
  ConstMatrix dmix;          // [T, D]
  ConstMatrix dpartial_out;  // [T, D]
  Matrix dphase1_out;        // [T, D]
  Matrix dphase1_lse;        // [1, T]
  Matrix dh;                 // [T, D]
  Matrix gate;               // [1, T]
  const Matrix* dsources;    // (N) views of [T, D], or null
  bool accumulate_dsources;
  Matrix dpartial;  // [T, D]
  bool stream;
};

struct ReadBackwardScratch {
  float* logits;        // (K)
  float* probs;         // (K)
  float* dp;            // (K)  dp, then scale * dlogit * r
  float* key_factor;    // (K)  -dlogit logit r^2 / R
  float* query;         // (R)  u as packed floats
  float* mix;           // (D)  h
  float* dh;            // (D)
  float* dquery;        // (R)  this chunk's part of du, whole pieces, or null
  float* recent_query;  // (R)  that of its last few tokens (see kTokensPerSum), or null
  float* norm_weight;   // (D)  g as packed floats
  float* dnorm_weight;  // (D)  this chunk's part of dg, or null
  float* recent_norm;   // (D)  that of its last few tokens, or null
};

/// quantize: see quantize.h.
struct QuantizeParams {
  int64_t T, D;
  const ConstMatrix* terms;  // (num_terms) views of [T, D]
  int num_terms;
  Matrix out;    // [T, D]
  Matrix scale;  // [T, 1] or [T, groups]
};

/// Sums the chunks' parts, in the order of the chunks, into one matrix of results. A part holds
/// (pieces, rows, kPiece) floats.
struct ReduceParams {
  const float* parts;   // part 0; the others follow
  int64_t num_parts;    // may be 0
  int64_t part_stride;  // floats from one part to the next
  Matrix result;        // [rows, cols]
  bool accumulate;
};

/// The kernels of one instruction set. [begin, end) are tokens; reduce does one piece of one row.
struct KernelTable {
  void (*attend)(const AttendParams&, const AttendScratch&, int64_t begin, int64_t end);
  void (*attend_backward)(const AttendBackwardParams&, const AttendBackwardScratch&, int64_t begin,
                          int64_t end);
  void (*read)(const ReadParams&, const ReadScratch&, int64_t begin, int64_t end);
  void (*read_backward)(const ReadBackwardParams&, const ReadBackwardScratch&, int64_t begin,
                        int64_t end);
  void (*reduce)(const ReduceParams&, int64_t row, int64_t piece);
  void (*quantize)(const QuantizeParams&, int64_t begin, int64_t end);
};

}  // namespace flash_attn_res::cpu

#endif  // FLASH_ATTN_RES_CPU_KERNELS_PARAMS_H_
