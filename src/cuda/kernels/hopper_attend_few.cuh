// Phase 1 with up to four queries over up to eight float8 sources.
//
//   v_n[d]  = scale_n[d / W] q_n[d]          W = 128, or D
//   r_n     = rsqrt(mean(v_n^2) + eps)       logit_sn = scale r_n <u_s, v_n>
//   p_s     = softmax_n(logit_s)             out_s    = sum_n p_sn v_n
//
// in    q: N <= 8 rows [T, D] float8_e4m3; scale: N x [T, D / W] float8_e8m0; u: [S, D] float32
// out   out: S <= 4 rows [T, D] bfloat16 or float16; lse [S, T]; logits [T, S N], inv_rms [T, N]
// bytes every row once: N units of T * D bytes, S of two bytes an element
//
// Half the bytes leave half the time for the same instructions, and these are what limits this
// case. So a team of few warps takes whole tokens, one after the other, each warp up to 1024
// columns of them, and products are made on tensor cores, in float16, where few instructions do it:
//
//   sums     c (16, 8) += a (16, 16) b (16, 8). a: eight sources and 16 columns. b: the queries,
//            rounded, and their remainders: <q_n, u_s>; or once more the sources: <q_n, q_n>
//   mixture  c (16, 8) += a (16, 8) b (8, 8). a: 16 columns and eight sources. b: the weights of S
//            queries in S of eight columns, zeros in the others. 8 / S tiles of 16 columns have
//            their results in columns of their own of one c, where a lane has two neighbours
//
// Teams of a block share the queries and nothing else. Several of them hide each other's waiting:
//
//   wait for the rows -> sums of this warp's columns -> operands of the mixture to registers
//                     -> team meets -> rows of the next token, by one warp
//                     -> softmax, in every warp -> weights p scale -> mixture, out
//
// u / 2^a, a power of two for each query and warp, is a float16 and the float16 of its remainder:
// 22 bits count. p scale / 2^b is too where out is float16; a bfloat16 has 8 bits, to which 11 add
// an eighth of its rounding. NaN among q or the scales makes the token's logits NaN, and with them
// its results. The order of sums depends on D and on the room for queries, never on T.

#ifndef FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_FEW_CUH_
#define FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_FEW_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/chunk.cuh"
#include "cuda/device/grid.cuh"
#include "cuda/device/hopper_barrier.cuh"
#include "cuda/device/hopper_copy.cuh"
#include "cuda/kernels/hopper_attend_half.cuh"
#include "cuda/policy.h"

namespace flash_attn_res::cuda::hopper {

struct AttendFewParams {
  RowTable<kFewSources> sources;  // N x [T, D]
  ScaleTable scales;
  RowTable<kFewQueries> out;  // S x [T, D]
  const float* queries;       // [S, D]
  float* lse;                 // [S, T]
  float* logits;              // [T, S * N], may be null
  float* inv_rms;             // [T, N], may be null
  int64_t queries_stride, lse_stride, logits_stride, inv_rms_stride;
  unsigned tokens;
  int num_sources, num_queries, dim;
  float scale, eps, inv_dim;
  bool half_out;           // out is float16, not bfloat16
  unsigned warps_of_team;  // that share a token
};

/// What a warp has in shared memory of its own.
template <int kQueries, int kChunks>
struct FewWarp {
  static constexpr int kColumns = kChunks * 256;
  static constexpr int kGroups = kChunks * 2;  // that may have a scale of their own

  alignas(16) __half weight[2][kGroups][kQueries][kFewSources];  // p scale / 2^b and its remainder
  float power[kGroups][kQueries];                                // 2^b
  float scale[kGroups][kFewSources];                             // of the token at hand
  float sums[2][kQueries + 1][kFewSources];  // of two tokens: <u_s, v_n>, then <v_n, v_n>
};

/// Where a team has the rows of a token, one after the other, and what they complete on.
struct FewRows {
  char* data;
  Barrier* copied;
  int pitch;

