// What the tests of the CPU backend share: tensors with awkward memory, random values, executors,
// and the comparison with the double-precision reference.
//
// The bound here is absolute: 1.5 roundoffs of the storage dtype, plus float32 noise relative to
// the largest result. tests/python holds the same kernels to the library's relative rule, twice the
// error of an eager computation in the same dtype plus a few ulp.

#ifndef FLASH_ATTN_RES_TESTS_CPU_TESTING_H_
#define FLASH_ATTN_RES_TESTS_CPU_TESTING_H_

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/element.h"
#include "cpu/isa.h"
#include "flash_attn_res/types.h"

namespace flash_attn_res {

using Rng = std::mt19937_64;

#ifdef __SANITIZE_ADDRESS__
// Instrumented, everything takes some twenty times longer: the widths that only repeat the inner
// loops of smaller ones, and most of the random cases, are left to the optimised build.
inline constexpr bool kInstrumented = true;
#else
inline constexpr bool kInstrumented = false;
#endif

/// Widths D on both sides of every step of the kernels.
inline std::vector<int64_t> widths() {
  return kInstrumented ? std::vector<int64_t>{1, 7, 100}
                       : std::vector<int64_t>{1, 7, 64, 100, 257, 2048};
}

/// How many random cases to draw.
inline int random_cases(int count) { return kInstrumented ? count / 8 : count; }

/// How a tensor lies in memory.
struct Layout {
  int64_t row_gap = 0;    // unused elements after each row
  int64_t shift = 0;      // elements that the data begins after an aligned address
  bool repeated = false;  // one row for all tokens (stride 0)
};

/// Bytes that hold a pattern until something is written to them. Large memory is address space
/// alone: a page of it takes memory once it is used.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t size) : size_(size) {
    if (size < kLarge) {
      small_.assign(size, kUnused);
      return;
    }
    void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
      throw std::bad_alloc();
    }
    // A row is to cost its own pages, not 2 MiB.
    madvise(pages, size, MADV_NOHUGEPAGE);
    large_ = {static_cast<unsigned char*>(pages), Unmap{size}};
  }

  unsigned char* data() const {
    return large_ ? large_.get() : const_cast<unsigned char*>(small_.data());
  }
  size_t size() const { return size_; }

  /// Calls visit(first, last, pattern) for ranges that hold every byte that was ever written.
  template <class Visit>
  void for_each_used(Visit visit) const {
    if (!large_) {
      visit(size_t{0}, size_, kUnused);
      return;
    }
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> used(size_t{1} << 16);
    for (size_t begin = 0; begin < size_; begin += used.size() * page) {
      const size_t count = std::min(used.size() * page, size_ - begin);
      ASSERT_EQ(mincore(large_.get() + begin, count, used.data()), 0);
      for (size_t i = 0; i * page < count; ++i) {
        if (used[i] & 1) {
          visit(begin + i * page, std::min(begin + (i + 1) * page, size_), 0);
        }
      }
    }
  }

  /// Whether this much address space is to be had.
  static bool can_map(size_t size) {
    try {
      return Memory(size).data() != nullptr;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

 private:
  struct Unmap {
    size_t size;
    void operator()(unsigned char* pages) const { munmap(pages, size); }
  };
  static constexpr unsigned char kUnused = 0x5a;
  static constexpr size_t kLarge = size_t{1} << 30;

  std::vector<unsigned char> small_;
  std::unique_ptr<unsigned char, Unmap> large_;
  size_t size_ = 0;
};

/// Rows so far apart that the third one begins 2^31 elements after the first, and the fifth 2^32.
inline constexpr Layout kFarRows = {(int64_t{1} << 30) + 3, 1, false};
inline constexpr const char* kNoAddressSpace =
    "2 TiB of address space are not to be had here (ulimit -v, or vm.overcommit_memory is 2)";
inline bool can_map_far_rows() { return Memory::can_map(size_t{1} << 41); }

/// A matrix that owns its memory. Unused elements hold a pattern that is checked at the end.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t rows, int64_t cols, Layout layout = {})
      : rows_(rows), cols_(cols), dtype_(dtype), layout_(layout) {
    const int64_t count = layout.shift + std::max<int64_t>(stored_rows(), 1) * pitch() + 64;
    bytes_ = Memory(static_cast<size_t>(count * size_of(dtype)) + 64);
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    aligned_ = static_cast<int64_t>((64 - address % 64) % 64);
    poison();
  }
  Tensor(const Tensor& other) : Tensor(other.dtype_, other.rows_, other.cols_, other.layout_) {
    copy_rows(other);
  }
  Tensor& operator=(const Tensor& other) {
    if (this != &other) {
      *this = Tensor(other);
    }
    return *this;
  }
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;

  bool present() const { return dtype_ != DType::kNone; }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  Matrix view() {
    return present() ? Matrix{data(), rows_, cols_, layout_.repeated ? 0 : pitch(), dtype_}
                     : Matrix{};
  }
  ConstMatrix view() const { return const_cast<Tensor*>(this)->view(); }

  double at(int64_t r, int64_t c) const { return load(view(), r, c); }
  void set(int64_t r, int64_t c, double value) { store(view(), r, c, value); }

  Tensor& fill(Rng& rng, double sigma = 1.0) {
    std::normal_distribution<double> normal(0.0, sigma);
    for (int64_t r = 0; r < stored_rows(); ++r) {
      for (int64_t c = 0; c < cols_; ++c) {
        set(r, c, normal(rng));
      }
    }
    return *this;
  }

  void poison() { fill_with(std::numeric_limits<double>::quiet_NaN()); }
  void fill_with(double value) {
    for (int64_t r = 0; r < stored_rows(); ++r) {
      for (int64_t c = 0; c < cols_; ++c) {
        set(r, c, value);
      }
    }
  }

  /// Whether nothing outside the rows was written.
  bool untouched_outside() const {
    const int64_t row_bytes = cols_ * size_of(dtype_), pitch_bytes = pitch() * size_of(dtype_);
    const int64_t first_row = aligned_ + layout_.shift * size_of(dtype_);
    const auto in_a_row = [&](size_t i) {
      const int64_t offset = static_cast<int64_t>(i) - first_row;
      return present() && offset >= 0 && offset < stored_rows() * pitch_bytes &&
             offset % pitch_bytes < row_bytes;
    };
    bool untouched = true;
    bytes_.for_each_used([&](size_t first, size_t last, unsigned char pattern) {
      for (size_t i = first; i < last; ++i) {
        untouched = untouched && (bytes_.data()[i] == pattern || in_a_row(i));
      }
    });
    return untouched;
  }

  bool same_bits(const Tensor& other) const {
    for (int64_t r = 0; r < rows_; ++r) {
      if (std::memcmp(row(r), other.row(r), static_cast<size_t>(cols_ * size_of(dtype_))) != 0) {
        return false;
      }
    }
    return rows_ == other.rows_;
  }

  const unsigned char* row(int64_t r) const {
    return static_cast<const unsigned char*>(data()) +
           (layout_.repeated ? 0 : r * pitch() * size_of(dtype_));
  }

 private:
  int64_t pitch() const { return cols_ + layout_.row_gap; }
  int64_t stored_rows() const { return layout_.repeated ? std::min<int64_t>(rows_, 1) : rows_; }
  void* data() const { return bytes_.data() + aligned_ + layout_.shift * size_of(dtype_); }
  void copy_rows(const Tensor& other) {
    for (int64_t r = 0; r < stored_rows(); ++r) {
      std::memcpy(const_cast<unsigned char*>(row(r)), other.row(r),
                  static_cast<size_t>(cols_ * size_of(dtype_)));
    }
  }

  Memory bytes_;
  int64_t aligned_ = 0;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  DType dtype_ = DType::kNone;
  Layout layout_;
};

