// The small operations between matrix products, each written once for an element type E (float or
// BFloat16) and one index, so that a CPU loop and a CUDA kernel run the same code.
//
// Intermediate values are rounded to E wherever PyTorch would have stored them.

#ifndef DECODER_OPERATIONS_H_
#define DECODER_OPERATIONS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DECODER_BOTH __host__ __device__
#else
#define DECODER_BOTH
#endif

namespace decoder {

/// Upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

DECODER_BOTH inline float to_float(float value) { return value; }
DECODER_BOTH inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result = 0;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

/// Rounded to E, to nearest even.
template <class E>
DECODER_BOTH inline E from_float(float value);
template <>
DECODER_BOTH inline float from_float<float>(float value) {
  return value;
}
template <>
DECODER_BOTH inline BFloat16 from_float<BFloat16>(float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u
                                    : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <class E>
DECODER_BOTH inline float rounded(float value) {
  return to_float(from_float<E>(value));
}

template <class E>
DECODER_BOTH inline float get(const void* data, int64_t i) {
  return to_float(static_cast<const E*>(data)[i]);
}
template <class E>
DECODER_BOTH inline void put(void* data, int64_t i, float value) {
  static_cast<E*>(data)[i] = from_float<E>(value);
}

/// out[t, d] = table[token_t, d], for T * D indices.
struct Embed {
  const int32_t* tokens;  // (T)
  const void* table;      // (256,D)
  void* out;              // (T,D)
  int64_t dim;
};
template <class E>
DECODER_BOTH void apply(const Embed& op, int64_t i) {
  put<E>(op.out, i, get<E>(op.table, op.tokens[i / op.dim] * op.dim + i % op.dim));
}

/// Turns queries and keys by the angles of their positions and files keys and values in the cache,
/// whose slots go round. For T * D / 2 indices: token, head, pair of columns.
struct RotateAndFile {
  void* qkv;           // (T,3,H,E): queries are turned in place
  const float* angle;  // (2,T,E/2): cosines, sines
  void* keys;          // (window,H,E)
  void* values;        // (window,H,E)
  int64_t tokens, dim, head_dim;
  int64_t position, window;  // of the first token; slots of the cache
};
template <class E>
DECODER_BOTH void apply(const RotateAndFile& op, int64_t i) {
  const int64_t half = op.head_dim / 2;
  const int64_t pair = i % half;
  const int64_t head = i / half % (op.dim / op.head_dim);
  const int64_t t = i / (op.dim / 2);
  const float cosine = rounded<E>(op.angle[t * half + pair]);
  const float sine = rounded<E>(op.angle[(op.tokens + t) * half + pair]);
  const int64_t first = head * op.head_dim + pair;  // and `first + half`
  const int64_t slot = (op.position + t) % op.window * op.dim;
  const int64_t row = t * 3 * op.dim;
  const auto turn = [&](int64_t from, void* to, int64_t at) {
    const float a = get<E>(op.qkv, from);
    const float b = get<E>(op.qkv, from + half);
    put<E>(to, at, rounded<E>(a * cosine) - rounded<E>(b * sine));
    put<E>(to, at + half, rounded<E>(b * cosine) + rounded<E>(a * sine));
  };
  turn(row + first, op.qkv, row + first);
  turn(row + op.dim + first, op.keys, slot + first);
  for (const int64_t column : {first, first + half}) {
    put<E>(op.values, slot + column, get<E>(op.qkv, row + 2 * op.dim + column));
  }
}

/// Softmax attention of each token over the cache, up to itself. For T * H indices.
struct CausalAttention {
  const void* qkv;     // (T,3,H,E)
  const void* keys;    // (window,H,E)
  const void* values;  // (window,H,E)
  float* scores;       // (T,H,window), scratch
  void* out;           // (T,H,E)
  int64_t dim, head_dim;
  int64_t position, window;
};
template <class E>
DECODER_BOTH void apply(const CausalAttention& op, int64_t i) {
  const int64_t heads = op.dim / op.head_dim;
  const int64_t t = i / heads;
  const int64_t head = i % heads * op.head_dim;
  const int64_t seen = op.position + t + 1 < op.window ? op.position + t + 1 : op.window;
  float* const score = op.scores + i * op.window;
  const float factor = 1.0f / sqrtf(static_cast<float>(op.head_dim));
  float largest = -INFINITY;
  for (int64_t j = 0; j < seen; ++j) {
    float dot = 0;
    for (int64_t e = 0; e < op.head_dim; ++e) {
      dot += get<E>(op.qkv, t * 3 * op.dim + head + e) * get<E>(op.keys, j * op.dim + head + e);
    }
    score[j] = dot * factor;
    largest = score[j] > largest ? score[j] : largest;
  }
  float total = 0;
  for (int64_t j = 0; j < seen; ++j) {
    score[j] = expf(score[j] - largest);
    total += score[j];
  }
  for (int64_t e = 0; e < op.head_dim; ++e) {
    float sum = 0;
    for (int64_t j = 0; j < seen; ++j) {
      sum += score[j] * get<E>(op.values, j * op.dim + head + e);
    }
    put<E>(op.out, t * op.dim + head + e, sum / total);
  }
}

/// out = silu(gate) * up, for T * hidden indices.
struct SwiGlu {
  const void* gate_up;  // (T,2,hidden)
  void* out;            // (T,hidden)
  int64_t hidden;
};
template <class E>
DECODER_BOTH void apply(const SwiGlu& op, int64_t i) {
  const int64_t row = i / op.hidden * 2 * op.hidden + i % op.hidden;
  const float gate = get<E>(op.gate_up, row);
  put<E>(op.out, i, rounded<E>(gate / (1.0f + expf(-gate))) * get<E>(op.gate_up, row + op.hidden));
}

}  // namespace decoder

#endif  // DECODER_OPERATIONS_H_
