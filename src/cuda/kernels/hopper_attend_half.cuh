// The compute warps of phase 1 on Hopper over float16 and float8 sources, with or without scales.
// What goes in and out, bytes and bits are those of hopper_attend.cuh, with
//
//   v_n[d] = scale_n[d / W] q_n[d]
//
// An e4m3 number is a float16, by one instruction for two of them, so that the products run in
// float16, and scales stay out of them. A warp's columns are in few groups of W columns:
//
//   P1   <u_s, v_n> = sum over groups  scale_n  2^a <u_s / 2^a, q_n>         also v_n with itself
//   P2   out_s[d]   = 2^b sum_n (p_sn scale_n / 2^b) q_n[d]                  b of the largest term
//
// u / 2^a and p scale / 2^b are a float16 and the float16 of its remainder: 22 bits of the largest
// count. NaN among q or the scales makes the token's logits NaN, and with them its results.
//
// A slice of 8 or 16 tiles begins with a group, where scales are of groups; one of 9 tiles meets
// two groups at most. So a warp has two sets of scales, and which one is a tile's is known when the
// code is compiled, but for 9 tiles. (Asking at every tile whether a group ends, with a branch,
// took twice the time: products do not run ahead past a branch.)

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/kernels/hopper_attend_params.cuh"

namespace flash_attn_res::cuda::hopper {

/// How a warp's slice of the sources comes from shared memory as operands in float16, and which
/// columns of a tile of 16 stand where. With i = lane % 4 and r = lane / 4, as loaded a lane has
/// the columns `column(i) + {0, 1}` (left) and `column(i) + kSecond + {0, 1}` (right) of source r.
/// Transposed it has sources 2 i and 2 i + 1 in the columns r of the left and the right block.
template <class Source, int kSourceGroups>
struct HalfTiles;

template <int kSourceGroups>
struct HalfTiles<__half, kSourceGroups> {
  static constexpr int kSecond = 8;
  static __device__ __forceinline__ int column(int i) { return 2 * i; }

  const char* place;  // where this lane points at for ldmatrix

  /// `rows`: the first source at the warp's first column, `pitch` bytes apart.
  __device__ __forceinline__ HalfTiles(const char* rows, int pitch, int num_sources, int lane) {
    const int n = kSourceGroups == 2 ? lane / 16 * 8 + row_in_strip(lane) : row_in_strip(lane);
    place = rows + (n < num_sources ? n : 0) * pitch + column_in_strip(lane) * 2;
    if (kSourceGroups == 1) {
      place += lane / 16 * 32;  // two tiles
    }
  }

  /// Tiles `first` and on, (n, d), or (d, n) if transposed. Those after the last are not defined.
  template <bool kTransposed, int kTiles, int kAtOnce>
  __device__ __forceinline__ void load(int first, int, Strip (&v)[kAtOnce][kSourceGroups]) const {
    constexpr int kStep = 2 / kSourceGroups;
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kStep) {
      const bool last = kStep == 2 && first + i + 1 >= kTiles;  // one tile, not two
      if (first + i >= kTiles) {
        return;
      }
      const char* const from = place + (first + i) * 32;
      Strip& other = kSourceGroups == 2 ? v[i][kSourceGroups - 1] : v[(i + 1) % kAtOnce][0];
      if (kTransposed) {
        last ? load_strip_transposed(from, v[i][0]) : load_strips_transposed(from, v[i][0], other);
      } else {
        last ? load_strip(from, v[i][0]) : load_strips(from, v[i][0], other);
      }
    }
  }
};

/// ldmatrix moves pairs of float8 as if they were one number of 16 bits. As they lie, a lane gets
/// four consecutive columns of a source; transposed, two columns of two sources.
template <int kSourceGroups>
struct HalfTiles<Fp8, kSourceGroups> {
  static constexpr int kStep = 4 / kSourceGroups;  // tiles of an ldmatrix
  static constexpr int kSecond = 2;
  static __device__ __forceinline__ int column(int i) { return 4 * i; }

  const char* place;

  __device__ __forceinline__ HalfTiles(const char* rows, int pitch, int num_sources, int lane) {
    constexpr int kRows = 8 * kSourceGroups;
    const int n = lane % kRows;
    place = rows + (n < num_sources ? n : 0) * pitch + lane / kRows * 16;
  }