  /// Bytes between rows: eight of them begin in different banks.
  static FLASH_ATTN_RES_HOPPER_BOTH int pitch_of(int columns) { return columns + 16; }
  static FLASH_ATTN_RES_HOPPER_BOTH int64_t bytes(int columns, int num_sources) {
    return static_cast<int64_t>(pitch_of(columns)) * num_sources + 16;
  }
};

/// The queries of a warp's columns as operands b: column n has query n % 4, rounded if n < 4, else
/// the remainder. Lane 4 n + i has the 16 bytes i: two products of a block of four.
template <int kQueries, int kChunks>
struct FewQueries {
  uint4 of[kChunks * 4][2][2 * kQueries][4];
  uint32_t largest[4];  // bits of the largest absolute values
};

template <int kQueries, int kChunks>
constexpr int64_t attend_few_shared_bytes(int64_t teams, int64_t warps_of_team, int num_sources) {
  using Warp = FewWarp<kQueries, kChunks>;
  const int columns = static_cast<int>(warps_of_team) * Warp::kColumns;
  return warps_of_team * static_cast<int64_t>(sizeof(FewQueries<kQueries, kChunks>)) +
         teams * (warps_of_team * static_cast<int64_t>(sizeof(Warp)) +
                  FewRows::bytes(columns, num_sources));
}

/// c (16, 8) += a (16, 16) b (16, 8) in float16, where only the rows 0 - 7 of a and c mean
/// anything: `a` is the two blocks of those rows. The second block stands in rows 8 - 15 as well,
/// so that the first two registers of a are a strip of b too: its rows' products with themselves.
__device__ __forceinline__ void mma_eight_rows(Accum& c, Strip a, Strip b) {
  uint32_t any;
  asm("" : "=r"(any));  // what a register happens to hold
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c.c[0], c.c[1], c.c[2], c.c[3], a.left, a.right, a.right,
                                          any, b.left, b.right, c.c[0], c.c[1], c.c[2], c.c[3]);
}

/// What one warp does.
template <int kQueries, int kChunks>
struct AttendFewWarp {
  using Memory = FewWarp<kQueries, kChunks>;
  using Queries = FewQueries<kQueries, kChunks>;
  using Tiles = HalfTiles<Fp8, 1>;
  static constexpr int kGroups = Memory::kGroups;
  static constexpr int kTilesOfGroup = static_cast<int>(kScaleGroup) / 16;
  static constexpr int kTiles = kGroups * kTilesOfGroup;
  static constexpr int kTogether = 8 / kQueries;         // tiles whose results share a product's c
  static constexpr int kParts = kFewQueries / kQueries;  // lanes that share a sum over warps
  static constexpr int kScalesOfLane = (kGroups + 3) / 4;
  static constexpr unsigned kAll = 0xffffffffu;
  static constexpr float kTop = 16384.0f;  // what the largest is scaled to, or twice that

  const AttendFewParams& p;
  const unsigned team, warp, lane;  // of the block; of the team; of the warp
  const int column;                 // this warp's first
  Queries& queries;
  Memory* const team_memory;  // of the team's first warp
  Memory& own;
  FewRows rows;
  float2 power = {};  // 2^a of the queries in the columns 2 i and 2 i + 1 of b

  __device__ __forceinline__ AttendFewWarp(const AttendFewParams& params, char* shared,
                                           unsigned teams)
      : p(params),
        team(threadIdx.x / 32 / params.warps_of_team),
        warp(threadIdx.x / 32 % params.warps_of_team),
        lane(threadIdx.x % 32),
        column(static_cast<int>(warp) * Memory::kColumns),
        queries(reinterpret_cast<Queries*>(shared)[warp]),
        team_memory(reinterpret_cast<Memory*>(shared + sizeof(Queries) * params.warps_of_team) +
                    team * params.warps_of_team),
        own(team_memory[warp]) {
    const int columns = static_cast<int>(params.warps_of_team) * Memory::kColumns;
    const unsigned bytes = static_cast<unsigned>(FewRows::bytes(columns, params.num_sources));
    char* const first = shared + (sizeof(Queries) + teams * sizeof(Memory)) * params.warps_of_team;
    rows.pitch = FewRows::pitch_of(columns);
    rows.data = first + team * bytes;
    rows.copied = reinterpret_cast<Barrier*>(rows.data + (bytes - 16));
  }

