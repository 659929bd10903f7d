// Launch choices as data: which kernel, how many threads, how much shared memory. Every choice is a
// plain function of shapes, dtypes and the device's limits, so that it can be printed and tested,
// and the first call runs as fast as the rest. Architecture-specific kernels take their entries
// here too: a policy says which kernel serves a case before anything is launched.
//
// Choices that decide the order of a sum (slices, splits, threads of a token) depend on the shapes
// of one token and, for sums over tokens, on T; never on the device. The one exception is the
// number of blocks of `read_backward`, whose sums over tokens also depend on how many
// multiprocessors there are.

#ifndef FLASH_ATTN_RES_CUDA_POLICY_H_
#define FLASH_ATTN_RES_CUDA_POLICY_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <span>

namespace flash_attn_res::cuda {

/// What a policy may know of a device.
struct DeviceLimits {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
  int64_t shared_per_block = 0;           // bytes, with the opt-in
  int64_t shared_per_multiprocessor = 0;  // bytes
  int64_t memory_bytes_per_us = 0;        // by clock and bus width; 0: unknown
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Queries padded to whole tiles of eight: rows of scores stay aligned to 16 bytes.
constexpr int64_t padded_queries(int64_t num_queries) { return round_up(num_queries, 8); }

/// Threads that the registers of a multiprocessor allow: 16384 for each quarter of its warps.
constexpr int threads_with(int registers) { return 16384 / (registers * 32) * 4 * 32; }

// ---------------------------------------------------------------------------------------- attend

/// How `attend` splits <u, k> over blocks.
struct ScoresPolicy {
  int group_queries;              // queries that a block keeps in shared memory, a multiple of 8
  int slice_cols;                 // columns of a slice, a multiple of 256
  int num_slices;                 // slices of the key's columns
  int64_t shared_bytes;           // of a block
  int blocks_per_multiprocessor;  // of the grid: few, since each loads its slice of the queries

  bool operator==(const ScoresPolicy&) const = default;
};

constexpr ScoresPolicy choose_scores(int64_t num_queries, int64_t dim, int64_t key_dim) {
  // 32 queries x 512 columns are 64 KB: three blocks a multiprocessor of sm_90, two of sm_80, one
  // of sm_86. More queries take further blocks, which read the sources again.
  constexpr int64_t kMaxGroup = 32;
  constexpr int64_t kSharedFloats = 16384;
  constexpr int64_t kSpan = 256;
  constexpr int64_t kMaxCols = 1024;  // a warp's rows of one slice then stay in L1
  const int64_t group = std::min(padded_queries(num_queries), kMaxGroup);
  const int64_t first_col = (dim - key_dim) / 8 * 8;
  const int64_t cols =
      std::min({kMaxCols, kSharedFloats / group / kSpan * kSpan, round_up(dim - first_col, kSpan)});
  return {static_cast<int>(group), static_cast<int>(cols),
          static_cast<int>(ceil_div(dim - first_col, cols)), group * cols * 4, 3};
}

/// Threads of a block whose threads each have one chunk of a token: (chunks, tokens).
struct ElementwisePolicy {
  int chunks;      // chunks of a row in one block
  int tokens;      // tokens in one block
  int col_blocks;  // blocks that share a row

  bool operator==(const ElementwisePolicy&) const = default;
};

constexpr ElementwisePolicy choose_elementwise(int64_t dim, int64_t max_chunks,
                                               int64_t max_threads) {
  const int64_t chunks = ceil_div(dim, 8);
  const int64_t blocks = ceil_div(chunks, max_chunks);
  int64_t lanes = ceil_div(chunks, blocks);
  if (lanes >= 32) {
    lanes = std::min(round_up(lanes, 32), max_chunks);  // equal shares, whole warps
  } else {
    int64_t power = 1;
    while (power < lanes) {
      power *= 2;
    }
    lanes = std::min(power, max_chunks);
  }
  return {static_cast<int>(lanes), static_cast<int>(max_threads / lanes),
          static_cast<int>(ceil_div(chunks, lanes))};
}

/// How the sources' gradients of `attend` are computed.
struct DsourcesPolicy {
  ElementwisePolicy block;
  int64_t shared_bytes;           // queries of the block's columns
  int blocks_per_multiprocessor;  // of the grid

