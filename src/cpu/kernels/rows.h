// Rows of any dtype as vectors of floats: how every kernel reads and writes memory.
//
// An element type (Float32, BFloat16, Float16, or AnyFloat for a dtype known at run time only) says
// how a pair of vectors is loaded and stored. A Reader or Writer is one row of such elements.
// for_steps walks a row in steps of kStep elements, the last one shorter: a kernel's step is
// written once and called with `Whole` or `Tail`, which pick the full or the partial access.
//
// BFloat16 moves each step in split order (simd/target.h). Rows that meet it in arithmetic are rows
// of scratch, written in the same order and in whole steps (Packed): a kernel is written for one
// order E, brings parameters into it with arranged<E> and gradients of parameters back out of it
// with restore_order<E>, and must start every row at the same distance, modulo kStep, from where
// the rows that it combines it with start.

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
  static constexpr bool kSplit = false;
  static constexpr int kBytes = 4;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_f32(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_f32(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_f32(p, a); }
};

struct BFloat16 {
  static constexpr bool kSplit = true;
  static constexpr int kBytes = 2;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_bf16_split(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_bf16_split(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_bf16_split(p, a); }
};

/// The same in natural order.
struct BFloat16InOrder {
  static constexpr bool kSplit = false;
  static constexpr int kBytes = 2;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_bf16(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_bf16(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_bf16(p, a); }
};

struct Float16 {
  static constexpr bool kSplit = false;
  static constexpr int kBytes = 2;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_f16(p); }
  static FLASH_ATTN_RES_INLINE void store(void* p, Pair a) { store_f16(p, a); }
  static FLASH_ATTN_RES_INLINE void stream(void* p, Pair a) { stream_f16(p, a); }
};

/// float8 e4m3, which is only ever read.
struct Float8 {
  static constexpr bool kSplit = false;
  static constexpr int kBytes = 1;
  static FLASH_ATTN_RES_INLINE Pair load(const void* p) { return load_e4m3(p); }
};

/// Bytes of one element of a row.
FLASH_ATTN_RES_INLINE int64_t bytes_of_dtype(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8E4M3 ? 1 : 2;
}

/// 2^(bits - 127); 255 is NaN.
FLASH_ATTN_RES_INLINE float scale_from_bits(uint32_t bits) {
  const uint32_t number = bits == 0 ? 0x00400000u : bits << 23;
  return __builtin_bit_cast(float, bits == 0xffu ? 0x7fc00000u : number);
}

/// Elements whose dtype is looked up at each access. Slower in cache, as fast from memory; it keeps
/// calls that mix dtypes from multiplying the number of compiled kernels.
struct AnyFloat {
  static constexpr bool kSplit = false;
};

/// Float8 or Float16 with scales, which is only ever read.
template <class E>
struct Scaled {
  static constexpr bool kSplit = false;
  static constexpr int kBytes = E::kBytes;
};

template <class E>
inline constexpr bool kMayBeScaled = __is_same(E, AnyFloat);
template <class E>
inline constexpr bool kMayBeScaled<Scaled<E>> = true;

/// Floats of scratch in the order of the kernel. Rows are as long as whole steps, so that a tail
/// needs no care; the elements after the row's end are zeros or never used.
struct Packed {
  static constexpr bool kSplit = false;
  static constexpr int kBytes = 4;
};

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

/// Which rows of the next token a sweep fetches into the cache while it computes. Where two sweeps
/// take about as long, the first fetches every other row and the second the rows in between: memory
/// is busy all the time instead of in the first sweep alone.
enum class Fetch { kNone, kEven, kAll };

FLASH_ATTN_RES_INLINE constexpr bool fetches(Fetch fetch, int64_t row) {
  return fetch == Fetch::kAll || (fetch == Fetch::kEven && row % 2 == 0);
}

/// Brings the cache lines of a step of so many bytes into L2.
FLASH_ATTN_RES_INLINE void fetch_lines(const unsigned char* p, int64_t bytes) {
  constexpr int kLine = 64;
#pragma GCC unroll 4
  for (int64_t offset = 0; offset < bytes; offset += kLine) {
    __builtin_prefetch(p + offset, 0, 2);
  }
}

/// One row that is read. `ahead` is the distance in bytes to the row of the next token, which a
/// sweep over a row fetches into the cache while it computes.
template <class E>
struct Reader {
  const unsigned char* data;
  int64_t ahead;

  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Whole) const { return E::load(data + i * E::kBytes); }
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Tail tail) const {
    return load_tail<E>(data + i * E::kBytes, tail);
  }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t i) const {
    fetch_lines(data + i * E::kBytes + ahead, kStep * E::kBytes);
  }
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const { return {data + i * E::kBytes, ahead}; }
};

/// kStep elements, or the tail's, of a dtype known at run time. Not inlined: the switch would
/// multiply the code of every loop that mixes dtypes.
template <class Part>
__attribute__((noinline)) inline Pair load_any(const unsigned char* p, DType dtype, Part part) {
  switch (dtype) {
    case DType::kBFloat16:
      return Reader<BFloat16InOrder>{p, 0}.get(0, part);
    case DType::kFloat16:
      return Reader<Float16>{p, 0}.get(0, part);
    case DType::kFloat8E4M3:
      return Reader<Float8>{p, 0}.get(0, part);
    default:
      return Reader<Float32>{p, 0}.get(0, part);
  }
}

