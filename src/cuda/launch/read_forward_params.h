// How `read` becomes kernel parameters: shared by its launchers.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_READ_FORWARD_PARAMS_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_READ_FORWARD_PARAMS_H_

#include <cstdint>

#include "common/validate.h"
#include "cuda/kernels/read_params.h"
#include "cuda/kernels/read_token.cuh"
#include "cuda/launch/launch.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {

/// Adds a row behind those that the table holds.
template <int kRows>
void append_row(ReadParams<kRows>& params, const ConstMatrix& matrix) {
  params.rows.set(params.num_rows++, value_view(matrix));
}

template <int kRows>
ReadParams<kRows> make_read_params(const ReadArgs& args) {
  const int64_t D = args.x.cols;
  const int64_t R = args.query.present() ? args.query.cols : D;
  ReadParams<kRows> p = {};
  p.first_key = args.phase1_out.present() ? 1 : 0;
  p.has_partial = args.partial.present() || !args.updates.empty();
  if (args.phase1_out.present()) {
    append_row(p, args.phase1_out);
  }
  for (size_t n = 0; n < args.sources.size(); ++n) {
    append_row(p, args.sources[n]);
    if constexpr (kRows == kMaxReadRows) {
      if (!args.source_scales.empty()) {
        p.rows.set_scale(p.num_rows - 1, args.source_scales[n]);
      }
    }
  }
  if (args.partial.present()) {
    append_row(p, args.partial);
  }
  p.num_terms = static_cast<int>(read_terms(args));
  for (const ConstMatrix& update : args.updates) {
    append_row(p, update);
  }
  p.phase1_lse = float_view(args.phase1_lse);
  p.query = float_view(args.query);
  // Column 8 i of a row meets element 8 i - (D - R) of the query.
  p.query_aligned =
      (reinterpret_cast<uintptr_t>(args.query.data) - static_cast<uintptr_t>(D - R) * 4) % 16 == 0;
  p.scale = static_cast<float>(args.scale);
  p.eps = static_cast<float>(args.eps);
  p.inv_key_dim = 1.0f / static_cast<float>(R);
  p.inv_dim = 1.0f / static_cast<float>(D);
  p.dim = static_cast<int>(D);
  p.key_begin = static_cast<int>(D - R);
  p.norm = args.norm == OutputNorm::kRms;
  p.round_mix = args.mix_rounding == MixRounding::kStorage;
  p.norm_weight = value_view(args.norm_weight);
  p.norm_eps = static_cast<float>(args.norm_eps);
  p.x = value_view(args.x);
  p.partial_out = value_view(args.partial_out);
  p.mix = value_view(args.mix);
  p.logits = float_view(args.logits);
  p.inv_rms = float_view(args.inv_rms);
  p.probs = float_view(args.probs);
  p.mix_inv_rms = float_view(args.mix_inv_rms);
  p.snapshot = value_view(args.snapshot);
  p.x_scale = float_view(args.x_scale);
  p.x_scale_groups = static_cast<int>(args.x_scale.cols);
  p.x_scale_power_of_two = args.scale_rounding == ScaleRounding::kPowerOfTwo;
  p.tokens = args.x.rows;
  return p;
}

/// Which storage type serves the rows, and whether all of them are aligned.
inline UniformType storage_of_rows(const ReadArgs& args) {
  UniformType storage(args.x.cols);
  storage.add(value_view(args.phase1_out));
  for (const ConstMatrix& source : args.sources) {
    storage.add(value_view(source));
  }
  if (!args.source_scales.empty()) {
    storage.add_scaled();
  }
  storage.add(value_view(args.partial));
  for (const ConstMatrix& update : args.updates) {
    storage.add(value_view(update));
  }
  // The new partial sum takes the place of a row.
  storage.add(value_view(args.partial_out));
  return storage;
}

/// What kernels are compiled for beside their form.
struct ReadVariant {
  bool merge;         // two terms, the first a phase-1 result
  bool usual;         // UsualRead serves the call
  bool norm, update;  // of a usual call
};

/// `storage` is that of the rows and of x.
inline ReadVariant variant_of(const ReadArgs& args, const UniformType& storage) {
  const bool norm = args.norm == OutputNorm::kRms;
  // Without a partial sum the first update is the last term.
  const size_t in_sum = args.updates.size() + (args.partial.present() ? 1 : 0);
  const bool update = args.partial_out.present();
  const bool sum = update ? in_sum == 2 : args.updates.empty();
  const bool weight =
      norm ? value_view(args.norm_weight).vectorized && args.mix_rounding == MixRounding::kFloat32
           : !update;
  const bool query = args.query.present() && args.query.cols == args.x.cols &&
                     reinterpret_cast<uintptr_t>(args.query.data) % 16 == 0;
  return {.merge = read_terms(args) == 2 && args.phase1_out.present(),
          .usual = is_half(storage.get()) && !args.x_scale.present() && !args.mix.present() &&
                   !args.snapshot.present() && sum && weight && query,
          .norm = norm,
          .update = update};
}

/// Floats of a token's sums in shared memory, by a kernel with room for so many terms.
inline int64_t floats_of_sums(int64_t dim, int terms, bool quantized) {
  const ReadSumsLayout layout = {static_cast<unsigned>(ceil_div(dim, kWarp * kChunk)),
                                 static_cast<unsigned>(terms), quantized};
  return layout.floats();
}

/// Puts the last term into the last of `slots`, and the further updates behind it.
inline void place_in_slots(ReadRowsParams& params, int slots) {
  const int shift = slots - params.num_terms;
  for (int row = params.num_rows - 1; shift > 0 && row >= params.num_terms - 1; --row) {
    params.rows.copy(row, row + shift);
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_READ_FORWARD_PARAMS_H_