  bool operator==(const DsourcesPolicy&) const = default;
};

constexpr DsourcesPolicy choose_dsources(int64_t num_queries, int64_t dim) {
  constexpr int64_t kThreads = 256;
  constexpr int64_t kSharedBytes = 65536;
  const int64_t bytes_per_chunk = padded_queries(num_queries) * 32;
  int64_t max_chunks = std::min(kThreads, kSharedBytes / bytes_per_chunk);
  max_chunks = max_chunks >= 32 ? max_chunks / 32 * 32 : 16;  // 128 queries: 16 chunks
  const ElementwisePolicy block = choose_elementwise(dim, max_chunks, kThreads);
  return {block, block.chunks * bytes_per_chunk, 2};
}

/// How the queries' gradients of `attend` are split.
struct DqueriesPolicy {
  int tiles;        // warps of a block with different queries, eight each
  int shares;       // warps of a block with different rows
  int tile_groups;  // blocks with different queries
  int col_blocks;   // blocks with different columns, 256 each
  int splits;       // blocks with different tokens: a function of T alone
  int64_t tokens_per_split;
  int64_t shared_bytes;

  bool operator==(const DqueriesPolicy&) const = default;
};

constexpr DqueriesPolicy choose_dqueries(int64_t tokens, int64_t num_queries, int64_t dim,
                                         int64_t key_dim) {
  constexpr int64_t kMaxTiles = 4;
  constexpr int64_t kMaxWarps = 12;
  constexpr int64_t kMaxSplits = 64;  // partial sums stay small beside the sources
  constexpr int64_t kMinTokens = 64;
  const int64_t all_tiles = padded_queries(num_queries) / 8;
  const int64_t tiles = std::min(all_tiles, kMaxTiles);
  const int64_t per_split =
      std::max(kMinTokens, ceil_div(std::max<int64_t>(tokens, 1), kMaxSplits));
  const int64_t first_col = (dim - key_dim) / 8 * 8;
  return {static_cast<int>(tiles),
          static_cast<int>(std::min<int64_t>(8, kMaxWarps / tiles)),
          static_cast<int>(ceil_div(all_tiles, tiles)),
          static_cast<int>(ceil_div(dim - first_col, 256)),
          static_cast<int>(ceil_div(std::max<int64_t>(tokens, 1), per_split)),
          per_split,
          tiles * 8 * 256 * 4};
}

/// One compiled form of the kernel for few queries over few float8 sources.
struct AttendFewForm {
  int queries;    // that there is room for
  int chunks;     // of 256 columns, that a warp has
  int registers;  // of a thread, at most

  constexpr int max_threads() const { return threads_with(registers); }
};

/// By room for queries, the widest first: warps meet once a token, whatever they have of it.
inline constexpr AttendFewForm kAttendFew[] = {
    {1, 4, 128}, {1, 3, 96},  {1, 2, 80},  {2, 4, 128}, {2, 3, 128},
    {2, 2, 96},  {4, 4, 128}, {4, 3, 128}, {4, 2, 96},
};

constexpr AttendFewForm attend_few_form(int queries, int chunks) {
  for (const AttendFewForm& form : kAttendFew) {
    if (form.queries == queries && form.chunks == chunks) {
      return form;
    }
  }
  return {};
}

/// How `attend` with few queries over few float8 sources runs.
struct AttendFewPolicy {
  int queries;  // of the kernel's form; 0: none serves the call
  int chunks;   // likewise
  int warps;    // of a team, which has whole tokens
  int teams;    // of a block
  int64_t shared_bytes;