FLASH_ATTN_RES_INLINE int elements_of(Whole) { return kStep; }
FLASH_ATTN_RES_INLINE int elements_of(Tail tail) { return tail.count; }

/// A step of `count` elements, which begin at `column`, with the scales of several groups.
__attribute__((noinline)) inline Pair scaled_apart(Pair a, const unsigned char* scale,
                                                   int64_t column, int count, int shift) {
  alignas(64) float held[kStep];
  store_f32(held, a);
  for (int i = 0; i < count; ++i) {
    held[i] *= scale_from_bits(scale[(column + i) >> shift]);
  }
  return load_f32(held);
}

/// A step whose elements begin at `column` of a row with one scale for every 2^shift columns.
FLASH_ATTN_RES_INLINE Pair scaled(Pair a, const unsigned char* scale, int64_t column, int count,
                                  int shift) {
  const int64_t first = column >> shift;
  if (__builtin_expect((column + count - 1) >> shift != first, 0)) {
    return scaled_apart(a, scale, column, count, shift);
  }
  const Vec factor = broadcast(scale_from_bits(scale[first]));
  return {mul(factor, a.lo), mul(factor, a.hi)};
}

template <>
struct Reader<AnyFloat> {
  const unsigned char* data;
  int64_t ahead;
  DType dtype;
  const unsigned char* scale = nullptr;  // of the row's first column, or null
  int64_t column = 0;                    // of data[0]
  int shift = 0;                         // 2^shift columns share a scale

  template <class Part>
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Part part) const {
    const Pair a = load_any(data + i * bytes(), dtype, part);
    return scale == nullptr ? a : scaled(a, scale, column + i, elements_of(part), shift);
  }
  FLASH_ATTN_RES_INLINE int64_t bytes() const { return bytes_of_dtype(dtype); }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t i) const {
    fetch_lines(data + i * bytes() + ahead, kStep * bytes());
  }
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const {
    return {data + i * bytes(), ahead, dtype, scale, column + i, shift};
  }
};

template <class E>
struct Reader<Scaled<E>> {
  const unsigned char* data;
  int64_t ahead;
  const unsigned char* scale = nullptr;  // of the row's first column
  int64_t column = 0;                    // of data[0]
  int shift = 0;                         // 2^shift columns share a scale

  template <class Part>
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Part part) const {
    const Pair a = Reader<E>{data, ahead}.get(i, part);
    return scaled(a, scale, column + i, elements_of(part), shift);
  }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t i) const { Reader<E>{data, ahead}.prefetch(i); }
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const {
    return {data + i * E::kBytes, ahead, scale, column + i, shift};
  }
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
      return Writer<BFloat16InOrder>{p, stream}.put(0, a, part);
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

template <>
struct Reader<Packed> {
  const float* data;

  template <class Part>
  FLASH_ATTN_RES_INLINE Pair get(int64_t i, Part) const {
    return load_f32(data + i);
  }
  FLASH_ATTN_RES_INLINE void prefetch(int64_t) const {}
  FLASH_ATTN_RES_INLINE Reader from(int64_t i) const { return {data + i}; }
};

template <>
struct Writer<Packed> {
  float* data;

  template <class Part>
  FLASH_ATTN_RES_INLINE void put(int64_t i, Pair a, Part) const {
    store_f32(data + i, a);
  }
  FLASH_ATTN_RES_INLINE Writer from(int64_t i) const { return {data + i}; }
};

/// Fetches the next token's elements [0, width) of a row.
template <class E>
FLASH_ATTN_RES_INLINE void fetch_row(const Reader<E>& row, int64_t width) {
  for (int64_t i = 0; i < width; i += kStep) {
    row.prefetch(i);
  }
}

/// Row t of a view.
template <class E>
FLASH_ATTN_RES_INLINE Reader<E> reader(const ConstMatrix& view, int64_t t) {
  const unsigned char* data = static_cast<const unsigned char*>(view.data);
  if constexpr (__is_same(E, AnyFloat)) {
    const int64_t row_bytes = view.stride * bytes_of_dtype(view.dtype);
    return {data + t * row_bytes, row_bytes, view.dtype};
  } else {
    const int64_t row_bytes = view.stride * E::kBytes;
    return {data + t * row_bytes, row_bytes};
  }
}

