// The compute warps of phase 1 on Hopper over float16 and float8 sources, with or without scales.
// What goes in and out, bytes and bits are those of hopper_attend.cuh, with
//
//   v_n[d] = scale_n[d / W] q_n[d]
//
// An e4m3 number is a float16, by one instruction for two of them, so that the products run in
// float16, and scales stay out of them. A warp's columns are in one or two groups of W columns, a
// tile in one: which is known when the code is compiled, since a slice begins with a group. (Asking
// at every tile whether a group ends, with a branch, took twice the time: products do not run ahead
// past a branch.)
//
//   P1   <u_s, v_n> = sum over groups  scale_n  2^a <u_s / 2^a, q_n>         also v_n with itself
//   P2   out_s[d]   = 2^b sum_n (p_sn scale_n / 2^b) q_n[d]                  b of the largest term
//
// u / 2^a is a float16 and the float16 of its remainder: 22 bits count. p scale / 2^b is too where
// out is float16; a bfloat16 has 8 bits, to which 11 add an eighth of its rounding. NaN among q or
// the scales makes the token's logits NaN, and with them its results.
//
// What is slow is not memory but instructions, and each waiting for the one before: so the products
// are of two tokens at once, in turn, where registers allow it.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/hopper_attend_params.cuh"

namespace flash_attn_res::cuda::hopper {

/// How a warp's slice of the sources comes from shared memory as operands in float16, and which
/// columns of a tile of 16 stand where. With i = lane % 4 and r = lane / 4, as loaded a lane has
/// the columns `column(i) + {0, 1}` (left) and `column(i) + kSecond + {0, 1}` (right) of source r.
/// Transposed it has sources 2 i and 2 i + 1 in the columns r of the left and the right block.
template <class Source, int kSourceGroups>
struct HalfTiles;

template <int kSourceGroups>
struct HalfTiles<__half, kSourceGroups> : WideTiles<kSourceGroups> {
  static constexpr int kSecond = 8;
  static __device__ __forceinline__ int column(int i) { return 2 * i; }

  using WideTiles<kSourceGroups>::WideTiles;

  template <bool kTransposed>
  static __device__ __forceinline__ Strip operand(Strip strip) {
    return strip;
  }
};

/// ldmatrix moves pairs of float8 as if they were one number of 16 bits. As they lie, a lane gets
/// four consecutive columns of a source; transposed, two columns of two sources.
template <int kSourceGroups>
struct HalfTiles<Fp8, kSourceGroups> {
  static constexpr int kStep = 4 / kSourceGroups;  // tiles of an ldmatrix
  static constexpr int kSecond = 2;
  static __device__ __forceinline__ int column(int i) { return 4 * i; }

  using Raw = uint32_t;  // four numbers

  const char* place;

  __device__ __forceinline__ HalfTiles(const char* rows, int pitch, int num_sources, int lane) {
    constexpr int kRows = 8 * kSourceGroups;
    const int n = lane % kRows;
    place = rows + (n < num_sources ? n : 0) * pitch + lane / kRows * 16;
  }

  __device__ __forceinline__ HalfTiles at(int bytes) const {
    HalfTiles other = *this;
    other.place += bytes;
    return other;
  }

  template <bool kTransposed, int kTiles, int kAtOnce>
  __device__ __forceinline__ void load(int first, int lane,
                                       Raw (&v)[kAtOnce][kSourceGroups]) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kStep) {
      if (first + i >= kTiles) {
        return;
      }
      int beyond = 0;
      if (first + i + kStep > kTiles) {  // the last tile again
        beyond = max(first + i + lane / (8 * kSourceGroups) - (kTiles - 1), 0);
      }
      const cute::uint128_t& from = as_vector(place + (first + i - beyond) * 16);
      uint32_t block[kStep * kSourceGroups];
      if constexpr (kTransposed) {
        cute::SM75_U16x8_LDSM_T::copy(from, block[0], block[1], block[2], block[3]);
      } else {
        cute::SM75_U32x4_LDSM_N::copy(from, block[0], block[1], block[2], block[3]);
      }
#pragma unroll
      for (int k = 0; k < kStep * kSourceGroups; ++k) {
        const int tile = i + k / kSourceGroups;
        if (tile < kAtOnce && first + tile < kTiles) {
          v[tile][k % kSourceGroups] = block[k];
        }
      }
    }
  }

  /// Four e4m3 as float16: the lower two, then the upper two.
  template <bool kTransposed>
  static __device__ __forceinline__ Strip operand(uint32_t raw) {
    const uint32_t bytes = kTransposed ? __byte_perm(raw, 0, 0x3120) : raw;
    Strip strip;
    asm("{\n"
        ".reg .b16 lower, upper;\n"
        "mov.b32 {lower, upper}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, lower;\n"
        "cvt.rn.f16x2.e4m3x2 %1, upper;\n"
        "}"
        : "=r"(strip.left), "=r"(strip.right)
        : "r"(bytes));
    return strip;
  }
};