  template <bool kTransposed, int kTiles, int kAtOnce>
  __device__ __forceinline__ void load(int first, int lane,
                                       Strip (&v)[kAtOnce][kSourceGroups]) const {
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
          const uint32_t bytes = block[k];
          v[tile][k % kSourceGroups] = kTransposed
                                           ? Strip{widen(__byte_perm(bytes, 0, 0x4420)),
                                                   widen(__byte_perm(bytes, 0, 0x4431))}
                                           : Strip{widen(bytes & 0xffffu), widen(bytes >> 16)};
        }
      }
    }
  }

  static __device__ __forceinline__ uint32_t widen(uint32_t pair) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    return static_cast<uint32_t>(halves.y) << 16 | halves.x;
  }
};

/// A warp's view of eight results of a token: tile j is 16 columns of them, transposed.
template <class Source>
class ResultTile;

template <>
class ResultTile<__half> {
 public:
  __device__ __forceinline__ ResultTile(char* slot, char* scratch, int pitch, int first_query,
                                        int num_queries, int first_column, int lane) {
    const int s = first_query + row_in_strip(lane);
    rows_ = s < num_queries ? slot + s * pitch + (first_column + column_in_strip(lane)) * 2
                            : scratch + row_in_strip(lane) * 32 + column_in_strip(lane) * 2;
  }
  template <class Pack>
  __device__ __forceinline__ void store(int j, const float (&c)[4], const Pack& pack) const {
    store_strip_transposed(rows_ + j * 32, {pack(c[0], c[1]), pack(c[2], c[3])});
  }

 private:
  char* rows_;
};

/// Columns 2 r and 2 r + 1 of a tile stand in rows r and r + 8, in the same lane: one word.
template <>
class ResultTile<Fp8> {
 public:
  __device__ __forceinline__ ResultTile(char* slot, char* scratch, int pitch, int first_query,
                                        int num_queries, int first_column, int lane) {
    const auto row = [&](int s) {
      return (s < num_queries ? slot + s * pitch + first_column * 2 : scratch) + lane / 4 * 4;
    };
    rows_[0] = row(first_query + lane % 4 * 2);
    rows_[1] = row(first_query + lane % 4 * 2 + 1);
  }
  template <class Pack>
  __device__ __forceinline__ void store(int j, const float (&c)[4], const Pack& pack) const {
    *reinterpret_cast<uint32_t*>(rows_[0] + j * 32) = pack(c[0], c[2]);
    *reinterpret_cast<uint32_t*>(rows_[1] + j * 32) = pack(c[1], c[3]);
  }

 private:
  char* rows_[2];
};

/// What one compute warp does.
template <int kQueryGroups, int kTiles, int kSourceGroups, class Source>
struct AttendHalfWarp {
  using Tiles = HalfTiles<Source, kSourceGroups>;
  static constexpr int kRowPairs = kQueryGroups / 2 + 1;
  static constexpr WeightMap kWeights = weight_map(kQueryGroups, kSourceGroups);
  // Tiles that P2 works on at once: the compiler keeps loads behind stores, so tiles one after the
  // other would wait for each other.
  static constexpr int kAtOnce = kQueryGroups * kSourceGroups > 1 ? 4 / kSourceGroups
                                                                  : (kTiles == 9 ? 9 : 8);
  // Tiles that certainly have the same scales, and sets of scales that a slice may meet.
  static constexpr int kRun = kTiles % 8 == 0 ? 8 : 1;
  static constexpr int kScaleSets = kTiles == 8 ? 1 : 2;
  static constexpr int kLoads = 4 / kSourceGroups;  // tiles that P1 loads at once
  // Sums of products that do not wait for each other.
  static constexpr int kChains = kQueryGroups * kSourceGroups == 1 && kRun > 1 ? 4 : 2;
  static constexpr float kTop = 16384.0f;  // what the largest is scaled to, or twice that

  const AttendParams& p;
  SharedHead& head;
  char* base;  // of shared memory
  const Sums& sums;
  int warp, lane;
  int second_set;  // the first tile that has the second set of scales
  Strip high[kTiles][kQueryGroups], low[kTiles][kQueryGroups];  // queries of this warp's columns
  float power[kQueryGroups];                                    // 2^a of query 8 g + lane / 4

