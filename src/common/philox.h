// Philox 4x32-10, and stochastic rounding to bfloat16, for host and device alike: integers only, so
// that every compiler gives the same bits. stochastic.h has the formulas.

#ifndef FLASH_ATTN_RES_COMMON_PHILOX_H_
#define FLASH_ATTN_RES_COMMON_PHILOX_H_

#include <cstdint>

namespace flash_attn_res {

/// Four random words.
struct PhiloxWords {
  uint32_t v[4];
};

/// Ten rounds of Philox 4x32.
constexpr PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.v[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.v[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.v[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.v[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// The random words of one chunk of eight columns: chunk = row * ceil(D / 8) + column / 8.
constexpr PhiloxWords chunk_words(int64_t seed, int64_t step, uint32_t site, int64_t chunk) {
  return philox({{static_cast<uint32_t>(chunk), static_cast<uint32_t>(chunk >> 32), site,
                  static_cast<uint32_t>(step)}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

/// The 16 random bits of column `lane` of a chunk.
constexpr uint32_t lane_bits(const PhiloxWords& words, int lane) {
  return (words.v[lane / 2] >> (lane % 2 * 16)) & 0xffffu;
}

/// The bfloat16 of a float32's bits, given 16 random bits.
constexpr uint16_t round_stochastically(uint32_t bits, uint32_t random) {
  if ((bits & 0x7fffffffu) >= 0x7f800000u) {  // Inf stays; NaN keeps a fraction bit
    return static_cast<uint16_t>((bits >> 16) | ((bits & 0x7fffffu) != 0 ? 0x0040u : 0u));
  }
  return static_cast<uint16_t>((bits + random) >> 16);
}

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_COMMON_PHILOX_H_