  /// Before the block meets. What lies beyond a row is zero.
  __device__ __forceinline__ void begin() {
    const int beyond = column + Memory::kColumns - p.dim;  // of this warp's columns
    for (int n = 0; n < p.num_sources; ++n) {
      for (int at = static_cast<int>(lane) * 16; at < beyond; at += 32 * 16) {
        *reinterpret_cast<uint4*>(rows.data + n * rows.pitch + p.dim + at) = {};
      }
    }
    if (warp == 0 && lane == 0) {
      rows.copied->init(p.num_sources);
      publish_barriers();
    }
    __syncwarp();
  }

  /// Begins the copies of a token, by one warp of the team, a row a lane.
  __device__ __forceinline__ void copy(unsigned t, CachePolicy policy) const {
    const int n = static_cast<int>(lane);
    if (warp == 0 && n < p.num_sources) {
      rows.copied->arrive_and_expect(p.dim);
      load_row(rows.data + n * rows.pitch, p.sources.data[n] + t * p.sources.stride[n], p.dim,
               *rows.copied, policy);
    }
  }
  /// Of every second token `turn` is 1: the parity of what is waited for, too.
  __device__ __forceinline__ void wait_for_rows(unsigned turn) const { rows.copied->wait(turn); }

  /// Splits the queries of this warp's columns; the teams share the work.
  __device__ __forceinline__ void split_queries(unsigned teams) {
    const int n = static_cast<int>(lane / 4);
    const int s = n % kQueries;
    const bool exists = s < p.num_queries;
    const float* const query = p.queries + (exists ? s : 0) * p.queries_stride;
    const auto at = [&](int block, int tile, int j) {
      const int col =
          column + block * 64 + tile * 16 + Tiles::column(static_cast<int>(lane % 4)) + j;
      return exists && col < p.dim ? query[col] : 0.0f;
    };
    uint32_t* const most = queries.largest;
    if (team == 0 && lane < kQueries) {
      most[lane] = 0;
    }
    __syncthreads();
    float largest = 0.0f;
#pragma unroll 1
    for (unsigned block = team; block < 4 * kChunks; block += teams) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          largest = fmaxf(largest, fabsf(at(static_cast<int>(block), tile, j)));
        }
      }
    }
    atomicMax(&most[s], __float_as_uint(largest));
    __syncthreads();
    const PowerOfTwo unit = PowerOfTwo::of(__uint_as_float(most[s]));
    const auto power_of = [&](unsigned column_of_b) {
      return PowerOfTwo::of(__uint_as_float(most[column_of_b % kFewQueries % kQueries])).value *
             (1.0f / kTop);
    };
    power = {power_of(lane % 4 * 2), power_of(lane % 4 * 2 + 1)};
    if (n % kFewQueries != s) {
      return;
    }
