// Rows of any dtype as vectors of floats: how every kernel reads and writes memory.
//
// An element type (Float32, BFloat16, Float16, or AnyFloat for a dtype known at run time only) says
// how a pair of vectors is loaded and stored. A Reader or Writer is one row of such elements.
// for_steps walks a row in steps of kStep elements, the last one shorter: a kernel's step is
// written once and called with `Whole` or `Tail`, which pick the full or the partial access.

#ifndef FLASH_ATTN_RES_CPU_KERNELS_ROWS_H_
#define FLASH_ATTN_RES_CPU_KERNELS_ROWS_H_

#include <stdint.h>

#include "cpu/kernels/params.h"
#include "cpu/simd/target.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET {

/// Elements of one step.
inline constexpr int kStep = 2 * kLanes;

struct Float32 {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kBytes = 4;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_f32(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_f32(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_f32(p, a); }
};

struct BFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kBytes = 2;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_bf16(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_bf16(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_bf16(p, a); }
};

struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr int kBytes = 2;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_f16(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_f16(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_f16(p, a); }
};

/// Elements whose dtype is looked up at each access. Slower in cache, as fast from memory; it keeps
/// calls that mix dtypes from multiplying the number of compiled kernels.
struct AnyFloat {};

/// A step of kStep elements.
struct Whole {};

/// The last step of a row: fewer than kStep elements.
struct Tail {
  int count;
};

/// Calls step(i, Whole) for i = 0, kStep, ... and then, for what is left of `count`, step(i, Tail).
template <class Step>
FLASH_ATTN_RES_INLINE void for_steps(int64_t begin, int64_t end, Step&& step) {
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    step(i, Whole{});
  }
  if (i < end) {
    step(i, Tail{static_cast<int>(end - i)});
  }
}

/// kStep elements from p, the first `tail.count` of memory and zeros after them. Not inlined, like
/// store_tail: once a row at most, and it would double the code of every loop.
template <class E>
__attribute__((noinline)) inline Pair load_tail(const unsigned char* p, Tail tail) {
  alignas(64) unsigned char held[kStep * E::kBytes] = {};
  for (int i = 0; i < tail.count * E::kBytes; ++i) {
    held[i] = p[i];
  }
  return E::load(held);
}

template <class E>
__attribute__((noinline)) inline void store_tail(unsigned char* p, Pair a, Tail tail) {
  alignas(64) unsigned char held[kStep * E::kBytes];
  E::store(held, a);
  for (int i = 0; i < tail.count * E::kBytes; ++i) {
    p[i] = held[i];
  }
}

/// One row that is read. `ahead` is the distance in bytes to the row of the next token, which the
/// first sweep over a row fetches into the cache while it computes.
template <class E>
struct Reader {
  const unsigned char* data;
  int64_t ahead;

  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Whole) const { return E::load(data + i * E::kBytes); }
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Tail tail) const {
    return load_tail<E>(data + i * E::kBytes, tail);
  }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(data + i * E::kBytes + ahead, 0, 2);
  }
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const { return {data + i * E::kBytes, ahead}; }
};

/// kStep elements, or the tail's, of a dtype known at run time. Not inlined: the switch would
/// multiply the code of every loop that mixes dtypes.
template <class Part>
__attribute__((noinline)) inline Pair load_any(const unsigned char* p, DType dtype, Part part) {
  switch (dtype) {
    case DType::kBFloat16:
      return Reader<BFloat16>{p, 0}.get(0, part);
    case DType::kFloat16:
      return Reader<Float16>{p, 0}.get(0, part);
    default:
      return Reader<Float32>{p, 0}.get(0, part);
  }
}

template <>
struct Reader<AnyFloat> {
  const unsigned char* data;
  int64_t ahead;
  DType dtype;

  template <class Part>
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Part part) const {
    return load_any(data + i * bytes(), dtype, part);
  }
  FLASH_ATTN_RES_INLINE int64_t bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(data + i * bytes() + ahead, 0, 2);
  }
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const { return {data + i * bytes(), ahead, dtype}; }
};

/// One row that is written. With `stream` its whole steps go past the caches.
template <class E>
struct Writer {
  unsigned char* data;
  bool stream;

  FLASH_ATTN_RES_INLINE void put(int64_t i, Pair a, Whole) const {
    if (stream) {
      E::stream(data + i * E::kBytes, a);
    } else {
      E::store(data + i * E::kBytes, a);
    }
  }
  FLASH_ATTN_RES_INLINE void put(int64_t i, Pair a, Tail tail) const {
    store_tail<E>(data + i * E::kBytes, a, tail);
  }
  FLASH_ATTN_RES_INLINE Writer from(int64_t i) const {
    return {data + i * E::kBytes, stream && i * E::kBytes % kStreamAlign == 0};
  }
};

template <class Part>
__attribute__((noinline)) inline void store_any(unsigned char* p, Pair a, DType dtype, bool stream,
                                                Part part) {
  switch (dtype) {
    case DType::kBFloat16:
      return Writer<BFloat16>{p, stream}.put(0, a, part);
    case DType::kFloat16:
      return Writer<Float16>{p, stream}.put(0, a, part);
    default:
      return Writer<Float32>{p, stream}.put(0, a, part);
  }
}

template <>
struct Writer<AnyFloat> {
  unsigned char* data;
  bool stream;
  DType dtype;