/// Two numbers of results times their powers of two: rounded to float16 after that, to bfloat16
/// before, which is the same (an exponent alone changes) and one instruction less.
template <bool kHalfOut>
__device__ __forceinline__ uint32_t pack_scaled(float x, float y, float power_x, float power_y) {
  if constexpr (kHalfOut) {
    return pack_half(x * power_x, y * power_y);
  } else {
    const uint32_t values = pack_bf16(x, y);
    const uint32_t powers = __byte_perm(__float_as_uint(power_x), __float_as_uint(power_y), 0x7632);
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(values),
                                           reinterpret_cast<const __nv_bfloat162&>(powers));
    return reinterpret_cast<const uint32_t&>(product);
  }
}

/// A warp's view of eight results of a token: tile j is 16 columns of them, transposed. `power`:
/// what the queries 2 i and 2 i + 1 are to be multiplied by.
template <class Source, bool kHalfOut>
class ResultTile;

template <bool kHalfOut>
class ResultTile<__half, kHalfOut> {
 public:
  __device__ __forceinline__ ResultTile(char* slot, char* scratch, int pitch, int first_query,
                                        int num_queries, int first_column, int lane) {
    const int s = first_query + row_in_strip(lane);
    rows_ = s < num_queries ? slot + s * pitch + (first_column + column_in_strip(lane)) * 2
                            : scratch + row_in_strip(lane) * 32 + column_in_strip(lane) * 2;
  }
  __device__ __forceinline__ void store(int j, const float (&c)[4], float2 power) const {
    store_strip_transposed(rows_ + j * 32, {pack_scaled<kHalfOut>(c[0], c[1], power.x, power.y),
                                            pack_scaled<kHalfOut>(c[2], c[3], power.x, power.y)});
  }

 private:
  char* rows_;
};

/// Columns 2 r and 2 r + 1 of a tile stand in rows r and r + 8, in the same lane: one word.
template <bool kHalfOut>
class ResultTile<Fp8, kHalfOut> {
 public:
  __device__ __forceinline__ ResultTile(char* slot, char* scratch, int pitch, int first_query,
                                        int num_queries, int first_column, int lane) {
    const auto row = [&](int s) {
      return (s < num_queries ? slot + s * pitch + first_column * 2 : scratch) + lane / 4 * 4;
    };
    rows_[0] = row(first_query + lane % 4 * 2);
    rows_[1] = row(first_query + lane % 4 * 2 + 1);
    single_ = num_queries == first_query + 1;
  }
  __device__ __forceinline__ void store(int j, const float (&c)[4], float2 power) const {
    *reinterpret_cast<uint32_t*>(rows_[0] + j * 32) =
        pack_scaled<kHalfOut>(c[0], c[2], power.x, power.x);
    if (!single_) {
      *reinterpret_cast<uint32_t*>(rows_[1] + j * 32) =
          pack_scaled<kHalfOut>(c[1], c[3], power.y, power.y);
    }
  }

 private:
  char* rows_[2];
  bool single_;  // a query alone
};