using Tensors = std::vector<Tensor>;

inline std::vector<ConstMatrix> const_views(const Tensors& tensors) {
  std::vector<ConstMatrix> views;
  for (const Tensor& tensor : tensors) {
    views.push_back(tensor.view());
  }
  return views;
}

inline std::vector<Matrix> views(Tensors& tensors) {
  std::vector<Matrix> result;
  for (Tensor& tensor : tensors) {
    result.push_back(tensor.view());
  }
  return result;
}

/// Unit roundoff of a dtype.
inline double roundoff(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    default:
      return 0x1p-24;
  }
}

/// Float32 noise allowed, relative to the largest result of the tensor.
inline constexpr double kNoise = 2e-5;

/// Fails unless `got` is `want` to rounding. `extra` is further relative error that is allowed,
/// for values computed from something that was itself rounded.
inline void expect_close(const Tensor& got, const Tensor& want, const std::string& what,
                         double extra = 0) {
  ASSERT_EQ(got.rows(), want.rows()) << what;
  ASSERT_EQ(got.cols(), want.cols()) << what;
  double largest = 0;
  for (int64_t r = 0; r < got.rows(); ++r) {
    for (int64_t c = 0; c < got.cols(); ++c) {
      largest = std::max(largest, std::abs(want.at(r, c)));
    }
  }
  // Half precision cannot tell values below its smallest subnormal apart.
  const double tiny = got.dtype() == DType::kFloat16 ? 0x1p-24 : 1e-37;
  for (int64_t r = 0; r < got.rows(); ++r) {
    for (int64_t c = 0; c < got.cols(); ++c) {
      const double expected = want.at(r, c);
      const double bound =
          1.5 * roundoff(got.dtype()) * std::abs(expected) + (kNoise + extra) * largest + tiny;
      ASSERT_TRUE(std::abs(got.at(r, c) - expected) <= bound)
          << what << "[" << r << ", " << c << "] is " << got.at(r, c) << ", expected " << expected
          << " within " << bound;
    }
  }
  EXPECT_TRUE(got.untouched_outside()) << what << " was written outside its rows";
}

