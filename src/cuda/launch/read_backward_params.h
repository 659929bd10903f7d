// How `read_backward` becomes kernel parameters: shared by the general and the Hopper launcher.

#ifndef FLASH_ATTN_RES_CUDA_LAUNCH_READ_BACKWARD_PARAMS_H_
#define FLASH_ATTN_RES_CUDA_LAUNCH_READ_BACKWARD_PARAMS_H_

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/read_params.h"
#include "cuda/launch/launch.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::cuda {

struct ReadBackwardShape {
  int64_t T, D, R, K;
  int64_t padded_dim;  // floats of a row of partial sums
  int64_t max_blocks;

  explicit ReadBackwardShape(const ReadBackwardArgs& args)
      : T(args.logits.rows),
        D(args.phase1_out.present()
              ? args.phase1_out.cols
              : (args.sources.empty() ? args.partial.cols : args.sources[0].cols)),
        R(args.query.present() ? args.query.cols : D),
        K(args.logits.cols),
        padded_dim(round_up(D, kChunk)),
        max_blocks(std::min(T, max_read_backward_blocks(D))) {}
};

/// Pieces of the workspace.
struct ReadBackwardScratch {
  float* dquery;   // [blocks, padded D]
  float* dweight;  // [blocks, padded D]
  float* dh;       // [blocks, padded D], of the streamed kernel
  int* issued;     // a counter of the Hopper kernel

  ReadBackwardScratch(Workspace& workspace, const ReadBackwardShape& shape,
                      const ReadBackwardArgs& args) {
    const int64_t count = shape.max_blocks * shape.padded_dim;
    dquery = args.dquery.present() ? workspace.floats(count) : nullptr;
    dweight = args.dnorm_weight.present() ? workspace.floats(count) : nullptr;
    dh = workspace.floats(count);
    issued = reinterpret_cast<int*>(workspace.floats(1));
  }
};

template <int kRows>
ReadBackwardParams<kRows> make_read_backward_params(const ReadBackwardArgs& args,
                                                    const ReadBackwardShape& shape,
                                                    const ReadBackwardScratch& scratch) {
  ReadBackwardParams<kRows> p = {};
  p.first_key = args.phase1_out.present() ? 1 : 0;
  p.has_partial = args.partial.present();
  if (args.phase1_out.present()) {
    p.rows.set(p.num_terms++, value_view(args.phase1_out));
  }
  for (size_t n = 0; n < args.sources.size(); ++n) {
    p.rows.set(p.num_terms++, value_view(args.sources[n]));
    if constexpr (kRows == kMaxReadRows) {
      if (!args.source_scales.empty()) {
        p.rows.set_scale(p.num_terms - 1, args.source_scales[n]);
      }
    }
  }
  if (args.partial.present()) {
    p.rows.set(p.num_terms++, value_view(args.partial));
  }
  p.query = float_view(args.query);
  p.scale = static_cast<float>(args.scale);
  p.inv_key_dim = 1.0f / static_cast<float>(shape.R);
  p.dim = static_cast<int>(shape.D);
  p.key_begin = static_cast<int>(shape.D - shape.R);
  p.norm = args.norm == OutputNorm::kRms;
  p.round_mix = args.mix_rounding == MixRounding::kStorage;
  p.mix_dtype = args.dx.dtype;
  p.norm_weight = value_view(args.norm_weight);
  p.logits = float_view(args.logits);
  p.inv_rms = float_view(args.inv_rms);
  p.mix_inv_rms = float_view(args.mix_inv_rms);
  p.dx = value_view(args.dx);
  p.dmix = value_view(args.dmix);
  p.dpartial_out = value_view(args.dpartial_out);
  p.dphase1_out = value_view(args.dphase1_out);
  p.dh = value_view(args.dh);
  p.dpartial = value_view(args.dpartial);
  p.dphase1_lse = float_view(args.dphase1_lse);
  p.gate = float_view(args.gate);
  for (size_t n = 0; n < args.dsources.size(); ++n) {
    p.dsources.set(static_cast<int>(n), value_view(args.dsources[n]));
  }
  p.has_dsources = !args.dsources.empty();
  p.accumulate = args.accumulate_dsources;
  p.dquery_partials = scratch.dquery;
  p.dweight_partials = scratch.dweight;
  p.dh_scratch = scratch.dh;
  p.tokens = shape.T;
  return p;
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_LAUNCH_READ_BACKWARD_PARAMS_H_
