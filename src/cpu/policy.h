// How the CPU backend cuts and stores its work. Every number that was measured is here.

#ifndef FLASH_ATTN_RES_CPU_POLICY_H_
#define FLASH_ATTN_RES_CPU_POLICY_H_

#include <algorithm>
#include <cstdint>

namespace flash_attn_res::cpu {

/// Tokens cut into runs, one task each. The cut depends on the number of tokens alone, never on the
/// threads: partial sums of gradients are kept per chunk and added in the order of the chunks.
struct ChunkPolicy {
  int64_t min_tokens;  // a shorter chunk would not repay its task
  int64_t max_chunks;  // bounds scratch; 128 keep 32 threads busy to within 3 %
};

/// Forward chunks hold nothing but the token being worked on, so that they may be short.
inline constexpr ChunkPolicy kForwardChunks = {16, 128};

/// A backward chunk also costs one row of partial sums per query, written and read once.
inline constexpr ChunkPolicy kBackwardChunks = {64, 128};

constexpr int64_t chunk_tokens(const ChunkPolicy& policy, int64_t tokens) {
  return std::max(policy.min_tokens, (tokens + policy.max_chunks - 1) / policy.max_chunks);
}

constexpr int64_t num_chunks(const ChunkPolicy& policy, int64_t tokens) {
  const int64_t chunk = chunk_tokens(policy, tokens);
  return (tokens + chunk - 1) / chunk;
}

/// Results go past the caches when a call moves more bytes than this: then they would not survive
/// in a last-level cache anyway, and an ordinary store first reads the line that it overwrites. The
/// size of a common last-level cache; not tuned.
inline constexpr int64_t kStreamBytes = int64_t{32} << 20;

}  // namespace flash_attn_res::cpu

#endif  // FLASH_ATTN_RES_CPU_POLICY_H_
