// The usual `read` of many tokens: the rows of a token in registers, those of the next on their way
// to shared memory. A block takes several whole tokens, one after the other.
//
// The formulas are those of read_token.cuh.
//
// in    K terms, and an update for the last of them, [T, D] of one 16-bit type; or K - 1 terms of a
//       stored bank, in float8 or float16 with scales [T, D / W], before a last one in bfloat16; or
//       K of such a bank in float16;
//       u [D], lse [T] float32; g [D]
// out   x, partial' [T, D]; logits, inv_rms, probs [T, K], mix_inv_rms [T], lse of one query [T]
// bytes every row of a token is read once; K + 1 units of T * D elements (those of a float8 bank of
//       one byte), and partial' written
//
//   wait for this thread's copies -> its chunks of all rows from shared memory to registers
//   -> partial', sums, barrier, softmax, mixture, barrier, norm, x
//
// and behind the sums, but in front of them with an update of two terms (an advance), copies of the
// next token's chunks begin, into the same places.
//
// A thread copies what it uses itself, 16 bytes an instruction (8 of float8), so that nobody waits
// for anybody between memory and registers, and from then on a token's rows have all the time that
// the one before it takes. Instructions are as scarce as bandwidth on an H200: a thread has up to
// four chunks of each row, 512 bytes apart, so that one address serves them all, and nothing is
// asked that is known when the kernel is compiled (UsualReadOfMany).
//
// Blocks that stay for all of the launch drift apart, and memory that is read in many places at
// once is slower: where a multiprocessor holds several blocks, they take a few tokens each, and
// those that follow begin where the others have come to.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_READ_AHEAD_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_READ_AHEAD_CUH_

#include <cstdint>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/kernels/read_token.cuh"