#pragma unroll 1
    for (unsigned block = team; block < 4 * kChunks; block += teams) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int tile = 2 * half + w / 2;
          const int j = w % 2 * Tiles::kSecond;
          const SplitHalfPair split =
              SplitHalfPair::of(at(static_cast<int>(block), tile, j) * unit.inverse * kTop,
                                at(static_cast<int>(block), tile, j + 1) * unit.inverse * kTop);
          words[w] = n < kFewQueries ? split.high : split.low;
        }
        queries.of[block][half][n / kFewQueries * kQueries + s][lane % 4] = {words[0], words[1],
                                                                             words[2], words[3]};
      }
    }
  }

  /// This lane's scales of a token, as stored: of source lane % 8 in every fourth group.
  struct ScaleBits {
    uint32_t of[kScalesOfLane];
  };
  __device__ __forceinline__ ScaleBits load_scales(unsigned t) const {
    const int n = min(static_cast<int>(lane % kFewSources), p.num_sources - 1);
    const uint8_t* const row = p.scales.data[n] + t * p.scales.stride;
    ScaleBits bits;
#pragma unroll
    for (int k = 0; k < kScalesOfLane; ++k) {
      const int group = static_cast<int>(lane / kFewSources) + 4 * k;
      const int col = min(column + group * static_cast<int>(kScaleGroup), p.dim - 1);
      bits.of[k] = __ldg(row + (col >> p.scales.shift));
    }
    return bits;
  }
  __device__ __forceinline__ void store_scales(const ScaleBits& bits) {
#pragma unroll
    for (int k = 0; k < kScalesOfLane; ++k) {
      const unsigned group = lane / kFewSources + 4 * k;
      if (kGroups % 4 == 0 || group < kGroups) {
        own.scale[group][lane % kFewSources] = scale_from_bits(bits.of[k]);
      }
    }
  }

  /// The warp's share of <u_s, v_n> and of <v_n, v_n>. Two groups in turn: a product waits for the
  /// one before it.
  __device__ __forceinline__ void sum(const Tiles& tiles, unsigned turn) {
    const unsigned n = lane / 4;
    const unsigned i = lane % 4;
    const uint4* query = &queries.of[0][0][n / kFewQueries * kQueries + n % kQueries][i];
    float2 dot = {};
    float square = 0.0f;
#pragma unroll 1  // or operands are loaded early, and registers do not suffice
    for (int group = 0; group < kGroups; group += 2) {
      Accum dots[2] = {};     // this lane's: source n with the columns 2 i and 2 i + 1 of b
      Accum squares[2] = {};  // source n with the sources 2 i and 2 i + 1
#pragma unroll
      for (int block = 0; block < 2; ++block) {  // of 64 columns of a group
        uint32_t raw[2][4][1];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          tiles.at((group + g) * static_cast<int>(kScaleGroup) + block * 64)
              .template load<false, kTiles>(0, static_cast<int>(lane), raw[g]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 u[2];
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            u[g] = query[((2 * (group + g) + block) * 2 + half) * (2 * kQueries * 4)];
          }
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int g = 0; g < 2; ++g) {
              const Strip v = Tiles::template operand<false>(raw[g][2 * half + tile][0]);
              const Strip b = tile == 0 ? Strip{u[g].x, u[g].y} : Strip{u[g].z, u[g].w};
              mma_eight_rows(dots[g], v, b);
              mma_eight_rows(squares[g], v, v);
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const float scale = own.scale[group + g][n];
        const float own_square = n % 2 == 0 ? squares[g].c[0] : squares[g].c[1];
        dot.x = fmaf(dots[g].c[0], scale, dot.x);
        dot.y = fmaf(dots[g].c[1], scale, dot.y);
        square = fmaf(own_square * scale, scale, square);
      }
    }
    dot.x *= power.x;
    dot.y *= power.y;
    dot.x += __shfl_xor_sync(kAll, dot.x, 2);  // the remainders'
    dot.y += __shfl_xor_sync(kAll, dot.y, 2);
    if (2 * i < kQueries) {
      own.sums[turn][2 * i][n] = dot.x;
    }
    if (2 * i + 1 < kQueries) {
      own.sums[turn][2 * i + 1][n] = dot.y;
    }
    if (i == n / 2) {
      own.sums[turn][kQueries][n] = square;
    }
  }

  /// Waits for the other warps of the team.
  __device__ __forceinline__ void meet() const {
    if (p.warps_of_team == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(p.warps_of_team * 32) : "memory");
    }
  }

  /// The weights of this warp's mixtures. Lane (part, s, n) has query s and source n.
  __device__ __forceinline__ void softmax(unsigned t, unsigned turn) {
    const int n = static_cast<int>(lane % kFewSources);
    const int s = static_cast<int>(lane / kFewSources % kQueries);
    const unsigned part = lane / (kFewSources * kQueries);
    float dot = 0.0f;
    float square = 0.0f;
#pragma unroll(kParts > 2 ? 1 : 4)
    for (unsigned w = part; w < p.warps_of_team; w += kParts) {
      dot += team_memory[w].sums[turn][s][n];
      square += team_memory[w].sums[turn][kQueries][n];
    }
#pragma unroll
    for (int offset = 16; offset >= kFewSources * kQueries; offset /= 2) {
      dot += __shfl_xor_sync(kAll, dot, offset);
      square += __shfl_xor_sync(kAll, square, offset);
    }
    const bool exists = n < p.num_sources;
    const float inv_rms = rsqrtf(square * p.inv_dim + p.eps);
    const float logit = exists ? p.scale * inv_rms * dot : -INFINITY;
    const float largest = max_of_eight(logit);
    const float weight = exists ? expf(logit - largest) : 0.0f;
    float sum = weight;
#pragma unroll
    for (int offset = kFewSources / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAll, sum, offset);
    }
    const float prob = __fdividef(weight, sum);