/// What one compute warp does.
template <int kRoom, int kTiles, int kSourceGroups, class Source>
struct AttendHalfWarp {
  using Tiles = HalfTiles<Source, kSourceGroups>;
  using Raw = typename Tiles::Raw;
  using Products = ScoreProducts<kRoom, kSourceGroups>;
  static constexpr int kQueryGroups = query_groups_of(kRoom);
  static constexpr WeightMap kWeights = weight_map(kQueryGroups, kSourceGroups);
  static constexpr int kTogether = tokens_together(kRoom, kSourceGroups);
  // Tiles that have the same scales, and sets of scales that a slice meets.
  static constexpr int kRun = kTiles == 9 ? 9 : 8;
  static constexpr int kScaleSets = kTiles / kRun;
  // Tiles that P1 loads at once; 16 of 16 float16 sources leave registers for one.
  static constexpr int kLoads =
      std::is_same_v<Source, __half> && kTiles * kSourceGroups == 32 ? 1 : 4 / kSourceGroups;
  static constexpr float kTop = 16384.0f;  // what the largest is scaled to, or twice that

  const AttendParams& p;
  SharedHead& head;
  char* base;  // of shared memory
  const Sums& sums;
  int warp, lane;
  int scale_place[kScaleSets];  // of this lane's scales in those of a token, in bytes
  Strip high[kTiles][kQueryGroups], low[kTiles][kQueryGroups];  // queries of this warp's columns
  float power[kQueryGroups];                                    // 2^a of the query in row lane / 4