  __device__ __forceinline__ AttendHalfWarp(const AttendParams& params, SharedHead& shared_head,
                                            const Share& share, const Sums& shared_sums)
      : p(params),
        head(shared_head),
        base(reinterpret_cast<char*>(&shared_head)),
        sums(shared_sums),
        warp(warp_of_cta()),
        lane(lane_of_warp()) {
    const int columns = p.scales.columns();
    second_set = (columns - ((share.column + warp * kTiles * 16) & (columns - 1))) / 16;
#pragma unroll
    for (int g = 0; g < kQueryGroups; ++g) {
      const int s = 8 * g + lane / 4;
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
        high[j][g] = {left.high, right.high};
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

  /// The scales of the sources 8 n + lane % 4 * 2 and the next, of the slice's first and last tile.
  struct Scales {
    float2 of[kScaleSets][kSourceGroups];
  };
  __device__ __forceinline__ Scales scales(int stage, int b, const Share& share) const {
    Scales result;
    const Bf16* const all = reinterpret_cast<const Bf16*>(base + p.map.scales) +
                            (stage * p.plan.batch + b) * p.num_sources * p.map.scale_groups;
#pragma unroll
    for (int set = 0; set < kScaleSets; ++set) {
      const int column = share.column + (warp * kTiles + (set == 0 ? 0 : kTiles - 1)) * 16;
      const int group = (column >> p.scales.shift) - (share.column >> p.scales.shift);
#pragma unroll
      for (int n = 0; n < kSourceGroups; ++n) {
        const int first = 8 * n + lane % 4 * 2;
        const auto at = [&](int source) {
          const int row = min(source, p.num_sources - 1);
          return p.scaled() ? __bfloat162float(all[row * p.map.scale_groups + group]) : 1.0f;
        };
        result.of[set][n] = {at(first), at(first + 1)};
      }
    }
    return result;
  }

  /// Whether tile j has the second set of scales.
  __device__ __forceinline__ bool is_second(int j) const {
    return kScaleSets == 2 && (kRun == 8 ? j >= 8 : j >= second_set);
  }

  /// P1 of a step: the warp's share of <u_s, v_n> and of <v_n, v_n>.
  __device__ __forceinline__ void scores(int step, RingCursor stage, const Share& share) const {
    head.input_full[stage.slot].wait(stage.parity);
    for (int b = 0; b < p.plan.batch; ++b) {
      const Tiles source = tiles(stage.slot, b);
      const Scales scale = scales(stage.slot, b, share);
      Accum acc[kChains][kRowPairs][kSourceGroups];
      Accum total[kRowPairs][kSourceGroups];  // with the scales
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          total[m][n] = Accum::zero();
#pragma unroll
          for (int i = 0; i < kChains; ++i) {
            acc[i][m][n] = Accum::zero();
          }
        }
      }
#pragma unroll
      for (int first = 0; first < kTiles; first += kLoads) {
        Strip v[kLoads][kSourceGroups];  // (n, d)
        source.template load<false, kTiles>(first, lane, v);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int j = first + i;
          if (j < kTiles) {
            multiply(j, v[i], acc);
            if ((j + 1) % kRun == 0) {
              add_scaled(scale.of[is_second(j) ? kScaleSets - 1 : 0], acc, total);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int g = 2 * m + i / 2;
            total[m][n].c[i] *= g < kQueryGroups ? power[g < kQueryGroups ? g : 0] : 1.0f;
          }
        }
      }
      store_partials(p, sums, step, warp, b, lane, total);
    }
    __syncwarp();
    if (lane == 0) {
      head.partials_full[pair_slot(step)].arrive();
    }
  }

  __device__ __forceinline__ void multiply(int j, const Strip (&v)[kSourceGroups],
                                           Accum (&acc)[kChains][kRowPairs][kSourceGroups]) const {
#pragma unroll
    for (int n = 0; n < kSourceGroups; ++n) {
#pragma unroll
      for (int m = 0; m < kRowPairs; ++m) {
        const Strip none = {0, 0};
        const bool last = m == kRowPairs - 1;
        const int g = 2 * m < kQueryGroups ? 2 * m : 0;
        const int h = 2 * m + 1 < kQueryGroups ? 2 * m + 1 : 0;
        const bool top = 2 * m < kQueryGroups;
        mma_rows_half(acc[j % kChains][m][n], top ? high[j][g] : none, last ? v[n] : high[j][h],
                      v[n]);
        if (top) {
          mma_rows_half(acc[(j + kChains / 2) % kChains][m][n], low[j][g], last ? none : low[j][h],
                        v[n]);
        }
      }
    }
  }