#pragma unroll 4
    for (int first = 0; first < kGroups; first += kParts) {
      const unsigned group = first + part;
      const bool is_group = kGroups % kParts == 0 || group < kGroups;
      const float term = is_group ? prob * own.scale[group][n] : 0.0f;
      const PowerOfTwo unit = PowerOfTwo::of(max_of_eight(fmaxf(term, 0x1p-112f)));
      const float scaled = term * unit.inverse * kTop;
      const __half high = __float2half_rn(scaled);
      if (is_group) {
        own.weight[0][group][s][n] = high;
        if (p.half_out) {
          own.weight[1][group][s][n] = __float2half_rn(scaled - __half2float(high));
        }
        if (n == 0) {
          own.power[group][s] = unit.value * (1.0f / kTop);
        }
      }
    }
    if (warp == 0 && part == 0 && s < p.num_queries && exists) {
      if (p.logits != nullptr) {
        p.logits[t * p.logits_stride + s * p.num_sources + n] = logit;
      }
      if (p.inv_rms != nullptr && s == 0) {
        p.inv_rms[t * p.inv_rms_stride + n] = inv_rms;
      }
      if (n == 0) {
        p.lse[s * p.lse_stride + t] = largest + logf(sum);
      }
    }
  }
  static __device__ __forceinline__ float max_of_eight(float value) {
#pragma unroll
    for (int offset = kFewSources / 2; offset > 0; offset /= 2) {
      value = fmaxf(value, __shfl_xor_sync(kAll, value, offset));
    }
    return value;
  }

  /// The sources of this warp's columns as the mixture needs them, as stored.
  struct Held {
    uint32_t of[kTiles / 4][4][1];
  };
  __device__ __forceinline__ void load(const Tiles& tiles, Held& held) const {
#pragma unroll
    for (int i = 0; i < kTiles / 4; ++i) {
      tiles.template load<true, kTiles>(4 * i, static_cast<int>(lane), held.of[i]);
    }
  }

  /// out_s of this warp's columns.
  template <bool kHalfOut>
  __device__ __forceinline__ void mix(unsigned t, const Held& held) const {
    const unsigned r = lane / 4;  // of an operand b: the column; of c: half the column of the tile
    const unsigned i = lane % 4;
    // Of c this lane has the columns 2 i and 2 i + 1: of which tile and query each is.
    const auto tile_of = [&](unsigned k) { return (2 * i + k) / kQueries; };
    const auto query_of = [&](unsigned k) { return (2 * i + k) % kQueries; };
    char* to[2];
    bool exists[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const unsigned s = query_of(k);
      exists[k] = s < static_cast<unsigned>(p.num_queries);
      to[k] = const_cast<char*>(p.out.data[exists[k] ? s : 0]) +
              t * p.out.stride[exists[k] ? s : 0] +
              (column + static_cast<int>(tile_of(k) * 16 + r * 2)) * 2;
    }
    constexpr int kInTurn = kQueries == 1 ? 2 : 1;  // groups; with more queries there are more c
#pragma unroll
    for (int first_group = 0; first_group < kGroups; first_group += kInTurn) {
      uint32_t high[kInTurn], low[kInTurn];
      float power_of[kInTurn][2];
#pragma unroll
      for (int g = 0; g < kInTurn; ++g) {
        const auto weight_of = [&](int part) {
          return *reinterpret_cast<const uint32_t*>(
              &own.weight[part][first_group + g][r % kQueries][2 * i]);
        };
        high[g] = weight_of(0);
        low[g] = kHalfOut ? weight_of(1) : 0;
        power_of[g][0] = own.power[first_group + g][query_of(0)];
        power_of[g][1] = own.power[first_group + g][query_of(1)];
      }
#pragma unroll
      for (int set = 0; set < kQueries; ++set) {
        Accum c[kInTurn] = {};
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const bool is_column = r / kQueries == static_cast<unsigned>(k);
#pragma unroll
          for (int g = 0; g < kInTurn; ++g) {
            const int tile = (first_group + g) * kTilesOfGroup + set * kTogether + k;
            const Strip v = Tiles::template operand<true>(held.of[tile / 4][tile % 4][0]);
            mma_columns_half(c[g], v, is_column ? high[g] : 0);
            if (kHalfOut) {
              mma_columns_half(c[g], v, is_column ? low[g] : 0);
            }
          }
        }
#pragma unroll
        for (int g = 0; g < kInTurn; ++g) {
          const int first =
              (first_group + g) * static_cast<int>(kScaleGroup) + set * kTogether * 16;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int col = column + first + static_cast<int>(tile_of(k)) * 16;
            if (exists[k] && col < p.dim) {
              *reinterpret_cast<uint32_t*>(to[k] + first * 2) =
                  pack_scaled<kHalfOut>(c[g].c[k], c[g].c[k + 2], power_of[g][k], power_of[g][k]);
            }
          }
        }
      }
      __syncwarp();  // or operands of further groups are widened early
    }
  }
};

