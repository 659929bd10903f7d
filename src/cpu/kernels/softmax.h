// Softmax over the terms of one token, in float32.
//
//   p_n = exp(l_n - max) / sum_n exp(l_n - max)        lse = max + log(sum)
//
// One term gives p = 1 and lse = l exactly: exp(0) is 1. A NaN or +Inf logit gives NaN, as the
// formulas do.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_SOFTMAX_H_
#define FLASH_ATTN_RES_CPU_KERNELS_SOFTMAX_H_

#include "cpu/kernels/rows.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// e^x within 2 ulp, exactly 1 at 0, 0 at -Inf, Inf at +Inf, NaN at NaN.
///
/// x = k ln 2 + f with |f| <= ln(2) / 2; e^f by its Taylor polynomial of degree 7 (truncation error
/// 6e-9 relative); 2^k as a product of two powers, so that subnormal results and overflow come out
/// by themselves.
FLASH_ATTN_RES_INLINE Vec exponential(Vec x) {
  const Vec kLimit = broadcast(110.0f);  // e^-110 underflows to 0, e^110 overflows to Inf
  const Vec kRounder = broadcast(0x1.8p23f);
  x = clamp(x, broadcast(-110.0f), kLimit);
  const Vec shifted = fma(x, broadcast(0x1.715476p0f), kRounder);  // 1 / ln 2
  const Vec k = sub(shifted, kRounder);
  Vec f = fma(k, broadcast(-0x1.62e4p-1f), x);  // ln 2 in two parts: k * high is exact
  f = fma(k, broadcast(-0x1.7f7d1cp-20f), f);
  Vec e = broadcast(1.0f / 5040.0f);
  e = fma(e, f, broadcast(1.0f / 720.0f));
  e = fma(e, f, broadcast(1.0f / 120.0f));
  e = fma(e, f, broadcast(1.0f / 24.0f));
  e = fma(e, f, broadcast(1.0f / 6.0f));
  e = fma(e, f, broadcast(0.5f));
  e = fma(e, f, broadcast(1.0f));
  e = fma(e, f, broadcast(1.0f));
  const IntVec exponent = int_sub(bits(shifted), bits(kRounder));  // k as an integer
  const IntVec first = half_of(exponent);
  const IntVec second = int_sub(exponent, first);
  const IntVec one = int_broadcast(127);
  e = mul(e, floats(to_exponent(int_add(first, one))));
  return mul(e, floats(to_exponent(int_add(second, one))));
}

/// values[i] = e^values[i]
FLASH_ATTN_RES_INLINE void exponentials(float* values, int64_t count) {
  unsigned char* data = reinterpret_cast<unsigned char*>(values);
  const Reader<Float32> in = {data, 0};
  const Writer<Float32> out = {data, false};
  for_steps(0, count, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
    const Pair x = in.get(i, part);
    out.put(i, {exponential(x.lo), exponential(x.hi)}, part);
  });
}

/// probs (S,N) = softmax over N of logits (S,N); lse (S), where it is not null.
inline void softmax_rows(const float* logits, int64_t S, int64_t N, float* probs, float* lse) {
  for (int64_t s = 0; s < S; ++s) {
    float largest = -__builtin_inff();
    for (int64_t n = 0; n < N; ++n) {
      largest = logits[s * N + n] > largest ? logits[s * N + n] : largest;
    }
    for (int64_t n = 0; n < N; ++n) {
      probs[s * N + n] = logits[s * N + n] - largest;
    }
    if (lse != nullptr) {
      lse[s] = largest;
    }
  }
  exponentials(probs, S * N);
  for (int64_t s = 0; s < S; ++s) {
    double total = 0.0;  // in float32, many equal terms would sum to several ulp less or more
    for (int64_t n = 0; n < N; ++n) {
      total += static_cast<double>(probs[s * N + n]);
    }
    const float sum = static_cast<float>(total);
    for (int64_t n = 0; n < N; ++n) {
      probs[s * N + n] /= sum;
    }
    if (lse != nullptr) {
      lse[s] += __builtin_logf(sum);
    }
  }
}

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_SOFTMAX_H_