/// Row t of source n, with its scales if `scales` is not null: then E is AnyFloat or Scaled.
template <class E>
FLASH_ATTN_RES_INLINE Reader<E> source_reader(const ConstMatrix* sources, const ConstMatrix* scales,
                                              int64_t n, int64_t t) {
  Reader<E> row = reader<E>(sources[n], t);
  if constexpr (kMayBeScaled<E>) {
    if (scales != nullptr) {
      constexpr int kGroupShift = 7;
      constexpr int kWholeRow = 62;
      static_assert(int64_t{1} << kGroupShift == kScaleGroup);
      row.scale = static_cast<const unsigned char*>(scales[n].data) + t * scales[n].stride;
      row.shift = scales[n].cols == 1 ? kWholeRow : kGroupShift;
    }
  }
  return row;
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

/// The value that a store to dtype would keep; E, where it is not AnyFloat, is that dtype's type.
template <class E>
FLASH_ATTN_RES_INLINE Pair rounded(Pair a, DType dtype) {
  alignas(64) unsigned char held[kStep * 4];
  if constexpr (__is_same(E, AnyFloat)) {
    store_any(held, a, dtype, false, Whole{});
    return load_any(held, dtype, Whole{});
  } else {
    E::store(held, a);
    return E::load(held);
  }
}

/// Floats of a packed row of `count` elements.
FLASH_ATTN_RES_INLINE int64_t whole_pieces(int64_t count) {
  return (count + kPiece - 1) / kPiece * kPiece;
}

FLASH_ATTN_RES_INLINE void fill_zeros(float* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    row[i] = 0.0f;
  }
}

/// total += recent, recent = 0: `count` floats of scratch, whole steps.
inline void settle(float* recent, float* total, int64_t count) {
  for (int64_t i = 0; i < count; i += kStep) {
    const Pair a = load_f32(total + i);
    const Pair b = load_f32(recent + i);
    store_f32(total + i, {add(a.lo, b.lo), add(a.hi, b.hi)});
    store_f32(recent + i, {broadcast(0.0f), broadcast(0.0f)});
  }
}

/// A pair in natural order, in the order of the kernel.
template <class E>
FLASH_ATTN_RES_INLINE Pair arranged(Pair natural) {
  if constexpr (E::kSplit) {
    return split(natural);
  } else {
    return natural;
  }
}

/// `count` floats of scratch, whole steps, from the order of the kernel to the natural one.
template <class E>
inline void restore_order(float* row, int64_t count) {
  if constexpr (E::kSplit) {
    for (int64_t i = 0; i < count; i += kStep) {
      store_f32(row + i, join(load_f32(row + i)));
    }
  }
}

/// Row s of the piece that begins at element `begin` of packed rows.
FLASH_ATTN_RES_INLINE Reader<Packed> packed_piece(const float* packed, int64_t num_rows, int64_t s,
                                                  int64_t begin) {
  return {packed + begin * num_rows + s * kPiece};
}

/// `width` elements from `begin` on of each row into packed rows, `first` being the index of
/// rows[0] there. Fetches the next token's rows as kFetch says. kOrder is the order of the kernel
/// where the rows are parameters in natural order, and E itself otherwise.
template <class kOrder, Fetch kFetch, class E>
FLASH_ATTN_RES_INLINE void pack_piece(const Reader<E>* rows, int64_t count, int64_t begin,
                                      int64_t width, float* packed, int64_t num_rows,
                                      int64_t first) {
  for (int64_t r = 0; r < count; ++r) {
    const Reader<E> in = rows[r].from(begin);
    const Writer<Packed> out = {packed + begin * num_rows + (first + r) * kPiece};
    for_steps(0, width, [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS {
      if (fetches(kFetch, r)) {
        in.prefetch(i);
      }
      const Pair a = in.get(i, part);
      if constexpr (E::kSplit) {
        out.put(i, a, part);
      } else {
        out.put(i, arranged<kOrder>(a), part);
      }
    });
  }
}

/// Rows of `count` elements as (pieces, num_rows, kPiece) floats.
/// Before a piece of all rows is overwritten, leave(begin, width) is called.
template <class kOrder, Fetch kFetch, class E, class Leave>
inline void pack(const Reader<E>* rows, int64_t num_rows, int64_t count, float* packed,
                 Leave&& leave) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t width = count - begin < kPiece ? count - begin : kPiece;
    leave(begin, width);
    pack_piece<kOrder, kFetch>(rows, num_rows, begin, width, packed, num_rows, 0);
  }
}

template <class kOrder, class E>
inline void pack(const Reader<E>* rows, int64_t num_rows, int64_t count, float* packed) {
  pack<kOrder, Fetch::kAll>(rows, num_rows, count, packed, [](int64_t, int64_t) {});
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
/// The sum of what step(i, part, sum) adds to `sum` for the steps of [0, count). A run of elements
/// is summed on its own, so that the error does not grow with the length of the row.
template <class Step>
FLASH_ATTN_RES_INLINE Pair sum_by_runs(int64_t count, Step&& step) {
  Pair total = zero_pair();
  for (int64_t begin = 0; begin < count; begin += kRun) {
    Pair sum = zero_pair();
    for_steps(begin, count - begin < kRun ? count : begin + kRun,
              [&](int64_t i, auto part) FLASH_ATTN_RES_ALWAYS { step(i, part, sum); });
    total = add(total, sum);
  }
  return total;
}

FLASH_ATTN_RES_INLINE float reduce_add(Pair a) { return reduce_add(add(a.lo, a.hi)); }

}  // namespace flash_attn_res::cpu::FLASH_ATTN_RES_TARGET

#endif  // FLASH_ATTN_RES_CPU_KERNELS_ROWS_H_