  __device__ __forceinline__ AttendHalfWarp(const AttendParams& params, SharedHead& shared_head,
                                            const Share& share, const Sums& shared_sums)
      : p(params),
        head(shared_head),
        base(reinterpret_cast<char*>(&shared_head)),
        sums(shared_sums),
        warp(warp_of_cta()),
        lane(lane_of_warp()) {
#pragma unroll
    for (int set = 0; set < kScaleSets; ++set) {
      const int column = share.column + (warp * kTiles + set * kRun) * 16;
      const int group = (column >> p.scales.shift) - (share.column >> p.scales.shift);
      scale_place[set] = p.map.scales + (group * p.map.scale_pitch + lane % 4 * 2) * 2;
    }
#pragma unroll
    for (int g = 0; g < kQueryGroups; ++g) {
      const int s = query_of_row<kRoom>(g, lane / 4);
      const float* query = p.queries + s * p.queries_stride + share.column;  // (columns)
      const auto at = [&](int j, int i) {
        const int c = (warp * kTiles + j) * 16 + Tiles::column(lane % 4) + i;
        return s < p.num_queries && c < share.columns ? query[c] : 0.0f;
      };
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (const int i : {0, 1, Tiles::kSecond, Tiles::kSecond + 1}) {
          largest = fmaxf(largest, fabsf(at(j, i)));
        }
      }
      const PowerOfTwo unit = PowerOfTwo::of(max_of_quad(largest));
      power[g] = unit.value * (1.0f / kTop);
      const auto split = [&](int j, int i) {
        return SplitHalfPair::of(at(j, i) * unit.inverse * kTop,
                                 at(j, i + 1) * unit.inverse * kTop);
      };
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const SplitHalfPair left = split(j, 0);
        const SplitHalfPair right = split(j, Tiles::kSecond);
        high[j][g] = {rounded_of_row<kRoom>(left, lane / 4),
                      rounded_of_row<kRoom>(right, lane / 4)};
        low[j][g] = {left.low, right.low};
      }
    }
  }

  static __device__ __forceinline__ float max_of_quad(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
  }

  __device__ __forceinline__ Tiles tiles(int stage, int b) const {
    return Tiles(base + p.map.inputs + stage * p.map.stage_bytes + b * p.map.token_bytes +
                     warp * kTiles * 16 * static_cast<int>(sizeof(Source)),
                 p.map.source_pitch, p.num_sources, lane);
  }

  /// The scales of the sources 8 n + lane % 4 * 2 and the next in a token's sets.
  struct Scales {
    float2 of[kScaleSets][kSourceGroups];
  };
  __device__ __forceinline__ Scales scales(int stage, int b) const {
    Scales result;
    const char* const token = base + (stage * p.plan.batch + b) * p.map.token_scales() * 2;
#pragma unroll
    for (int set = 0; set < kScaleSets; ++set) {
#pragma unroll
      for (int n = 0; n < kSourceGroups; ++n) {
        uint32_t pair = 0x3f803f80u;  // ones
        if (p.scaled()) {
          pair = *reinterpret_cast<const uint32_t*>(token + scale_place[set] + n * 16);
        }
        result.of[set][n] = {low_bf16(pair), high_bf16(pair)};
      }
    }
    return result;
  }

  struct Operands {
    Strip of[kSourceGroups];
  };
  template <bool kTransposed>
  static __device__ __forceinline__ Operands operands(const Raw (&raw)[kSourceGroups]) {
    Operands result;
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
      result.of[n] = Tiles::template operand<kTransposed>(raw[n]);
    }
    return result;
  }

  /// P1 of a step: the warp's share of <u_s, v_n> and of <v_n, v_n>.
  __device__ __forceinline__ void scores(int step, int stage) const {
    for_tokens<kTogether>(p.plan.batch,
                          [&](auto tokens, int b) { scores_of<tokens>(step, stage, b); });
    __syncwarp();
    if (lane == 0) {
      head.partials_full[p.plan.buffer(step)].arrive();
    }
  }

  /// P1 of the tokens from b on.
  template <int kTokens>
  __device__ __forceinline__ void scores_of(int step, int slot, int b) const {
    const Tiles source = tiles(slot, b);
    float* const token = sums.partial_row(step, warp, b * (p.num_queries + 1));
    Scores<kQueryGroups, kSourceGroups> total[kTokens];
    Scales scale[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      scale[t] = scales(slot, b + t);
    }
#pragma unroll
    for (int set = 0; set < kScaleSets; ++set) {
      Products products[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        products[t].clear();
      }
      for_batches<kRun, kLoads, TileBatch<Raw, kTokens, kLoads, kSourceGroups>>(
          [&](int first, auto& v) {  // (n, d)
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
              source.at(t * p.map.token_bytes)
                  .template load<false, kTiles>(set * kRun + first, lane, v.of[t]);
            }
          },
          [&](int first, const auto& v) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
              const int j = set * kRun + first + i;
#pragma unroll
              for (int t = 0; t < kTokens; ++t) {
                if (first + i < kRun) {
                  products[t].template add<true>(first + i, high[j], low[j],
                                                 operands<false>(v.of[t][i]).of);
                }
              }
            }
          });
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        add_scaled(total[t], products[t].scores(), scale[t].of[set], set == 0);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      total[t].store(token + t * (p.num_queries + 1) * sums.cols, p.num_queries, sums.cols, lane);
    }
  }

  /// Adds the scores of a set of columns, or begins with them.
  __device__ __forceinline__ void add_scaled(Scores<kQueryGroups, kSourceGroups>& total,
                                             const Scores<kQueryGroups, kSourceGroups>& scores,
                                             const float2 (&scale)[kSourceGroups],
                                             bool begin) const {
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
        float2& sum = total.query[g][n];
        sum.x = fmaf(scores.query[g][n].x, scale[n].x * power[g], begin ? 0.0f : sum.x);
        sum.y = fmaf(scores.query[g][n].y, scale[n].y * power[g], begin ? 0.0f : sum.y);
      }
      float2& sum = total.square[n];
      sum.x = fmaf(scores.square[n].x * scale[n].x, scale[n].x, begin ? 0.0f : sum.x);
      sum.y = fmaf(scores.square[n].y * scale[n].y, scale[n].y, begin ? 0.0f : sum.y);
    }
  }

  /// p scale / 2^b of the sources 8 n + lane % 4 * 2 and the next and query 8 g + lane / 4, and 2^b
  /// of the queries 8 g + lane % 4 * 2 and the next.
  struct Mixture {
    SplitHalfPair weight[kSourceGroups][kQueryGroups];
    float2 power[kQueryGroups];
  };
  static __device__ __forceinline__ Mixture
  mixture_of(const float2 (&prob)[kSourceGroups][kQueryGroups],
             const float2 (&scale)[kSourceGroups], int lane) {
    Mixture mixture;
#pragma unroll
    for (int g = 0; g < kQueryGroups; ++g) {
      float2 term[kSourceGroups];
      float largest = 0x1p-112f;  // 2^b is then a normal number
#pragma unroll
      for (int n = 0; n < kSourceGroups; ++n) {
        term[n] = {prob[n][g].x * scale[n].x, prob[n][g].y * scale[n].y};
        largest = fmaxf(largest, fmaxf(term[n].x, term[n].y));
      }
      const PowerOfTwo unit = PowerOfTwo::of(max_of_quad(largest));
#pragma unroll
      for (int n = 0; n < kSourceGroups; ++n) {
        mixture.weight[n][g] =
            SplitHalfPair::of(term[n].x * unit.inverse * kTop, term[n].y * unit.inverse * kTop);
      }
      const float value = unit.value * (1.0f / kTop);
      mixture.power[g] = {__shfl_sync(0xffffffffu, value, lane % 4 * 8),
                          __shfl_sync(0xffffffffu, value, lane % 4 * 8 + 4)};
    }
    return mixture;
  }

  /// P2 of a step: out_s of the warp's columns.
  __device__ __forceinline__ void mix(int step, int stage, int slot) const {
    for_tokens<kTogether>(p.plan.batch, [&](auto tokens, int b) {
      if (p.half_out) {
        mix_of<tokens, true>(step, stage, slot, b);
      } else {
        mix_of<tokens, false>(step, stage, slot, b);
      }
    });
    fence_before_bulk_copies();
    __syncwarp();
    if (lane == 0) {
      head.input_free[stage].arrive();
      head.result_done[slot].arrive();
    }
  }

  /// P2 of the tokens from b on.
  template <int kTokens, bool kHalfOut>
  __device__ __forceinline__ void mix_of(int step, int input_slot, int result_slot, int b) const {
    const float* weights = reinterpret_cast<const float*>(base + p.map.weights) +
                           (p.plan.buffer(step) * p.plan.batch + b) * kWeights.forward +
                           lane / 4 * kWeights.pitch + lane % 4 * 2;  // (batch, S, pitch)
    char* const slot = base + p.map.results + result_slot * p.map.slot_bytes +
                       b * p.num_queries * p.map.result_pitch;
    char* const scratch = base + p.map.scratch + warp * scratch_bytes_per_warp(kTiles);
    constexpr int kAtOnce = 4 / kSourceGroups;  // tiles of a token
    Mixture mixture[kTokens][kScaleSets];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const Scales scale = scales(input_slot, b + t);
      float2 prob[kSourceGroups][kQueryGroups];
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          prob[n][g] = *reinterpret_cast<const float2*>(weights + t * kWeights.forward +
                                                        8 * g * kWeights.pitch + 8 * n);
        }
      }
