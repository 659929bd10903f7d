// What the threads of a token do once its rows are in their registers, the same in every kernel
// that keeps them there:
//
//   partial' = round(partial + updates)                 stored, and used below as rounded
//   r_j = rsqrt(mean(k_j^2) + eps)    logit_j = scale r_j <u, k_j>, or the phase-1 lse
//   p = softmax(logit)                h = sum_j p_j z_j
//   k_j[d] = scale_j[d / W] q_j[d]    of a stored bank, W = 128 or D
//   x = h, or h rsqrt(mean(h^2) + norm_eps) g; stored as it is, or quantised (device/quantize.cuh)
//
// sums  float32, over D in the order of read_sums.cuh: a token has the same bits however it is
//       spread over threads and blocks

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_TOKEN_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_TOKEN_CUH_

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/device/chunk.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_chunk.cuh"
#include "cuda/kernels/read_params.h"
#include "cuda/kernels/read_sums.cuh"
#include "cuda/policy.h"

namespace flash_attn_res::cuda {

/// Shared memory of one token: sums of all its segments, also those of other blocks.
struct ReadSumsLayout {
  unsigned segments;
  unsigned terms;  // that the kernel is compiled for
  bool quantized;

  /// Floats before the sums of the norm: (segments, terms, 2), square and dot of each term.
  FLASH_ATTN_RES_HOST_DEVICE unsigned norm_sums() const { return segments * terms * 2; }
  /// Floats before the largest absolute values of x: (segments).
  FLASH_ATTN_RES_HOST_DEVICE unsigned largest() const { return norm_sums() + segments; }
  FLASH_ATTN_RES_HOST_DEVICE unsigned floats() const {
    return (largest() + (quantized ? segments : 0) + 1) & ~1u;
  }
};

/// Where the threads of a token meet.
enum class Meeting { kTerms, kNorm, kLargest };

/// What is known of a call when a kernel is compiled: nothing ..
struct AnyRead {
  using Params = ReadRowsParams;
  using Stored = void;
  static constexpr bool kUsual = false, kWhole = false, kEarly = true;
  static constexpr bool kStored = false, kAllStored = false;
};
/// .. or that it is one of training or of inference: keys as long as rows, x in the rows' type, and
/// no mixture, snapshot or rounded mixture beside it. A lone token does not wait for u and g when
/// they are used: they come with its rows.
template <bool kHasNorm, bool kHasUpdate>
struct UsualRead {
  using Params = ReadRowsParams;
  using Stored = void;
  static constexpr bool kUsual = true, kWhole = false, kEarly = true;
  static constexpr bool kStored = false, kAllStored = false;
  static constexpr bool kNorm = kHasNorm;      // with a weight
  static constexpr bool kUpdate = kHasUpdate;  // one update is added to the last term
};

/// The same of many tokens whose rows divide evenly among the threads: others are at work while one
/// waits, and registers are worth more.
template <bool kHasNorm, bool kHasUpdate>
struct UsualReadOfMany : UsualRead<kHasNorm, kHasUpdate> {
  static constexpr bool kWhole = true, kEarly = false;
};

/// Each of them over a stored bank: all terms but the last are of this type, float8 or float16,
/// with scales.
template <class Read, class Type>
struct StoredRead : Read {
  using Params = StoredReadParams;
  using Stored = Type;
  static constexpr bool kStored = true;
};

/// Over a stored bank alone: the last term is one of its sources, too.
template <class Read, class Type>
struct AllStoredRead : StoredRead<Read, Type> {
  static_assert(!Read::kUpdate);  // it would be added to a term in bfloat16
  static constexpr bool kAllStored = true;
};

/// kTerms, kChunks: rows, and chunks of each, that a thread has room for. kLeastTerms: fewest terms
/// it is used with. kMerge: two terms, of which the first is a phase-1 result. Read: one of the
/// above.
template <class T, int kTerms, int kChunks, int kLeastTerms, bool kMerge, bool kQuantized,
          class Read>
struct ReadToken {
  static constexpr unsigned kLanes = kWarp;
  static constexpr int kPadded = kChunks == 3 ? 4 : kChunks;  // sums come in powers of two
  static constexpr bool kEarly = Read::kEarly;
  static constexpr int kMaxUpdates = Read::kUsual ? 1 : kReadRowsMaxUpdates;
  // Registers have no index: slot s holds term s, but the last slot always the last term. The table
  // of rows is in the order of the slots.
  static constexpr int kLast = kTerms - 1;
  static constexpr int kAlways = kLeastTerms - 1;
  static constexpr bool kStored = Read::kStored;
  // The first slots are those of a stored bank: all of them, or all but the last.
  static constexpr int kBank = !kStored ? 0 : Read::kAllStored ? kTerms : kLast;
  using Stored = std::conditional_t<kStored, typename Read::Stored, T>;
  static constexpr unsigned kStoredBytes = sizeof(Packed<Stored>);  // of a chunk

