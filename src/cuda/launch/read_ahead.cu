// The usual `read` of many tokens: rows copied ahead.

#include "cuda/launch/read_ahead.h"

#include <cstdint>
#include <iterator>
#include <utility>

#include "common/validate.h"
#include "cuda/kernels/read_ahead.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/read_forward_params.h"

namespace flash_attn_res::cuda {
namespace {

using AheadKernel = void (*)(ReadAheadParams);

/// What a kernel is compiled for beside its form.
struct Variant {
  bool merge, norm, update;
};

/// The kernel of a policy. An update without a norm is nobody's usual read.
template <class T>
AheadKernel find_kernel(const ReadAheadPolicy& policy, const Variant& variant) {
  AheadKernel found = nullptr;
  const auto look_at = [&]<int kTerms, int kChunks>() {
    const auto choose = [&]<bool kMerge>() {
      if (!variant.norm) {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualRead<false, false>>;
      } else if (!variant.update) {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualRead<true, false>>;
      } else {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualRead<true, true>>;
      }
    };
    if (kTerms == policy.terms && kChunks == policy.chunks) {
      if (kTerms == 2 && variant.merge) {
        choose.template operator()<kTerms == 2>();
      } else {
        choose.template operator()<false>();
      }
    }
  };
  const auto look = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kReadAhead[kIndex].terms, kReadAhead[kIndex].chunks>(), ...);
  };
  look(std::make_index_sequence<std::size(kReadAhead)>());
  return found;
}

/// Whether this is what the kernels take for granted, apart from the widths.
bool is_usual(const ReadArgs& args, const UniformType& storage) {
  const bool norm = args.norm == OutputNorm::kRms;
  const size_t updates =
      args.updates.size() - (args.partial.present() || args.updates.empty() ? 0 : 1);
  return is_half(storage.get()) && !args.x_scale.present() && !args.mix.present() &&
         !args.snapshot.present() && updates == (args.partial_out.present() ? 1 : 0) &&
         args.query.present() && args.query.cols == args.x.cols &&
         (norm ? args.mix_rounding == MixRounding::kFloat32 &&
                     value_view(args.norm_weight).vectorized
               : updates == 0);
}

}  // namespace

bool run_read_ahead(Call& call, const ReadArgs& args, UniformType storage) {
  // With fewer tokens for each multiprocessor a token is better spread over several of them.
  constexpr int64_t kLeastTokens = 8;
  const int64_t T = args.x.rows;
  const int64_t D = args.x.cols;
  const DeviceLimits& limits = call.limits();
  storage.add(value_view(args.x));
  if (limits.major < 8 || T < kLeastTokens * limits.multiprocessors || T != grid_blocks(T) ||
      !is_usual(args, storage)) {
    return false;
  }
  ReadAheadParams params = {};
  params.read = make_read_params<kReadRowsMaxTerms + kReadRowsMaxUpdates>(args);
  const ReadRowsParams& read = params.read;
  const int updates = read.num_rows - read.num_terms;
  const auto sums = [&](int terms) {
    return int64_t{ReadSumsLayout{static_cast<unsigned>(ceil_div(D, kWarp * kChunk)),
                                  static_cast<unsigned>(terms), false}
                       .floats()};
  };
  const ReadAheadPolicy policy = choose_read_ahead(read.num_terms, updates, D, limits, sums);
  if (policy.terms == 0 || !read.query_aligned) {
    return false;
  }
  const Variant variant = {.merge = read.num_terms == 2 && read.first_key == 1,
                           .norm = read.norm,
                           .update = updates > 0};
  const AheadKernel kernel = storage.get() == DType::kBFloat16
                                 ? find_kernel<__nv_bfloat16>(policy, variant)
                                 : find_kernel<__half>(policy, variant);
  place_in_slots(params.read, policy.terms);
  const unsigned resident = call.resident_blocks(kernel, policy.threads, policy.shared_bytes, T);
  const ReadAheadBands bands = read_ahead_bands(T, resident, limits.multiprocessors);
  params.stride = bands.stride;
  params.count = bands.count;
  call.launch_with({.overlap = true}, kernel, dim3(bands.stride * bands.bands),
                   dim3(static_cast<unsigned>(policy.threads)), policy.shared_bytes, params);
  return true;
}

}  // namespace flash_attn_res::cuda