  bool operator==(const AttendFewPolicy&) const = default;
};

/// The form with room for the queries whose warps leave the fewest columns idle, the widest of
/// these, and as many teams as fit: a choice of a token's shape alone, since it decides the order
/// of sums. No form serves it where a team would be alone: nobody is at work while it waits. With
/// few tokens there are fewer teams. `shared_bytes(form, teams, warps)` are those of a block.
template <class SharedBytes>
constexpr AttendFewPolicy choose_attend_few(int64_t num_queries, int64_t dim, int64_t tokens,
                                            const DeviceLimits& limits,
                                            SharedBytes&& shared_bytes) {
  constexpr int64_t kMostTeams = 15;  // barriers of a block beside that of all its threads
  AttendFewForm best = {};
  int64_t warps = 0;
  for (const AttendFewForm& form : kAttendFew) {
    const int64_t needed = ceil_div(dim, 256 * form.chunks);
    const bool roomier = best.queries > 0 && form.queries > best.queries;
    if (form.queries >= num_queries && !roomier &&
        (best.queries == 0 || needed * form.chunks < warps * best.chunks)) {
      best = form;
      warps = needed;
    }
  }
  if (best.queries == 0) {
    return {};
  }
  int64_t teams = std::min(best.max_threads() / (warps * 32), kMostTeams);
  while (teams > 0 && shared_bytes(best, teams, warps) > limits.shared_per_block) {
    --teams;
  }
  if (teams < 2) {
    return {};
  }
  teams = std::clamp<int64_t>(ceil_div(tokens, limits.multiprocessors), 1, teams);
  return {best.queries, best.chunks, static_cast<int>(warps), static_cast<int>(teams),
          shared_bytes(best, teams, warps)};
}

// ------------------------------------------------------------------------------------------ read

/// Updates that a reading site may have beside the row that holds the partial sum.
inline constexpr int kReadRowsMaxUpdates = 2;

/// One compiled form of the kernel that keeps a token's rows in registers.
struct ReadRowsForm {
  int terms;        // rows that a thread has room for
  int chunks;       // 16-byte chunks of each row that a thread keeps
  int registers;    // of a thread, at most
  int blocks;       // that a multiprocessor should hold: a token that takes more is split
  int least_terms;  // the fewest that it is chosen for
  int least_warps;  // that a token takes, with at most an eighth of a row to spare; 0: all tokens

  constexpr int max_threads() const { return threads_with(registers); }
};

/// The forms for rows of one 16-bit type, by number of terms, more chunks a thread first: of many
/// tokens, what a warp does once a token is shared by two. The rows in registers are what a
/// multiprocessor has under way, of which it needs some 40 KB to keep the memory busy. Two blocks
/// at least, so that one loads while the other sums and stores; for six terms four smaller ones are
/// faster.
inline constexpr ReadRowsForm kReadRowsHalf[] = {
    {2, 2, 64, 2, 1, 0},    {2, 1, 64, 2, 1, 0},  {4, 2, 80, 2, 3, 0},   {4, 1, 72, 2, 3, 0},
    {6, 2, 96, 4, 5, 4},    {6, 1, 64, 2, 5, 0},  {8, 2, 112, 2, 7, 4},  {8, 1, 64, 2, 7, 0},
    {10, 2, 128, 2, 9, 4},  {10, 1, 72, 2, 9, 0}, {12, 1, 96, 2, 11, 0}, {18, 1, 128, 4, 13, 0},
    {32, 1, 168, 3, 19, 0},
};

/// The forms for float32 and mixed rows, which take 32 bytes a chunk.
inline constexpr ReadRowsForm kReadRowsAny[] = {
    {2, 1, 64, 4, 1, 0}, {4, 1, 72, 4, 3, 0}, {8, 1, 128, 4, 5, 0}, {12, 1, 168, 3, 9, 0}};

inline constexpr int kReadRowsMaxTerms = 32;

constexpr std::span<const ReadRowsForm> read_rows_forms(bool half) {
  return half ? std::span<const ReadRowsForm>(kReadRowsHalf)
              : std::span<const ReadRowsForm>(kReadRowsAny);
}

/// The form with room for exactly `terms` and `chunks`.
constexpr ReadRowsForm read_rows_form(bool half, int terms, int chunks) {
  for (const ReadRowsForm& form : read_rows_forms(half)) {
    if (form.terms == terms && form.chunks == chunks) {
      return form;
    }
  }
  return {};
}

/// How `read` runs with a token's rows in registers.
struct ReadRowsPolicy {
  int terms;    // of the kernel's form; 0: none serves the call
  int chunks;   // likewise
  int cluster;  // blocks that share a token's columns
  int threads;  // of a token in one block
  int tokens;   // of a block

