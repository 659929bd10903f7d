// CPU kernels against the copy bandwidth of the machine.
//
//   cpu_benchmark [--benchmark_filter=...] [--benchmark_format=json] [--benchmark_out=FILE]
//
// Every row reports GB/s = bytes that the operation must move / time, and percent_of_copy = GB/s
// over the rate of a copy past the caches with as many threads, bytes read and written alike,
// measured right after it. Working sets are far larger than the last-level cache. The rows "sum"
// only read: an operation that reads N rows for each that it writes lies between them and a copy.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace flash_attn_res {
namespace {

constexpr int64_t kDim = 2048;              // D
constexpr int64_t kWorkingSet = 320 << 20;  // bytes, ten times a last-level cache of 32 MiB

// ----------------------------------------------------------------------------------- memory

/// Page-aligned memory with finite contents, written by the threads that will use it.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : bytes_(bytes),
        data_(static_cast<unsigned char*>(std::aligned_alloc(4096, padded(bytes)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(other.data_) {
    other.data_ = nullptr;
  }

  unsigned char* data() { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  static size_t padded(int64_t bytes) {
    return (static_cast<size_t>(bytes) + 4095) / 4096 * 4096 + 4096;
  }
  int64_t bytes_;
  unsigned char* data_;
};

/// A matrix and its memory, filled with small random numbers.
class Tensor {
 public:
  Tensor(DType dtype, int64_t rows, int64_t cols)
      : buffer_(std::max<int64_t>(rows * cols * size_of(dtype), 1)),
        view_{buffer_.data(), rows, cols, cols, dtype} {
    // Values repeat after 64 KiB: making them costs more than the benchmark otherwise.
    std::mt19937 rng(static_cast<unsigned>(rows * 31 + cols));
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const int64_t pattern = std::min<int64_t>(rows * cols, 16384);
    for (int64_t i = 0; i < pattern; ++i) {
      const float value = normal(rng);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == DType::kFloat32) {
        std::memcpy(buffer_.data() + i * 4, &bits, 4);
      } else {
        const auto half = static_cast<uint16_t>(bits >> 16);
        std::memcpy(buffer_.data() + i * 2, &half, 2);
      }
    }
    const int64_t filled = pattern * size_of(dtype);
    for (int64_t at = filled; filled > 0 && at < buffer_.bytes(); at += filled) {
      std::memcpy(buffer_.data() + at, buffer_.data(),
                  static_cast<size_t>(std::min(filled, buffer_.bytes() - at)));
    }
  }
  Matrix view() { return view_; }

 private:
  Buffer buffer_;
  Matrix view_;
};

/// A list of matrices that share a shape.
class TensorList {
 public:
  TensorList(int64_t count, DType dtype, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < count; ++i) {
      tensors_.emplace_back(dtype, rows, cols);
    }
    for (Tensor& tensor : tensors_) {
      views_.push_back(tensor.view());
      const_views_.push_back(tensor.view());
    }
  }
  std::span<const Matrix> views() const { return views_; }
  std::span<const ConstMatrix> const_views() const { return const_views_; }

 private:
  std::vector<Tensor> tensors_;
  std::vector<Matrix> views_;
  std::vector<ConstMatrix> const_views_;
};

/// Scratch memory as a call asks for it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : buffer_(std::max<int64_t>(bytes, 1)) {
    context_.workspace = buffer_.data();
    context_.workspace_bytes = bytes;
  }
  const Context& context() const { return context_; }

 private:
  Buffer buffer_;
  Context context_;
};

// ------------------------------------------------------------------------------------- copy

int thread_count() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