  const typename Read::Params& p;
  const int lane;
  const unsigned chunks, segments;  // of a row
  const unsigned step;              // chunks from one of this thread's to the next
  unsigned chunk[kChunks];          // of this thread; its segment is chunk / 32
  const int K, first_key;

  // The last has a place of its own where those before it are of another type.
  Packed<Stored> slots[kStored ? kBank : kTerms][kChunks];
  Packed<T> last_slot[kStored ? kChunks : 1];
  Chunk early_query[kEarly ? kChunks : 1];
  Chunk early_weight[kEarly ? kChunks : 1];

  /// The thread's first chunk, and how far it is to its next.
  __device__ __forceinline__ ReadToken(const typename Read::Params& params, unsigned first,
                                       unsigned step_of_chunks)
      : p(params),
        lane(static_cast<int>(threadIdx.x % kLanes)),
        chunks(static_cast<unsigned>(params.dim) / kChunk),
        segments((static_cast<unsigned>(params.dim) / kChunk + kLanes - 1) / kLanes),
        step(step_of_chunks),
        K(kMerge ? 2 : params.num_terms),
        first_key(kMerge ? 1 : params.first_key) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      chunk[c] = first + c * step;
    }
  }

  // What a kernel of the usual read knows, others ask.
  __device__ __forceinline__ bool has_norm() const {
    if constexpr (Read::kUsual) {
      return Read::kNorm;
    } else {
      return p.norm;
    }
  }
  __device__ __forceinline__ bool has_weight() const {
    return Read::kUsual || p.norm_weight.present();
  }
  __device__ __forceinline__ bool has_update() const {
    if constexpr (Read::kUsual) {
      return Read::kUpdate;
    } else {
      return p.partial_out.present();
    }
  }
  __device__ __forceinline__ int num_updates() const {
    if constexpr (Read::kUsual) {
      return Read::kUpdate ? 1 : 0;
    } else {
      return p.num_rows - K;
    }
  }
  __device__ __forceinline__ bool whole_key() const {
    return Read::kUsual || (p.key_begin == 0 && p.query_aligned && p.query.present());
  }
  __device__ __forceinline__ bool has_mix() const { return !Read::kUsual && p.mix.present(); }
  __device__ __forceinline__ bool has_snapshot() const {
    return !Read::kUsual && p.snapshot.present();
  }
  __device__ __forceinline__ bool rounds_mix() const { return !Read::kUsual && p.round_mix; }
  /// Whether this thread's chunk c is one of the row's.
  __device__ __forceinline__ bool in_row(int c) const { return Read::kWhole || chunk[c] < chunks; }
  __device__ __forceinline__ bool is_segment(unsigned segment) const {
    return Read::kWhole || segment < segments;
  }
  /// A chunk of the row to load in the place of chunk c.
  __device__ __forceinline__ unsigned clamped(int c) const {
    return Read::kWhole ? chunk[c] : min(chunk[c], chunks - 1);
  }

  __device__ __forceinline__ ReadSumsLayout layout() const {
    return {segments, kTerms, kQuantized};
  }
  __device__ __forceinline__ unsigned segment_of(unsigned c) const {
    return (kChunks == 1 ? chunk[0] : chunk[0] + c * step) / kLanes;
  }
  __device__ __forceinline__ static bool is_in_use(int s, int K) {
    return s < kAlways || s < K - 1 || s == kLast;
  }
  __device__ __forceinline__ bool in_use(int s) const { return is_in_use(s, K); }
  __device__ __forceinline__ int term_of(int s) const { return s == kLast ? K - 1 : s; }
  /// A slot of the bank that holds a term of `num_terms`: s, if it does.
  __device__ __forceinline__ static int bank_slot(int s, int num_terms) {
    if (Read::kAllStored) {
      return s < num_terms - 1 ? s : kLast;
    }
    return min(s, num_terms - 2);
  }
  __device__ __forceinline__ DType dtype_in(int row) const {
    return static_cast<DType>(p.rows.dtype[row]);
  }
  __device__ __forceinline__ DType dtype_of(int s) const {
    return s == kLast && has_update() ? p.partial_out.dtype : dtype_in(s);
  }
  /// The place of a row of type T.
  __device__ __forceinline__ Packed<T>& typed(int s, int c) {
    if constexpr (kStored) {
      return last_slot[c];
    } else {
      return slots[s][c];
    }
  }
  /// The values of a slot, without their scale.
  __device__ __forceinline__ Chunk values(int s, int c) const {
    if constexpr (kStored) {
      return s >= kBank ? unpack_row_chunk<T>(last_slot[c], dtype_of(s)) : unpack(slots[s][c]);
    } else {
      return unpack_row_chunk<T>(slots[s][c], dtype_of(s));
    }
  }

  /// From this thread's first chunk of row `s` on; rows behind the slots are updates.
  __device__ __forceinline__ RowRef own_chunks(int s, RowRef row) const {
    row.data += chunk[0] * (s < kBank ? kStoredBytes : row_chunk_bytes<T>(row));
    return row;
  }

  // Of a whole key there is no question to ask: what lies beyond a row meets zeros.
  template <bool kWholeKey>
  __device__ __forceinline__ Chunk load_query(int c) const {
    if (kWholeKey) {
      return unpack(load_whole<float>(reinterpret_cast<const char*>(p.query.data),
                                      static_cast<int>(clamped(c)) * kChunk));
    }
    const int col = static_cast<int>(chunk[c]) * kChunk;
    const bool in_key = chunk[c] < chunks && col + kChunk > p.key_begin && p.query.present();
    return in_key ? load_query_chunk(p.query, col, p.key_begin, p.query_aligned) : zero_chunk();
  }

  __device__ __forceinline__ void load_early_query() {
    if constexpr (kEarly) {
      if (whole_key()) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          early_query[c] = load_query<true>(c);
        }
      } else {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          early_query[c] = load_query<false>(c);
        }
      }
    }
  }

  /// partial' into the last slot and to memory; update(e, c) is chunk c of update e, as stored.
  template <class Update>
  __device__ __forceinline__ void add_updates(uint32_t t, Update&& update) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (in_row(c)) {
        Chunk sum = unpack_row_chunk<T>(typed(kLast, c), dtype_in(kLast));
#pragma unroll
        for (int e = 0; e < kMaxUpdates; ++e) {
          if (e < num_updates()) {
            add(sum, unpack_row_chunk<T>(update(e, c), dtype_in(kTerms + e)));
          }
        }
        Packed<T>& stored = typed(kLast, c);
        stored = pack_row_chunk<T>(sum, p.partial_out.dtype);
        store_row_chunk<T>(p.partial_out.row(t), chunk[c], stored);
        if (has_snapshot()) {
          store_row_chunk<T>(p.snapshot.row(t), chunk[c], stored);
        }
      }
    }
  }

  // |k_j|^2 and <u, k_j> of each of this warp's segments: of up to eight terms of a segment at
  // once, and of so many segments that they are eight pairs. A chunk lies in one group of columns
  // that share a scale, and powers of two change no bit of a sum.
  template <int kFirst, bool kWholeKey, class Share, class Scale>
  __device__ __forceinline__ void sum_terms(float* term_sums, Share&& share, Scale&& scale) const {
    constexpr int kTermPairs = PairSums<(kTerms - kFirst < 8 ? kTerms - kFirst : 8)>::kPairs;
    constexpr int kTogether = kChunks * kTermPairs < 8 ? kChunks : 8 / kTermPairs;
    using Sums = PairSums<2 * kTermPairs * kTogether>;
    constexpr unsigned kCopies = 8 / Sums::kPairs;
#pragma unroll
    for (int first_chunk = 0; first_chunk < kChunks; first_chunk += kTogether) {
      Sums sums;
#pragma unroll
      for (int d = 0; d < kTogether; ++d) {
        const int c = first_chunk + d;
        if (c >= kChunks) {
          continue;
        }
        const Chunk u = kEarly ? early_query[kEarly ? c : 0] : load_query<kWholeKey>(c);
#pragma unroll
        for (int i = 0; i < kTermPairs; ++i) {
          float pair[4] = {};  // (terms, square and dot)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int s = kFirst + 2 * i + k;
            if (s < kTerms && in_use(s) && (s > 0 || first_key == 0)) {
              Chunk key = values(s, c);
              if (!kWholeKey) {
                keep_from(key, static_cast<int>(chunk[c]) * kChunk, p.key_begin);
              }
              pair[2 * k] = dot_add(key, key, 0.0f);
              pair[2 * k + 1] = dot_add(u, key, 0.0f);
              if constexpr (kStored) {
                if (s < kBank) {
                  const float factor = scale(s, c);
                  pair[2 * k] = pair[2 * k] * factor * factor;
                  pair[2 * k + 1] *= factor;
                }
              }
            }
          }
          sums.set(d * kTermPairs + i, pair, lane);
        }
      }
      const float sum = sums.finish(lane);
      constexpr int kPerSegment = 4 * kTermPairs;
      const int own = Sums::index(lane);
      const int index = 2 * kFirst + (kTogether > 1 ? own % kPerSegment : own);
      const int own_chunk = first_chunk + (kTogether > 1 ? own / kPerSegment : 0);
      const unsigned segment = segment_of(own_chunk);
      if (index < 2 * kTerms && own_chunk < kChunks && is_segment(segment)) {
        share(term_sums + segment * 2 * kTerms + index, sum, Meeting::kTerms,
              static_cast<unsigned>(lane) % kCopies, kCopies);
      }
      if (Read::kWhole && kTerms > 8) {
        __syncwarp();  // or the next chunk's keys are unpacked early, and registers do not suffice
      }
    }
  }

  // The one key of a merge: the sums of all this warp's segments at once.
  template <bool kWholeKey, class Share>
  __device__ __forceinline__ void sum_partial(float* term_sums, Share&& share) const {
    float sums[2 * kPadded] = {};  // (segments, square and dot)
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const Chunk u = kEarly ? early_query[kEarly ? c : 0] : load_query<kWholeKey>(c);
      Chunk key = values(kLast, c);
      if (!kWholeKey) {
        keep_from(key, static_cast<int>(chunk[c]) * kChunk, p.key_begin);
      }
      sums[2 * c] = dot_add(key, key, 0.0f);
      sums[2 * c + 1] = dot_add(u, key, 0.0f);
    }
    const float sum = warp_sum_scatter(sums);
    constexpr unsigned kCopies = kLanes / (2 * kPadded);
    const unsigned index = static_cast<unsigned>(lane) / kCopies;
    const unsigned segment = segment_of(index / 2);
    if (index / 2 < kChunks && is_segment(segment)) {
      share(term_sums + (segment * kTerms + kLast) * 2 + index % 2, sum, Meeting::kTerms,
            static_cast<unsigned>(lane) % kCopies, kCopies);
    }
  }

  template <bool kWholeKey, class Share, class Scale, int... kGroup>
  __device__ __forceinline__ void sum_groups(float* term_sums, Share&& share, Scale&& scale,
                                             std::integer_sequence<int, kGroup...>) const {
    (sum_terms<8 * kGroup, kWholeKey>(term_sums, share, scale), ...);
  }

  /// From the rows in the slots, partial' among them, to x. `sums` is this token's shared memory.
  /// share(place, sum, meeting, copy, copies) makes a sum known to all of the token's threads,
  /// which `copies` lanes have, this one as number `copy`; meet(meeting) waits until all are known.
  /// is_first(): this block stores what a token has once. scale(s, c): of chunk c of a stored slot.
  template <class First, class Share, class Meet, class Scale>
  __device__ __forceinline__ void finish(uint32_t t, float* term_sums, First&& is_first,
                                         Share&& share, Meet&& meet, Scale&& scale) {
    float* const norm_sums = term_sums + layout().norm_sums();
    using Groups = std::make_integer_sequence<int, (kTerms + 7) / 8>;
    if constexpr (kMerge) {
      whole_key() ? sum_partial<true>(term_sums, share) : sum_partial<false>(term_sums, share);
    } else {
      whole_key() ? sum_groups<true>(term_sums, share, scale, Groups{})
                  : sum_groups<false>(term_sums, share, scale, Groups{});
    }

    // On their way during the barrier.
    const float phase1_lse = first_key > 0 ? p.phase1_lse.at(0, t) : 0.0f;
    if constexpr (kEarly) {
      if (has_norm() && has_weight()) {
        for_shared_chunks(p.norm_weight.row(0), chunk, chunks,
                          [&](int c, const Chunk& weight) { early_weight[c] = weight; });
      }
    }
    meet(Meeting::kTerms);

    // Every warp computes the softmax for itself: lane l has term l.
    TermLogit own = term_logit<kLeastTerms, kTerms>(p, term_sums, kTerms, kLast, segments, lane);
    if (lane < first_key || lane >= K) {
      own = {lane < K ? phase1_lse : -INFINITY, 0.0f};
    }
    const auto [logit, inv_rms] = own;
    const LaneSoftmax softmax = softmax_over_lanes<kTerms>(logit, lane < K);
    const float prob = softmax.prob;
    if (threadIdx.x < kLanes && is_first() && lane < K) {
      store_statistics(p, t, lane, {logit, inv_rms}, softmax);
    }

    // Chunk by chunk where a thread has several: what a chunk's rows took, its mixture takes.
    Chunk h[kChunks];
    float probs[kTerms];
    const auto prob_of = [&](int s) { return __shfl_sync(kAllLanes, prob, term_of(s)); };
    if (kChunks > 1) {
#pragma unroll
      for (int s = 0; s < kTerms; ++s) {
        if (in_use(s)) {
          probs[s] = prob_of(s);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      h[c] = zero_chunk();
#pragma unroll
      for (int s = 0; s < kTerms; ++s) {
        if (in_use(s)) {
          float factor = kChunks > 1 ? probs[s] : prob_of(s);
          if constexpr (kStored) {
            if (s < kBank) {
              factor *= scale(s, c);
            }
          }
          add_scaled(h[c], factor, values(s, c));
        }
      }
      if (in_row(c)) {
        if (has_mix()) {
          store_row_chunk<T>(p.mix.row(t), chunk[c], pack_row_chunk<T>(h[c], p.mix.dtype));
        }
        if (!kQuantized && !has_norm()) {
          store_row_chunk<T>(p.x.row(t), chunk[c], pack_row_chunk<T>(h[c], p.x.dtype));
        }
      }
    }
    if (!kQuantized && !has_norm()) {
      return;
    }

    if (has_norm()) {
      float squares[kPadded] = {};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (rounds_mix()) {
          h[c] = round_to(p.x.dtype, h[c]);
        }
        squares[c] = dot_add(h[c], h[c], 0.0f);
      }
      const float sum = warp_sum_scatter(squares);
      // Of each segment of the warp kGroup lanes have the sum.
      constexpr unsigned kGroup = kLanes / kPadded;
      const unsigned own_segment = segment_of(lane / kGroup);
      if (lane / kGroup < kChunks && is_segment(own_segment)) {
        share(norm_sums + own_segment, sum, Meeting::kNorm, lane % kGroup, kGroup);
      }
      meet(Meeting::kNorm);
      const float square = sum_of_segments<1>(norm_sums, segments, lane);
      const float inv_rms_mix = rsqrtf(square * p.inv_dim + p.norm_eps);
      if (threadIdx.x == 0 && is_first() && p.mix_inv_rms.present()) {
        p.mix_inv_rms.at(0, t) = inv_rms_mix;
      }
      const auto normalise = [&](int c, const Chunk& weight) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          h[c].v[i] = h[c].v[i] * inv_rms_mix * weight.v[i];
        }
      };
      if (!has_weight()) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          normalise(c, {{1, 1, 1, 1, 1, 1, 1, 1}});
        }
      } else if constexpr (kEarly) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          normalise(c, early_weight[c]);
        }
      } else {
        for_shared_chunks(p.norm_weight.row(0), chunk, chunks, normalise);
      }
    }
    if constexpr (kQuantized) {
      uint32_t largest[kChunks];  // of a chunk, then of the values that share its scale
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        largest[c] = largest_bits(h[c]);  // zero beyond the row
      }
      if (p.x_scale_groups == 1) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const uint32_t of_segment = __reduce_max_sync(kAllLanes, largest[c]);
          if (chunk[c] / kLanes < segments) {
            share(term_sums + layout().largest() + chunk[c] / kLanes, __uint_as_float(of_segment),
                  Meeting::kLargest, static_cast<unsigned>(lane), kLanes);
          }
        }
        meet(Meeting::kLargest);
        uint32_t of_token = 0;
#pragma unroll 8
        for (unsigned g = 0; g < segments; ++g) {
          of_token = max(of_token, __float_as_uint(term_sums[layout().largest() + g]));
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          largest[c] = of_token;
        }
      } else {
        constexpr unsigned kHalf = 0xffffu;  // lanes of a group of 128 columns
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          largest[c] = __reduce_max_sync(lane < 16 ? kHalf : ~kHalf, largest[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (in_row(c)) {
          const float scale = group_scale(largest[c], p.x_scale_power_of_two);
          store_fp8_chunk(p.x.row(t), chunk[c], h[c], __frcp_rn(scale));
          const unsigned group = p.x_scale_groups == 1 ? 0 : chunk[c] / 16;
          if (p.x_scale_groups == 1 ? chunk[c] == 0 : lane % 16 == 0) {
            p.x_scale.at(t, group) = scale;
          }
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (in_row(c)) {
          store_row_chunk<T>(p.x.row(t), chunk[c], pack_row_chunk<T>(h[c], p.x.dtype));
        }
      }
    }
  }
};

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_TOKEN_CUH_