  static __device__ __forceinline__ void add_scaled(const float2 (&scale)[kSourceGroups],
                                                    Accum (&acc)[kChains][kRowPairs][kSourceGroups],
                                                    Accum (&total)[kRowPairs][kSourceGroups]) {
#pragma unroll
    for (int m = 0; m < kRowPairs; ++m) {
#pragma unroll
      for (int n = 0; n < kSourceGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float factor = i % 2 == 0 ? scale[n].x : scale[n].y;
          float sum = acc[0][m][n].c[i] + acc[1][m][n].c[i];
          if constexpr (kChains == 4) {
            sum += acc[2][m][n].c[i] + acc[3][m][n].c[i];
          }
          if (m == kRowPairs - 1 && i >= 2) {
            sum *= factor;  // of v v^T
          }
          total[m][n].c[i] = fmaf(sum, factor, total[m][n].c[i]);
        }
#pragma unroll
        for (int i = 0; i < kChains; ++i) {
          acc[i][m][n] = Accum::zero();
        }
      }
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
      float largest = 0.0f;
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
  __device__ __forceinline__ void mix(int step, int input_slot, RingCursor result,
                                      const Share& share) const {
    head.result_ready[result.slot].wait(result.parity);
    head.weights_full[pair_slot(step)].wait(pair_parity(step));
    const float* weights = reinterpret_cast<const float*>(base + p.map.weights) +
                           pair_slot(step) * p.plan.batch * kWeights.forward +
                           lane / 4 * kWeights.pitch + lane % 4 * 2;  // (batch, S, pitch)
    char* slot = base + p.map.results + result.slot * p.map.slot_bytes;
    char* const scratch = base + p.map.scratch + warp * scratch_bytes_per_warp(kTiles);
    const auto pack = [&](float x, float y) {
      return p.half_out ? pack_half(x, y) : pack_bf16(x, y);
    };
    for (int b = 0; b < p.plan.batch; ++b) {
      const Tiles source = tiles(input_slot, b);
      const Scales scale = scales(input_slot, b, share);
      float2 prob[kSourceGroups][kQueryGroups];
#pragma unroll
      for (int g = 0; g < kQueryGroups; ++g) {
#pragma unroll
        for (int n = 0; n < kSourceGroups; ++n) {
          prob[n][g] = *reinterpret_cast<const float2*>(weights + 8 * g * kWeights.pitch + 8 * n);
        }
      }
      Mixture mixture[kScaleSets];
#pragma unroll
      for (int set = 0; set < kScaleSets; ++set) {
        mixture[set] = mixture_of(prob, scale.of[set], lane);
      }
#pragma unroll
      for (int first = 0; first < kTiles; first += kAtOnce) {
        Strip v[kAtOnce][kSourceGroups];  // (d, n)
        source.template load<true, kTiles>(first, lane, v);
        Accum out[kAtOnce][kQueryGroups];  // (d, s)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int g = 0; g < kQueryGroups; ++g) {
            if (first + i < kTiles) {
              out[i][g] = Accum::zero();
              const auto& weight = mixture[is_second(first + i) ? kScaleSets - 1 : 0].weight;
              if constexpr (kSourceGroups == 2) {
                mma_columns_half(out[i][g], v[i][0], v[i][1], weight[0][g].high, weight[1][g].high);
                mma_columns_half(out[i][g], v[i][0], v[i][1], weight[0][g].low, weight[1][g].low);
              } else {
                mma_columns_half(out[i][g], v[i][0], v[i][0], weight[0][g].high, weight[0][g].low);
              }
            }
          }
        }
#pragma unroll
        for (int g = 0; g < kQueryGroups; ++g) {
          const ResultTile<Source> tile(slot, scratch, p.map.result_pitch, 8 * g, p.num_queries,
                                        warp * kTiles * 16, lane);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i < kTiles) {
              const float(&c)[4] = out[i][g].c;
              const float2 unit = mixture[is_second(first + i) ? kScaleSets - 1 : 0].power[g];
              tile.store(first + i, {c[0] * unit.x, c[1] * unit.y, c[2] * unit.x, c[3] * unit.y},
                         pack);
            }
          }
        }
      }
      slot += p.num_queries * p.map.result_pitch;
      weights += kWeights.forward;
    }
    fence_before_bulk_copies();
    __syncwarp();
    if (lane == 0) {
      head.input_free[input_slot].arrive();
      head.result_done[result.slot].arrive();
    }
  }
};

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_HALF_CUH_