namespace flash_attn_res::cuda {

template <class Params>
struct ReadAheadParams {
  Params read;
  // Blocks come in bands of `stride`, about as many as run at once. A band has stride * count
  // tokens, its block b those from number b on, `stride` apart.
  unsigned stride, count;
};

template <int kTerms, int kChunks>
inline constexpr ReadAheadForm kReadAheadForm = read_ahead_form(kTerms, kChunks);

/// kMerge: two terms, of which the first is a phase-1 result. Read: a UsualReadOfMany, or that over
/// a stored bank: then the scales of a warp's columns come with a lane each, a token ahead as well.
template <class T, int kTerms, int kChunks, bool kMerge, class Read>
__global__ void __launch_bounds__(kReadAheadForm<kTerms, kChunks>.max_threads())
    read_ahead_kernel(const __grid_constant__ ReadAheadParams<typename Read::Params> params) {
  using Token = ReadToken<T, kTerms, kChunks, kReadAheadForm<kTerms, kChunks>.least_terms, kMerge,
                          /*kQuantized=*/false, Read>;
  constexpr int kStored = Token::kBank;                               // slots of the bank
  constexpr int kTyped = kTerms + (Read::kUpdate ? 1 : 0) - kStored;  // the other slots, the update
  constexpr unsigned kStep = kWarp * 16;                              // bytes of a warp's chunks
  constexpr unsigned kStoredStep = kWarp * Token::kStoredBytes;
  const typename Read::Params& p = params.read;
  const unsigned warp = threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  unsigned first_chunk = warp * (kChunks * kWarp) + lane;

  // [warps, rows, kChunks, 32 lanes] of 16 bytes, those of a stored bank (of 8, in float8) first;
  // then the sums of two tokens in turn.
  extern __shared__ float4 shared[];
  constexpr unsigned kStoredBytes = kStored * kChunks * kStoredStep;
  constexpr unsigned kOfWarp = (kStoredBytes + kTyped * kChunks * kStep) / 16;
  SharedAddress own(shared + warp * kOfWarp + lane);
  float* const all_sums = reinterpret_cast<float*>(shared + blockDim.x / kWarp * kOfWarp);
  const auto place = [](int row, int c) {
    return kStoredBytes + ((row - kStored) * kChunks + c) * kStep;
  };
  // Lanes are 16 bytes apart in `own`.
  const auto stored_place = [&](int s, int c) {
    return (s * kChunks + c) * kStoredStep - lane * (16 - Token::kStoredBytes);
  };

  const auto copy_row = [&](int row, unsigned t) {
    const char* const row_data = p.rows.data[row] + t * p.rows.stride_bytes[row];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (row < kStored) {
        own.copy_async<Token::kStoredBytes>(
            stored_place(row, c), row_data + first_chunk * Token::kStoredBytes + c * kStoredStep);
      } else {
        own.copy_async<16>(place(row, c), row_data + first_chunk * 16 + c * kStep);
      }
    }
  };
  const auto copy_token = [&](unsigned t) {
    const int K = kMerge ? 2 : p.num_terms;
#pragma unroll
    for (int s = 0; s < kTerms; ++s) {
      if (Token::is_in_use(s, K)) {
        copy_row(s, t);
      }
    }
    if (Read::kUpdate) {
      copy_row(kTerms, t);
    }
    commit_copies();
  };
  // Scales: a slot has kScalesOfSlot lanes, two for a chunk of 256 columns.
  constexpr int kScalesOfSlot = 2 * Token::kPadded;
  constexpr int kScaleWords = (kStored * kScalesOfSlot + kWarp - 1) / kWarp;
  float scales[kScaleWords > 0 ? kScaleWords : 1] = {};
  uint8_t next_scales[kScaleWords > 0 ? kScaleWords : 1] = {};
  const auto load_scales = [&](unsigned t) {
    if constexpr (Token::kStored) {
#pragma unroll
      for (int w = 0; w < kScaleWords; ++w) {
        const int index = w * kWarp + static_cast<int>(lane);
        const int s = Token::bank_slot(index / kScalesOfSlot, p.num_terms);
        const int c = min(index % kScalesOfSlot / 2, kChunks - 1);
        const unsigned col = ((warp * kChunks + c) * kWarp + index % 2 * (kWarp / 2)) *
                             static_cast<unsigned>(kChunk);
        next_scales[w] = p.scales_of(s, t)[col >> p.scale_shift];
      }
    }
  };
  const auto scale = [&](int s, int c) {
    const int index = s * kScalesOfSlot + 2 * c;
    return __shfl_sync(kAllLanes, scales[index / kWarp], index % kWarp + lane / (kWarp / 2));
  };
  const auto share = [](float* place, float sum, Meeting, unsigned copy, unsigned) {
    if (copy == 0) {
      *place = sum;
    }
  };
  const unsigned stride = params.stride;
  const unsigned band = blockIdx.x / stride * (stride * params.count);
  const unsigned end = min(static_cast<unsigned>(p.tokens), band + stride * params.count);
  unsigned t = band + blockIdx.x % stride;
  const auto copy_next = [&] {
    // A thread's loads from shared memory are served before the copies behind them.
    if (t + stride < end) {
      copy_token(t + stride);
      load_scales(t + stride);
    }
  };
  // In front of the sums, copies are on their way for longer, and hold the sums up. Behind them
  // one-shot over nine at D = 7168 has 97 % of a copy on an H200 instead of 91, with norm 88
  // instead of 80, a site over eight in float16 with scales 91 instead of 77; an advance has 1 to 2
  // less.
  constexpr bool kLate = !(Read::kUpdate && kTerms == 2);
  const auto meet = [&](Meeting meeting) {
    if (kLate && meeting == Meeting::kTerms) {
      copy_next();
    }
    if (blockDim.x == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  wait_for_previous_grid();
  begin_next_grid();
  if (t < end) {
    copy_token(t);
    load_scales(t);
  }
  unsigned turn = 0;  // floats before this token's sums
#pragma unroll 1
  for (; t < end; t += stride) {
    // Addresses are formed anew for every token: kept, they would take the registers of a row.
    asm volatile("" : "+r"(first_chunk), "+r"(own.bytes));
    Token token(p, first_chunk, kWarp);
    float* const sums = all_sums + turn;
    turn = token.layout().floats() - turn;
    if constexpr (Token::kStored) {
#pragma unroll
      for (int w = 0; w < kScaleWords; ++w) {
        scales[w] = scale_from_bits(next_scales[w]);
      }
    }
    wait_copies<0>();
#pragma unroll
    for (int s = 0; s < kTerms; ++s) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if constexpr (Token::kStored) {
          if (s < kStored) {
            token.slots[s][c] = {};
            if (token.in_use(s)) {
              own.load(stored_place(s, c), token.slots[s][c].bits);
            }
            continue;
          }
        }
        token.typed(s, c) = token.in_use(s) ? Packed<T>{own.load(place(s, c))} : Packed<T>{};
      }
    }
    if (Read::kUpdate) {
      token.add_updates(t, [&](int, int c) { return Packed<T>{own.load(place(kTerms, c))}; });
    }
    if (!kLate) {
      copy_next();
    }
    token.finish(t, sums, [] { return true; }, share, meet, scale);
  }
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_READ_AHEAD_CUH_