  bool operator==(const ReadRowsPolicy&) const = default;
};

/// Calls of so few tokens leave multiprocessors idle: what counts is the work of one thread, which
/// has one chunk of each row.
inline constexpr int64_t kReadFewTokens = 128;

/// So few are split further, over as many blocks of four warps as a cluster may have. At D = 7168
/// an advance of 16 tokens then takes 2.6 us instead of 3.0; with 64 tokens it would take 4.6
/// instead of 3.7.
inline constexpr int64_t kReadThinTokens = 32;

/// Takes the form with the fewest terms that has room, and splits a token over the fewest blocks
/// that let the multiprocessor hold as many as the form wants, or over more where tokens are few.
/// The choice never shows in the results: sums over D have one order.
constexpr ReadRowsPolicy choose_read_rows(bool half, int64_t terms, int64_t dim, bool clusters,
                                          int64_t tokens) {
  constexpr int64_t kSegment = 256;  // columns of a warp and chunk
  constexpr int kMaxCluster = 8;     // that every device with clusters has
  // Narrow tokens share a block: a multiprocessor has room for 32 blocks.
  constexpr int64_t kMinThreads = 128;
  const bool few = clusters && tokens <= kReadFewTokens;
  const bool thin = clusters && tokens <= kReadThinTokens;
  const int most = clusters ? kMaxCluster : 1;
  for (const ReadRowsForm& form : read_rows_forms(half)) {
    if (form.terms < terms || (few && form.chunks > 1)) {
      continue;
    }
    const int64_t warps = ceil_div(dim, kSegment * form.chunks);
    if (form.least_warps > 0 &&
        (warps < form.least_warps || warps * kSegment * form.chunks * 8 > dim * 9)) {
      continue;
    }
    const auto threads = [&](int cluster) {
      return ceil_div(dim, kSegment * form.chunks * cluster) * 32;
    };
    int cluster = 1;
    while (cluster < most && (threads(cluster) > form.max_threads() / form.blocks ||
                              (thin && threads(2 * cluster) >= kMinThreads))) {
      cluster *= 2;
    }
    // Blocks of half the size where a token divides evenly: 4 to 14 % faster on an H200 with one
    // chunk a thread of nine or ten terms, as more terms still have; 8 % slower where it does not.
    while (clusters && !few && form.chunks == 1 && terms > 4 && cluster < most &&
           threads(cluster) > form.max_threads() / (2 * form.blocks) &&
           threads(2 * cluster) >= kMinThreads && dim % (kSegment * 2 * cluster) == 0) {
      cluster *= 2;
    }
    if (threads(cluster) <= form.max_threads()) {
      const int64_t shared = cluster == 1 ? std::max<int64_t>(kMinThreads / threads(1), 1) : 1;
      return {form.terms, form.chunks, cluster, static_cast<int>(threads(cluster)),
              static_cast<int>(shared)};
    }
    break;  // a form with more terms has no more threads
  }
  // Too wide for one chunk a thread: not for two.
  return few ? choose_read_rows(half, terms, dim, clusters, kReadFewTokens + 1) : ReadRowsPolicy{};
}

/// One compiled form of the kernel that copies the rows of a block's next token ahead.
struct ReadAheadForm {
  int terms;        // rows that a thread has room for
  int chunks;       // 16-byte chunks of each row that a thread keeps
  int registers;    // of a thread, at most
  int least_terms;  // the fewest that it is chosen for

  constexpr int max_threads() const { return threads_with(registers); }
};

/// By number of terms, the best first: four chunks of up to four terms, two of more; more would
/// leave too few warps. Three serve the widths that those do not divide.
inline constexpr ReadAheadForm kReadAhead[] = {
    {2, 4, 80, 1}, {2, 3, 80, 1},  {2, 2, 64, 1},  {4, 4, 128, 3}, {4, 3, 96, 3},   {4, 2, 80, 3},
    {6, 2, 96, 5}, {6, 3, 128, 5}, {8, 2, 112, 7}, {8, 3, 168, 7}, {10, 2, 128, 9}, {10, 3, 168, 9},
};

constexpr ReadAheadForm read_ahead_form(int terms, int chunks) {
  for (const ReadAheadForm& form : kReadAhead) {
    if (form.terms == terms && form.chunks == chunks) {
      return form;
    }
  }
  return {};
}

/// How `read` runs with rows copied ahead.
struct ReadAheadPolicy {
  int terms;             // of the kernel's form; 0: none serves the call
  int chunks;            // likewise
  int threads;           // of a block, which has whole tokens
  int64_t shared_bytes;  // of a block