  template <class Part>
  FLASH_ATTN_RES_INLINE void put(int64_t i, Pair a, Part part) const {
    store_any(data + i * (dtype == DType::kFloat32 ? 4 : 2), a, dtype, stream, part);
  }
  FLASH_ATTN_RES_INLINE Writer from(int64_t i) const {
    const int64_t offset = i * (dtype == DType::kFloat32 ? 4 : 2);
    return {data + offset, stream && offset % kStreamAlign == 0, dtype};
  }
};

/// Row t of a view.
template <class E>
FLASH_ATTN_RES_INLINE Reader<E> reader(const ConstMatrix& view, int64_t t) {
  const unsigned char* data = static_cast<const unsigned char*>(view.data);
  if constexpr (__is_same(E, AnyFloat)) {
    const int64_t row_bytes = view.stride * (view.dtype == DType::kFloat32 ? 4 : 2);
    return {data + t * row_bytes, row_bytes, view.dtype};
  } else {
    const int64_t row_bytes = view.stride * E::kBytes;
    return {data + t * row_bytes, row_bytes};
  }
}

/// What row t of a view that will be written holds now.
template <class E>
FLASH_ATTN_RES_INLINE Reader<E> held(const Matrix& view, int64_t t) {
  return reader<E>(ConstMatrix{view.data, view.rows, view.cols, view.stride, view.dtype}, t);
}

/// Row t of a view that is written. Streaming is dropped where the row's address does not allow it.
template <class E>
FLASH_ATTN_RES_INLINE Writer<E> writer(const Matrix& view, int64_t t, bool stream) {
  unsigned char* data = static_cast<unsigned char*>(view.data);
  int64_t bytes = view.dtype == DType::kFloat32 ? 4 : 2;
  data += t * view.stride * bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % kStreamAlign == 0;
  if constexpr (__is_same(E, AnyFloat)) {
    return {data, stream && aligned, view.dtype};
  } else {
    return {data, stream && aligned};
  }
}

/// Element t of a [1, T] view, or [s, t] of an [S, T] one, of floats.
FLASH_ATTN_RES_INLINE float float_at(const ConstMatrix& view, int64_t row, int64_t col) {
  return static_cast<const float*>(view.data)[row * view.stride + col];
}
FLASH_ATTN_RES_INLINE void put_float(const Matrix& view, int64_t row, int64_t col, float value) {
  static_cast<float*>(view.data)[row * view.stride + col] = value;
}

FLASH_ATTN_RES_INLINE bool given(const ConstMatrix& view) { return view.dtype != DType::kNone; }
FLASH_ATTN_RES_INLINE bool given(const Matrix& view) { return view.dtype != DType::kNone; }

/// The value that a store to dtype would keep.
FLASH_ATTN_RES_INLINE Pair rounded(Pair a, DType dtype) {
  alignas(64) unsigned char held[kStep * 4];
  Writer<AnyFloat>{held, false, dtype}.put(0, a, Whole{});
  return Reader<AnyFloat>{held, 0, dtype}.get(0, Whole{});
}

/// Rows of `count` elements as (pieces, num_rows, kPiece) floats. Fetches the next token's rows.
template <class E>
inline void pack(const Reader<E>* rows, int64_t num_rows, int64_t count, float* packed) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t width = count - begin < kPiece ? count - begin : kPiece;
    for (int64_t s = 0; s < num_rows; ++s) {
      const Reader<E> in = rows[s].from(begin);
      void* piece = packed + begin * num_rows + s * kPiece;
      const Writer<Float32> out = {static_cast<unsigned char*>(piece), false};
      for_steps(0, width, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
        in.prefetch(i);
        out.put(i, in.get(i, part), part);
      });
    }
  }
}

/// Row s of the piece that begins at element `begin` of packed rows.
FLASH_ATTN_RES_INLINE Reader<Float32> packed_piece(const float* packed, int64_t num_rows, int64_t s,
                                                   int64_t begin) {
  const void* piece = packed + begin * num_rows + s * kPiece;
  return {static_cast<const unsigned char*>(piece), 0};
}

/// Bytes that a packed row skips after each of its pieces.
FLASH_ATTN_RES_INLINE int64_t packed_jump(int64_t num_rows) {
  return (num_rows - 1) * kPiece * static_cast<int64_t>(sizeof(float));
}

FLASH_ATTN_RES_INLINE Pair zero_pair() { return {broadcast(0.0f), broadcast(0.0f)}; }
FLASH_ATTN_RES_INLINE Pair add(Pair a, Pair b) { return {add(a.lo, b.lo), add(a.hi, b.hi)}; }
FLASH_ATTN_RES_INLINE Pair mul(Pair a, Pair b) { return {mul(a.lo, b.lo), mul(a.hi, b.hi)}; }
FLASH_ATTN_RES_INLINE Pair mul(Vec a, Pair b) { return {mul(a, b.lo), mul(a, b.hi)}; }
FLASH_ATTN_RES_INLINE Pair fma(Vec a, Pair b, Pair c) {
  return {fma(a, b.lo, c.lo), fma(a, b.hi, c.hi)};
}
FLASH_ATTN_RES_INLINE Pair fma(Pair a, Pair b, Pair c) {
  return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}
FLASH_ATTN_RES_INLINE float reduce_add(Pair a) { return reduce_add(add(a.lo, a.hi)); }

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_ROWS_H_