#pragma unroll
      for (int set = 0; set < kScaleSets; ++set) {
        mixture[t][set] = mixture_of(prob, scale.of[set], lane);
      }
    }
    const Tiles source = tiles(input_slot, b);
    for_batches<kTiles, kAtOnce, TileBatch<Raw, kTokens, kAtOnce, kSourceGroups>>(
        [&](int first, auto& v) {  // (d, n)
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            source.at(t * p.map.token_bytes).template load<true, kTiles>(first, lane, v.of[t]);
          }
        },
        [&](int first, const auto& v) {
          Accum out[kTokens][kAtOnce][kQueryGroups];  // (d, s)
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
#pragma unroll
              for (int g = 0; g < kQueryGroups; ++g) {
                if (first + i < kTiles) {
                  out[t][i][g] = Accum::zero();
                  const Operands operand = operands<true>(v.of[t][i]);
                  const Strip(&a)[kSourceGroups] = operand.of;
                  const auto& weight = mixture[t][(first + i) / kRun].weight;
                  if constexpr (kSourceGroups == 2) {
                    mma_columns_half(out[t][i][g], a[0], a[1], weight[0][g].high,
                                     weight[1][g].high);
                    if constexpr (kHalfOut) {
                      mma_columns_half(out[t][i][g], a[0], a[1], weight[0][g].low,
                                       weight[1][g].low);
                    }
                  } else {
                    mma_columns_half(out[t][i][g], a[0], weight[0][g].high);
                    if constexpr (kHalfOut) {
                      mma_columns_half(out[t][i][g], a[0], weight[0][g].low);
                    }
                  }
                }
              }
            }
          }
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
#pragma unroll
            for (int g = 0; g < kQueryGroups; ++g) {
              const ResultTile<Source, kHalfOut> tile(slot + t * p.num_queries * p.map.result_pitch,
                                                      scratch, p.map.result_pitch, 8 * g,
                                                      p.num_queries, warp * kTiles * 16, lane);
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i) {
                if (first + i < kTiles) {
                  tile.store(first + i, out[t][i][g].c, mixture[t][(first + i) / kRun].power[g]);
                }
              }
            }
          }
        });
  }
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_