  bool operator==(const ReadAheadPolicy&) const = default;
};

/// The first form that has room for the terms and whose threads share a row evenly. `sums` floats
/// are a token's sums of all segments, by number of terms that the form has room for.
template <class Sums>
constexpr ReadAheadPolicy choose_read_ahead(int64_t terms, int64_t updates, int64_t dim,
                                            const DeviceLimits& limits, Sums&& sums) {
  constexpr int64_t kSegment = 256;  // columns of a warp and chunk
  for (const ReadAheadForm& form : kReadAhead) {
    const int64_t columns = kSegment * form.chunks;
    if (form.terms < terms || form.least_terms > terms || dim % columns != 0) {
      continue;
    }
    const int64_t bytes = (form.terms + updates) * dim * 2 + 2 * 4 * sums(form.terms);
    const int64_t threads = dim / columns * 32;
    if (threads <= form.max_threads() && bytes <= limits.shared_per_block) {
      return {form.terms, form.chunks, static_cast<int>(threads), bytes};
    }
  }
  return {};
}

/// How the tokens are dealt out to blocks, of which `resident` run at once.
struct ReadAheadBands {
  unsigned stride;  // blocks of a band, which has stride * count tokens
  unsigned count;   // tokens of a block
  unsigned bands;

  bool operator==(const ReadAheadBands&) const = default;
};

/// Tokens that a block takes. A block that has a multiprocessor to itself has nobody to load while
/// it begins, and stays; the more there are, the sooner they drift apart: of the copy on an H200,
/// one-shot over four at D = 2048 has 102 % with two to four tokens, 98 with sixteen, 96 with all;
/// over nine at D = 7168 88, 94 and 95.
constexpr ReadAheadBands read_ahead_bands(int64_t tokens, int64_t resident,
                                          int64_t multiprocessors) {
  const int64_t stride = std::min(resident, tokens);
  const int64_t together = resident / multiprocessors;
  const int64_t wanted = together <= 1 ? tokens : together <= 3 ? 6 : 3;
  const int64_t bands = ceil_div(tokens, stride * std::min(wanted, ceil_div(tokens, stride)));
  return {static_cast<unsigned>(stride), static_cast<unsigned>(ceil_div(tokens, stride * bands)),
          static_cast<unsigned>(bands)};
}

/// Which form of `read_backward` runs, and its block.
struct ReadPolicy {
  bool staged;            // rows of a token in shared memory; else streamed
  int chunks_per_thread;  // staged
  int threads;            // of a block, which has one token at a time
  int stages;             // staged: tiles in the ring
  int64_t shared_bytes;   // of a block

  bool operator==(const ReadPolicy&) const = default;
};

/// Most blocks of a `read_backward` grid: its workspace has a row of partial sums for each.
constexpr int64_t max_read_backward_blocks(int64_t dim) { return dim <= 4096 ? 1280 : 640; }

/// What choose_ring must know of the staged kernel for one storage and number of chunks a thread.
struct StagedKernel {
  int chunks_per_thread;
  int max_threads;  // that the kernel is compiled for
  int registers;    // of a thread: decide how many blocks run at once
};

/// Chooses among `kernels`, best first, a staged block whose ring takes
/// `shared_bytes(threads, stages)` bytes: as many blocks as registers and shared memory allow with
/// two tiles each, then the deepest ring that leaves them room. Several blocks hide one another's
/// waiting at the barriers; deep rings keep copies under way where registers allow one block alone.
template <class SharedBytes>
constexpr ReadPolicy choose_ring(int64_t dim, std::initializer_list<StagedKernel> kernels,
                                 const DeviceLimits& limits, SharedBytes&& shared_bytes) {
  constexpr int64_t kReserved = 1024;  // the system takes 1 KB of shared memory a block
  constexpr int64_t kRegisters = 65536;
  constexpr int64_t kMaxBlocks = 8;
  constexpr int kMaxStages = 4;
  for (const StagedKernel& kernel : kernels) {
    const int threads = static_cast<int>(round_up(ceil_div(dim / 8, kernel.chunks_per_thread), 32));
    if (threads > kernel.max_threads) {
      continue;
    }
    const auto fits = [&](int64_t blocks, int stages) {
      const int64_t bytes = shared_bytes(threads, stages);
      return bytes <= limits.shared_per_block &&
             blocks * (bytes + kReserved) <= limits.shared_per_multiprocessor;
    };
    int64_t blocks =
        std::clamp<int64_t>(kRegisters / (int64_t{kernel.registers} * threads), 1, kMaxBlocks);
    while (blocks > 1 && !fits(blocks, 2)) {
      --blocks;
    }
    for (int stages = kMaxStages; stages >= 1; --stages) {
      if (fits(blocks, stages)) {
        return {true, kernel.chunks_per_thread, threads, stages, shared_bytes(threads, stages)};
      }
    }
  }
  return {};
}

}  // namespace flash_attn_res::cuda

#endif  // FLASH_ATTN_RES_CUDA_POLICY_H_
