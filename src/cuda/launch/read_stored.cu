// `read` over a stored bank: a token a block or cluster, or of many tokens the next one's rows
// copied ahead, with the same bits.

#include "cuda/launch/read_stored.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#include "common/validate.h"
#include "cuda/kernels/read_ahead.cuh"
#include "cuda/kernels/read_rows.cuh"
#include "cuda/launch/dispatch.cuh"
#include "cuda/launch/read_ahead.h"
#include "cuda/launch/read_forward_params.h"

namespace flash_attn_res::cuda {
namespace {

using T = __nv_bfloat16;  // of all but the bank

/// The kernel of the form in `kForms` with these terms and chunks, if it has room for no more than
/// `kMaxStoredTerms`, and no more than `kMostChunks` chunks a thread.
template <const auto& kForms, int kMostChunks, class Kernel, class Stored,
          template <bool, bool> class Read, class Choose>
Kernel find_kernel(int terms, int chunks, const ReadVariant& variant, bool has_partial,
                   Choose&& kernel_of) {
  Kernel found = nullptr;
  const auto look_at = [&]<int kTerms, int kChunks>() {
    if constexpr (kTerms <= kMaxStoredTerms && kChunks <= kMostChunks) {
      if (kTerms == terms && kChunks == chunks) {
        const auto of = [&](auto read) {
          found = kernel_of(std::integral_constant<int, kTerms>(),
                            std::integral_constant<int, kChunks>(), read);
        };
        if (!has_partial) {
          // Phase 1 with one query over float8 has a faster kernel (hopper_attend_few.cuh).
          if constexpr (std::is_same_v<Stored, __half>) {
            of(AllStoredRead<Read<false, false>, Stored>());
          }
        } else if (!variant.norm) {
          of(StoredRead<Read<false, false>, Stored>());
        } else if (!variant.update) {
          of(StoredRead<Read<true, false>, Stored>());
        } else {
          of(StoredRead<Read<true, true>, Stored>());
        }
      }
    }
  };
  const auto look = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kForms[kIndex].terms, kForms[kIndex].chunks>(), ...);
  };
  look(std::make_index_sequence<std::size(kForms)>());
  return found;
}

/// Whether rows can be read in whole chunks.
bool is_aligned(const ConstMatrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % (kChunk * size_of(matrix.dtype)) == 0 &&
         (matrix.rows <= 1 || matrix.stride % kChunk == 0);
}

StoredReadParams make_params(const ReadArgs& args) {
  StoredReadParams params = {};
  static_cast<ReadRowsParams&>(params) =
      make_read_params<kReadRowsMaxTerms + kReadRowsMaxUpdates>(args);
  ScaledTable<kMaxStoredTerms> table = {};
  for (size_t n = 0; n < args.source_scales.size(); ++n) {
    table.set_scale(static_cast<int>(n), args.source_scales[n]);
    params.scales[n] = table.scale[n];
  }
  params.scale_stride = table.scale_stride;
  params.scale_shift = table.scale_shift;
  return params;
}

/// Puts the last term into the last of `slots`, with its scales if it has any.
void place_with_scales(StoredReadParams& params, int slots) {
  place_in_slots(params, slots);
  params.scales[slots - 1] = params.scales[params.num_terms - 1];
}

/// Runs a call that is a usual one of this variant.
template <class Stored>
bool run(Call& call, const ReadArgs& args, const ReadVariant& variant, FloatView lse) {
  const int64_t K = read_terms(args);
  const int64_t tokens = args.x.rows;
  const int64_t D = args.x.cols;
  StoredReadParams params = make_params(args);
  params.lse = lse;
  const auto sums = [&](int terms) { return floats_of_sums(D, terms, /*quantized=*/false); };
  const DeviceLimits& limits = call.limits();
  if (is_many(tokens, K, variant.update, limits)) {
    // The bytes are those of rows of 16 bits: fewer do.
    const ReadAheadPolicy policy = choose_read_ahead(K, variant.update ? 1 : 0, D, limits, sums);
    using Kernel = void (*)(ReadAheadParams<StoredReadParams>);
    const Kernel kernel = find_kernel<kReadAhead, 4, Kernel, Stored, UsualReadOfMany>(
        policy.terms, policy.chunks, variant, params.has_partial,
        [](auto terms, auto chunks, auto read) -> Kernel {
          return read_ahead_kernel<T, terms.value, chunks.value, false, decltype(read)>;
        });
    if (kernel != nullptr) {
      place_with_scales(params, policy.terms);
      launch_ahead(call, kernel, policy, tokens, params);
      return true;
    }
  }
  // One chunk a thread, as few tokens have it: with two, scales and float16 rows of nine sources do
  // not fit the registers.
  const ReadRowsPolicy policy =
      choose_read_rows(/*half=*/true, K, D, /*clusters=*/true, std::min(tokens, kReadFewTokens));
  using Kernel = void (*)(StoredReadParams);
  const Kernel kernel = find_kernel<kReadRowsHalf, 1, Kernel, Stored, UsualRead>(
      policy.terms, policy.chunks, variant, params.has_partial,
      [](auto terms, auto chunks, auto read) -> Kernel {
        return read_rows_kernel<T, terms.value, chunks.value, false, false, decltype(read)>;
      });
  const int64_t blocks =
      kernel == nullptr ? 0 : ceil_div(tokens, policy.tokens) * int64_t{policy.cluster};
  if (blocks == 0 || blocks != grid_blocks(blocks) ||
      (policy.cluster > 1 && !call.compiled_for(9, kernel))) {
    return false;
  }
  place_with_scales(params, policy.terms);
  call.launch_with(
      {.cluster = policy.cluster, .overlap = true}, kernel, dim3(grid_blocks(blocks)),
      dim3(static_cast<unsigned>(policy.threads), static_cast<unsigned>(policy.tokens)),
      int64_t{policy.tokens} * sums(policy.terms) * 4, params);
  return true;
}

}  // namespace

bool run_read_stored(Call& call, const ReadArgs& args, FloatView lse) {
  // With one chunk a thread only a cluster has room for every width: without clusters a token could
  // be served among many and streamed among few, and have other bits.
  if (call.limits().major < 9 || args.source_scales.empty() || read_terms(args) > kMaxStoredTerms ||
      args.phase1_out.present() || !std::ranges::all_of(args.sources, is_aligned)) {
    return false;
  }
  // All but the bank, as if it were the whole call.
  ReadArgs others = args;
  others.sources = {};
  others.source_scales = {};
  UniformType storage = storage_of_rows(others);
  storage.add(value_view(args.x));
  const ReadVariant variant = variant_of(others, storage);
  const bool has_partial = args.partial.present() || !args.updates.empty();
  if (!variant.usual || (!has_partial && variant.norm) || storage.get() != DType::kBFloat16 ||
      args.x.rows != grid_blocks(args.x.rows)) {
    return false;
  }
  switch (args.sources[0].dtype) {
    case DType::kFloat8E4M3:
      return run<__nv_fp8_e4m3>(call, args, variant, lse);
    case DType::kFloat16:
      return run<__half>(call, args, variant, lse);
    default:
      return false;
  }
}

}  // namespace flash_attn_res::cuda
