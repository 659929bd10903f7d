// Value types shared by every operation: dtypes, views over caller memory, devices, threads.
//
// Axis glossary, used in every comment of the library (docs/math.md has the derivations):
//
//   T  tokens (batch x sequence, flattened)          N  sources: what earlier depths produced
//   D  width of the residual stream, any D >= 1      S  queries that read the same sources
//   R  width of the key slice, R <= D (usually D)    K  terms of one read: phase 1 + N + partial
//   sum
//
// The library never allocates, prints, exits or keeps a pointer after a call returns. Sizes and
// strides are 64-bit and counted in elements.

#ifndef FLASH_ATTN_RES_TYPES_H_
#define FLASH_ATTN_RES_TYPES_H_

#include <cstdint>

namespace flash_attn_res {

/// Element type of a view. `kNone` marks a view that is absent (an optional argument not given).
enum class DType : int32_t {
  kNone = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kFloat64 =
      4,  // served by the double-precision reference: exact and slow, for tests and gradcheck
  kFloat8E4M3 = 5,  // OCP e4m3fn: largest 448, no Inf; quantised sources, and the quantised x of
                    // `read`: always with scales
  kFloat8E8M0 = 6,  // OCP e8m0: 2^(bits - 127), 255 is NaN; the scales of quantised sources
};

/// Bytes of one element; 0 for `kNone` and for values outside the enumeration.
constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat8E4M3:
    case DType::kFloat8E8M0:
      return 1;
    case DType::kNone:
      break;
  }
  return 0;
}

/// Most sources that one call takes (the pointer table of a CUDA launch is a kernel parameter).
inline constexpr int64_t kMaxSources = 512;

/// Most queries that one `attend` takes.
inline constexpr int64_t kMaxQueries = 128;

/// Most pending updates that one `read` adds to the partial sum.
inline constexpr int64_t kMaxUpdates = 2;

/// Most values that one `quantize` adds up.
inline constexpr int64_t kMaxQuantizeTerms = 4;

/// Columns that share one scale where a row has several.
inline constexpr int64_t kScaleGroup = 128;

/// A read-only view of `rows` rows of `cols` consecutive elements; row r starts at element
/// r * stride. A default-constructed view is absent. Rows may overlap or repeat (stride 0) in
/// views that are only read; data may be null when rows * cols == 0.
struct ConstMatrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  DType dtype = DType::kNone;

  /// Whether the argument was given.
  constexpr bool present() const { return dtype != DType::kNone; }
};

/// A view of rows that the operation writes. Rows must not overlap each other, nor any other
/// argument unless the operation says so.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  DType dtype = DType::kNone;

  constexpr bool present() const { return dtype != DType::kNone; }
  constexpr operator ConstMatrix()
      const {  // NOLINT(google-explicit-constructor): as T* to const T*
    return {data, rows, cols, stride, dtype};
  }
};

enum class DeviceType : int32_t { kCpu = 0, kCuda = 1 };

/// Where the arguments of a call live.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;  // CUDA device ordinal; ignored on the CPU
};

/// Runs `task(context, i)` for every i in [0, count), in any order and on any threads, and returns
/// when all are done. An engine plugs its own thread pool in here. Results never depend on the
/// number of threads nor on the order in which tasks run.
struct Executor {
  void (*run)(void* pool, int64_t count, void (*task)(void* context, int64_t index),
              void* context) = nullptr;
  void* pool = nullptr;  // handed to `run` unchanged
};

/// How a call runs: device, stream, scratch memory and threads, all owned by the caller.
struct Context {
  Device device;
  void* stream = nullptr;              // cudaStream_t on CUDA; ignored on the CPU
  void* workspace = nullptr;           // at least `*_workspace_bytes(args)` bytes, 64-byte aligned
  int64_t workspace_bytes = 0;         // on the device of the call
  const Executor* executor = nullptr;  // CPU threads; null: the library's own (OpenMP if built in)
};

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_TYPES_H_
