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

using AheadKernel = void (*)(ReadAheadParams<ReadRowsParams>);

/// The kernel of a policy.
template <class T>
AheadKernel find_kernel(const ReadAheadPolicy& policy, const ReadVariant& variant) {
  AheadKernel found = nullptr;
  const auto look_at = [&]<int kTerms, int kChunks>() {
    const auto choose = [&]<bool kMerge>() {
      if (!variant.norm) {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualReadOfMany<false, false>>;
      } else if (!variant.update) {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualReadOfMany<true, false>>;
      } else {
        found = read_ahead_kernel<T, kTerms, kChunks, kMerge, UsualReadOfMany<true, true>>;
      }
    };
    if (kTerms == policy.terms && kChunks == policy.chunks) {
      variant.merge ? choose.template operator()<kTerms == 2>()
                    : choose.template operator()<false>();
    }
  };
  const auto look = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kReadAhead[kIndex].terms, kReadAhead[kIndex].chunks>(), ...);
  };
  look(std::make_index_sequence<std::size(kReadAhead)>());
  return found;
}

}  // namespace

bool run_read_ahead(Call& call, const ReadArgs& args, UniformType storage, FloatView lse) {
  const int64_t T = args.x.rows;
  const int64_t D = args.x.cols;
  const DeviceLimits& limits = call.limits();
  storage.add(value_view(args.x));
  const ReadVariant variant = variant_of(args, storage);
  if (!is_many(T, read_terms(args), variant.update, limits) || T != grid_blocks(T) ||
      !variant.usual) {
    return false;
  }
  ReadRowsParams params = make_read_params<kReadRowsMaxTerms + kReadRowsMaxUpdates>(args);
  params.lse = lse;
  const auto sums = [&](int terms) { return floats_of_sums(D, terms, /*quantized=*/false); };
  const ReadAheadPolicy policy =
      choose_read_ahead(params.num_terms, variant.update ? 1 : 0, D, limits, sums);
  const AheadKernel kernel = storage.get() == DType::kBFloat16
                                 ? find_kernel<__nv_bfloat16>(policy, variant)
                                 : find_kernel<__half>(policy, variant);
  if (kernel == nullptr) {
    return false;
  }
  place_in_slots(params, policy.terms);
  launch_ahead(call, kernel, policy, T, params);
  return true;
}

}  // namespace flash_attn_res::cuda