/// Copies one piece, both ends aligned to a cache line, as fast as the machine can: past the caches
/// where there is such a store. memcpy of the C library does that for single large blocks alone,
/// and is a third slower here, because an ordinary store first reads the line that it overwrites.
void copy_piece(unsigned char* to, const unsigned char* from, int64_t bytes) {
#if defined(__SSE2__)
  for (int64_t i = 0; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  _mm_sfence();
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

/// Copies with the threads that the library uses; `bytes` is a multiple of 16.
void copy(unsigned char* to, const unsigned char* from, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 17;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t at = 0; at < bytes; at += kPiece) {
    copy_piece(to + at, from + at, std::min(kPiece, bytes - at));
  }
}

/// Bytes per second of a copy, read and written: the median of several.
/// Measured after each operation on memory as fresh as that one's: on a virtual machine the rate of
/// one and the same copy doubles between a process's first pages and its later ones.
double copy_rate() {
  Buffer from(kWorkingSet / 2);
  Buffer to(kWorkingSet / 2);
  std::memset(from.data(), 1, static_cast<size_t>(from.bytes()));
  std::memset(to.data(), 2, static_cast<size_t>(to.bytes()));
  std::vector<double> rates;
  for (int i = 0; i < 7; ++i) {
    const auto start = std::chrono::steady_clock::now();
    copy(to.data(), from.data(), from.bytes());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(2.0 * static_cast<double>(from.bytes()) / seconds.count());
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

void report(benchmark::State& state, int64_t bytes) {
  const double rate = copy_rate();
  const auto moved = static_cast<double>(bytes) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = benchmark::Counter(moved / 1e9, benchmark::Counter::kIsRate);
  state.counters["percent_of_copy"] =
      benchmark::Counter(100.0 * moved / rate, benchmark::Counter::kIsRate);
  state.counters["bytes"] = static_cast<double>(bytes);
  state.counters["threads"] = thread_count();
}

void BM_copy(benchmark::State& state) {
  Buffer from(kWorkingSet / 2);
  Buffer to(kWorkingSet / 2);
  std::memset(from.data(), 1, static_cast<size_t>(from.bytes()));
  std::memset(to.data(), 2, static_cast<size_t>(to.bytes()));
#if defined(_OPENMP)
  const int before = omp_get_max_threads();
  omp_set_num_threads(static_cast<int>(state.range(0)));
#endif
  for (auto _ : state) {
    copy(to.data(), from.data(), from.bytes());
  }
#if defined(_OPENMP)
  omp_set_num_threads(before);
#endif
  report(state, 2 * from.bytes());
}

/// Adds up what it reads, 8 bytes a time, in as many chains as hide the latency of an addition.
uint64_t sum_piece(const unsigned char* from, int64_t bytes) {
  constexpr int64_t kChains = 32;
  uint64_t sums[kChains] = {};
  for (int64_t i = 0; i + 8 * kChains <= bytes; i += 8 * kChains) {
    for (int64_t c = 0; c < kChains; ++c) {
      uint64_t value;
      std::memcpy(&value, from + i + 8 * c, 8);
      sums[c] += value;
    }
  }
  return std::accumulate(sums, sums + kChains, uint64_t{0});
}

void BM_sum(benchmark::State& state) {
  constexpr int64_t kPiece = 1 << 17;
  Buffer from(kWorkingSet);
  std::memset(from.data(), 1, static_cast<size_t>(from.bytes()));
  for (auto _ : state) {
    uint64_t sum = 0;
#pragma omp parallel for schedule(dynamic, 1) reduction(+ : sum)
    for (int64_t at = 0; at < from.bytes(); at += kPiece) {
      sum += sum_piece(from.data() + at, std::min(kPiece, from.bytes() - at));
    }
    benchmark::DoNotOptimize(sum);
  }
  report(state, from.bytes());
}

// ------------------------------------------------------------------------------- operations

/// What a row of the table is about.
struct Case {
  DType dtype;
  int64_t N;  // sources
  int64_t S;  // queries; 1 for read
};

/// Tokens that make `units` rows of D elements each fill the working set.
int64_t tokens_for(DType dtype, int64_t units) {
  return std::max<int64_t>(kWorkingSet / (units * kDim * size_of(dtype)), 64);
}

int64_t row_bytes(DType dtype, int64_t tokens) { return tokens * kDim * size_of(dtype); }

/// Bytes that each operation must read and write, beside it: units of T * D elements.
int64_t attend_units(int64_t N, int64_t S) { return N + S; }
int64_t attend_backward_units(int64_t N, int64_t S) { return 2 * N + S; }
int64_t oneshot_units(int64_t N) { return N + 1; }
int64_t oneshot_backward_units(int64_t N) { return 2 * N + 1; }
constexpr int64_t kMergeUnits = 3;            // o, partial -> x
constexpr int64_t kMergeBackwardUnits = 5;    // dh, o, partial, dpartial -> dpartial
constexpr int64_t kAdvanceUnits = 5;          // o, partial, update -> partial', x
constexpr int64_t kAdvanceBackwardUnits = 6;  // dx, partial', o, dpartial -> dh, dpartial

void require(const Status& status, benchmark::State& state) {
  if (!status.ok()) {
    state.SkipWithError(status.message().c_str());
  }
}

void BM_attend(benchmark::State& state, Case c) {
  const int64_t units = attend_units(c.N, c.S);
  const int64_t T = tokens_for(c.dtype, units);
  TensorList sources(c.N, c.dtype, T, kDim);
  TensorList out(c.S, c.dtype, T, kDim);
  Tensor queries(DType::kFloat32, c.S, kDim);
  Tensor lse(DType::kFloat32, c.S, T);
  Tensor logits(DType::kFloat32, T, c.S * c.N);
  Tensor inv_rms(DType::kFloat32, T, c.N);
  AttendArgs args;
  args.sources = sources.const_views();
  args.queries = queries.view();
  args.scale = 0.02;
  args.out = out.views();
  args.lse = lse.view();
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  Workspace workspace(attend_workspace_bytes(args));
  for (auto _ : state) {
    require(attend(args, workspace.context()), state);
  }
  report(state, units * row_bytes(c.dtype, T));
}

void BM_attend_backward(benchmark::State& state, Case c) {
  const int64_t units = attend_backward_units(c.N, c.S);
  const int64_t T = tokens_for(c.dtype, units);
  TensorList sources(c.N, c.dtype, T, kDim);
  TensorList dsources(c.N, c.dtype, T, kDim);
  TensorList dout(c.S, c.dtype, T, kDim);
  Tensor queries(DType::kFloat32, c.S, kDim);
  Tensor dqueries(DType::kFloat32, c.S, kDim);
  Tensor lse(DType::kFloat32, c.S, T);
  Tensor logits(DType::kFloat32, T, c.S * c.N);
  Tensor inv_rms(DType::kFloat32, T, c.N);
  AttendBackwardArgs args;
  args.sources = sources.const_views();
  args.queries = queries.view();
  args.scale = 0.02;
  args.lse = lse.view();
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  args.dout = dout.const_views();
  args.dsources = dsources.views();
  args.dqueries = dqueries.view();
  Workspace workspace(attend_backward_workspace_bytes(args));
  for (auto _ : state) {
    require(attend_backward(args, workspace.context()), state);
  }
  report(state, units * row_bytes(c.dtype, T));
}

/// The tensors of one reading site.
struct Site {
  int64_t T;
  TensorList sources;
  Tensor phase1_out, phase1_lse, partial, query, norm_weight, logits, inv_rms, mix_inv_rms;

  Site(DType dtype, int64_t units, int64_t N, bool phase1, int64_t K)
      : T(tokens_for(dtype, units)),
        sources(N, dtype, T, kDim),
        phase1_out(dtype, phase1 ? T : 0, kDim),
        phase1_lse(DType::kFloat32, 1, T),
        partial(dtype, phase1 ? T : 0, kDim),
        query(DType::kFloat32, 1, kDim),
        norm_weight(dtype, 1, kDim),
        logits(DType::kFloat32, T, K),
        inv_rms(DType::kFloat32, T, K),
        mix_inv_rms(DType::kFloat32, 1, T) {}
};

void BM_oneshot(benchmark::State& state, Case c) {
  Site site(c.dtype, oneshot_units(c.N), c.N, false, c.N);
  Tensor x(c.dtype, site.T, kDim);
  ReadArgs args;
  args.sources = site.sources.const_views();
  args.query = site.query.view();
  args.scale = 0.02;
  args.x = x.view();
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  Workspace workspace(read_workspace_bytes(args));
  for (auto _ : state) {
    require(read(args, workspace.context()), state);
  }
  report(state, oneshot_units(c.N) * row_bytes(c.dtype, site.T));
}

void BM_oneshot_backward(benchmark::State& state, Case c) {
  Site site(c.dtype, oneshot_backward_units(c.N), c.N, false, c.N);
  Tensor dx(c.dtype, site.T, kDim);
  TensorList dsources(c.N, c.dtype, site.T, kDim);
  Tensor dquery(DType::kFloat32, 1, kDim);
  ReadBackwardArgs args;
  args.sources = site.sources.const_views();
  args.query = site.query.view();
  args.scale = 0.02;
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  args.dx = dx.view();
  args.dsources = dsources.views();
  args.dquery = dquery.view();
  Workspace workspace(read_backward_workspace_bytes(args));
  for (auto _ : state) {
    require(read_backward(args, workspace.context()), state);
  }
  report(state, oneshot_backward_units(c.N) * row_bytes(c.dtype, site.T));
}

void BM_merge(benchmark::State& state, Case c) {
  Site site(c.dtype, kMergeUnits, 0, true, 2);
  Tensor x(c.dtype, site.T, kDim);
  ReadArgs args;
  args.phase1_out = site.phase1_out.view();
  args.phase1_lse = site.phase1_lse.view();
  args.partial = site.partial.view();
  args.query = site.query.view();
  args.scale = 0.02;
  args.x = x.view();
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  Workspace workspace(read_workspace_bytes(args));
  for (auto _ : state) {
    require(read(args, workspace.context()), state);
  }
  report(state, kMergeUnits * row_bytes(c.dtype, site.T));
}

void BM_merge_backward(benchmark::State& state, Case c) {
  Site site(c.dtype, kMergeBackwardUnits, 0, true, 2);
  Tensor dx(c.dtype, site.T, kDim);
  Tensor dpartial(c.dtype, site.T, kDim);
  Tensor dquery(DType::kFloat32, 1, kDim);
  Tensor gate(DType::kFloat32, 1, site.T);
  Tensor dlse(DType::kFloat32, 1, site.T);
  ReadBackwardArgs args;
  args.phase1_out = site.phase1_out.view();
  args.partial = site.partial.view();
  args.query = site.query.view();
  args.scale = 0.02;
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  args.dx = dx.view();
  args.dpartial_out = dpartial.view();
  args.dpartial = dpartial.view();
  args.gate = gate.view();
  args.dphase1_lse = dlse.view();
  args.dquery = dquery.view();
  Workspace workspace(read_backward_workspace_bytes(args));
  for (auto _ : state) {
    require(read_backward(args, workspace.context()), state);
  }
  report(state, kMergeBackwardUnits * row_bytes(c.dtype, site.T));
}

void BM_advance(benchmark::State& state, Case c) {
  Site site(c.dtype, kAdvanceUnits, 0, true, 2);
  TensorList update(1, c.dtype, site.T, kDim);
  Tensor partial_out(c.dtype, site.T, kDim);
  Tensor x(c.dtype, site.T, kDim);
  ReadArgs args;
  args.phase1_out = site.phase1_out.view();
  args.phase1_lse = site.phase1_lse.view();
  args.partial = site.partial.view();
  args.updates = update.const_views();
  args.partial_out = partial_out.view();
  args.query = site.query.view();
  args.scale = 0.02;
  args.norm = OutputNorm::kRms;
  args.norm_weight = site.norm_weight.view();
  args.x = x.view();
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  args.mix_inv_rms = site.mix_inv_rms.view();
  Workspace workspace(read_workspace_bytes(args));
  for (auto _ : state) {
    require(read(args, workspace.context()), state);
  }
  report(state, kAdvanceUnits * row_bytes(c.dtype, site.T));
}

void BM_advance_backward(benchmark::State& state, Case c) {
  Site site(c.dtype, kAdvanceBackwardUnits, 0, true, 2);
  Tensor dx(c.dtype, site.T, kDim);
  Tensor dh(c.dtype, site.T, kDim);
  Tensor dpartial(c.dtype, site.T, kDim);
  Tensor dquery(DType::kFloat32, 1, kDim);
  Tensor dnorm_weight(c.dtype, 1, kDim);
  Tensor gate(DType::kFloat32, 1, site.T);
  Tensor dlse(DType::kFloat32, 1, site.T);
  ReadBackwardArgs args;
  args.phase1_out = site.phase1_out.view();
  args.partial = site.partial.view();
  args.query = site.query.view();
  args.scale = 0.02;
  args.norm = OutputNorm::kRms;
  args.norm_weight = site.norm_weight.view();
  args.logits = site.logits.view();
  args.inv_rms = site.inv_rms.view();
  args.mix_inv_rms = site.mix_inv_rms.view();
  args.dx = dx.view();
  args.dpartial_out = dpartial.view();
  args.dpartial = dpartial.view();
  args.dh = dh.view();
  args.gate = gate.view();
  args.dphase1_lse = dlse.view();
  args.dquery = dquery.view();
  args.dnorm_weight = dnorm_weight.view();
  Workspace workspace(read_backward_workspace_bytes(args));
  for (auto _ : state) {
    require(read_backward(args, workspace.context()), state);
  }
  report(state, kAdvanceBackwardUnits * row_bytes(c.dtype, site.T));
}

// ------------------------------------------------------------------------------------- rows

void add(const char* op, void (*function)(benchmark::State&, Case), Case c) {
  const std::string name =
      std::string(op) + "/" + (c.dtype == DType::kBFloat16 ? "bfloat16" : "float32") +
      "/N=" + std::to_string(c.N) + "/S=" + std::to_string(c.S) + "/D=" + std::to_string(kDim);
  benchmark::RegisterBenchmark(name.c_str(), function, c)
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

void add_all() {
  const int all = thread_count();
  auto* copies = benchmark::RegisterBenchmark("copy/threads", BM_copy);
  copies->Arg(1)->UseRealTime()->Unit(benchmark::kMillisecond);
  if (all > 1) {
    copies->Arg(all);
  }
  benchmark::RegisterBenchmark("sum", BM_sum)->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t N : {4, 8}) {
      for (const int64_t S : {1, 8}) {
        add("attend", BM_attend, {dtype, N, S});
        add("attend_backward", BM_attend_backward, {dtype, N, S});
      }
      add("oneshot", BM_oneshot, {dtype, N, 1});
      add("oneshot_backward", BM_oneshot_backward, {dtype, N, 1});
    }
    add("merge", BM_merge, {dtype, 0, 1});
    add("merge_backward", BM_merge_backward, {dtype, 0, 1});
    add("advance", BM_advance, {dtype, 0, 1});
    add("advance_backward", BM_advance_backward, {dtype, 0, 1});
  }
}

}  // namespace
}  // namespace flash_attn_res

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  flash_attn_res::add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