template <int kQueries, int kChunks>
__global__ void __launch_bounds__(attend_few_form(kQueries, kChunks).max_threads())
    attend_few_kernel(const __grid_constant__ AttendFewParams p) {
  using Warp = AttendFewWarp<kQueries, kChunks>;
  extern __shared__ float4 shared[];
  const unsigned teams = blockDim.x / (p.warps_of_team * 32);
  Warp warp(p, reinterpret_cast<char*>(shared), teams);
  const CachePolicy policy(CacheHint::kEvictFirst);
  unsigned t = blockIdx.x + warp.team * gridDim.x;
  warp.begin();
  wait_for_previous_grid();
  begin_next_grid();
  typename Warp::ScaleBits scales = {};
  if (t < p.tokens) {
    warp.copy(t, policy);
    scales = warp.load_scales(t);
  }
  warp.split_queries(teams);
  __syncthreads();
  const typename Warp::Tiles tiles(warp.rows.data + warp.column, warp.rows.pitch, p.num_sources,
                                   static_cast<int>(warp.lane));
  unsigned turn = 0;
#pragma unroll 1
  for (; t < p.tokens; turn ^= 1) {
    const unsigned next = t + teams * gridDim.x;
    warp.store_scales(scales);
    __syncwarp();
    warp.wait_for_rows(turn);
    warp.sum(tiles, turn);
    typename Warp::Held held;
    warp.load(tiles, held);
    warp.meet();
    if (next < p.tokens) {
      warp.copy(next, policy);
      scales = warp.load_scales(next);
    }
    warp.softmax(t, turn);
    __syncwarp();
    if (p.half_out) {
      warp.template mix<true>(t, held);
    } else {
      warp.template mix<false>(t, held);
    }
    __syncwarp();
    t = next;
  }
}

}  // namespace flash_attn_res::cuda::hopper

#endif  // FLASH_ATTN_RES_CUDA_KERNELS_HOPPER_ATTEND_FEW_CUH_