/// Executors: one thread in reverse order, and as many threads as there are tasks up to 7.
inline void run_reversed(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  for (int64_t i = count; i-- > 0;) {
    task(context, i);
  }
}
inline void run_threaded(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  const int64_t width = std::min<int64_t>(count, 7);
  for (int64_t k = 0; k < width; ++k) {
    threads.emplace_back([=] {
      for (int64_t i = k; i < count; i += width) {
        task(context, i);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}
inline constexpr Executor kReversed = {run_reversed, nullptr};
inline constexpr Executor kThreaded = {run_threaded, nullptr};

/// Scratch memory, poisoned, aligned as the library asks.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 64, 0xff) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    context_.workspace = memory_.data() + (64 - address % 64) % 64;
    context_.workspace_bytes = bytes;
  }
  const Context& context(const Executor* executor = nullptr) {
    context_.executor = executor;
    return context_;
  }

 private:
  std::vector<unsigned char> memory_;
  Context context_;
};

/// Runs each test once for every instruction set that the build and the machine have.
class CpuTest : public testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    before_ = cpu::active_isa();
    cpu::use_isa(GetParam());
  }
  void TearDown() override { cpu::use_isa(before_); }

 private:
  cpu::Isa before_ = cpu::Isa::kPortable;
};

inline std::vector<cpu::Isa> available_isas() {
  std::vector<cpu::Isa> isas;
  for (int i = 0; i < cpu::kNumIsas; ++i) {
    if (cpu::available(static_cast<cpu::Isa>(i))) {
      isas.push_back(static_cast<cpu::Isa>(i));
    }
  }
  return isas;
}

inline std::string isa_name(const testing::TestParamInfo<cpu::Isa>& info) {
  return cpu::name_of(info.param);
}

/// One of the items, at random.
template <class T>
T pick(Rng& rng, std::initializer_list<T> items) {
  return items.begin()[rng() % items.size()];
}

inline DType pick_dtype(Rng& rng) {
  return pick(rng, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
}

inline Layout pick_layout(Rng& rng) {
  return {pick<int64_t>(rng, {0, 0, 1, 3, 16}), pick<int64_t>(rng, {0, 0, 1, 5}), false};
}

}  // namespace flash_attn_res

#endif  // FLASH_ATTN_RES_TESTS_CPU_TESTING_H_
