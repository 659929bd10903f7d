// What docs/cpp.md shows beyond examples/cpp/main.cpp, word for word, and whether it does what the
// page says. Also what a build without CUDA answers where a GPU is asked for.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flash_attn_res/flash_attn_res.h"

namespace {

namespace far = flash_attn_res;

constexpr int64_t kTokens = 37;      // T
constexpr int64_t kWidth = 320;      // D: two groups of 128 columns and one of 64
constexpr int64_t kBlocks = 3;       // N
constexpr int64_t kGroups = 3;       // of columns that share a scale of x
constexpr int64_t kQueries = 2;      // S
constexpr float kLargestE4m3 = 448;  // of a number of x in float8

/// A float32 matrix that owns its memory, filled with numbers that look random.
struct Tensor {
  Tensor(int64_t num_rows, int64_t num_cols, int seed)
      : values(static_cast<size_t>(num_rows * num_cols)), rows(num_rows), cols(num_cols) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = std::sin(1.7F * static_cast<float>(i) + static_cast<float>(seed));
    }
  }

  far::Matrix view() { return {values.data(), rows, cols, cols, far::DType::kFloat32}; }
  float at(int64_t row, int64_t col) const { return values[static_cast<size_t>(row * cols + col)]; }

  std::vector<float> values;
  int64_t rows, cols;
};

/// Snapshots [T, D] one behind the other, as an engine keeps them.
struct Bank {
  far::Matrix row(int64_t block) {
    return {&memory.values[static_cast<size_t>(block * kTokens * kWidth)], kTokens, kWidth, kWidth,
            far::DType::kFloat32};
  }
  std::vector<far::ConstMatrix> rows(int64_t count) {
    std::vector<far::ConstMatrix> views;
    for (int64_t block = 0; block < count; ++block) {
      views.emplace_back(row(block));
    }
    return views;
  }

  Tensor memory{(kBlocks + 1) * kTokens, kWidth, 1};
};

/// Scratch memory, 64-byte aligned. That of a GPU would come from cudaMalloc.
struct Scratch {
  void* reserve(int64_t bytes) {
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(bytes / 64 + 1) * 64));
    return memory.get();
  }

  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
};

/// Three threads for each piece of work, one index after the other.
struct Pool {
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    constexpr int64_t kThreads = 3;
    std::vector<std::thread> threads;
    for (int64_t first = 0; first < kThreads; ++first) {
      threads.emplace_back([&, first] {
        for (int64_t index = first; index < count; index += kThreads) {
          task(index);
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    tasks += count;
  }

  int64_t tasks = 0;
};

far::Status attend_on_gpu(const far::AttendArgs& args, int32_t gpu, void* stream,
                          Scratch& scratch) {
  const far::Device device = {far::DeviceType::kCuda, gpu};
  const int64_t bytes = far::attend_workspace_bytes(args, device);  // without it: the CPU's size
  return far::attend(args, {.device = device,
                            .stream = stream,  // a cudaStream_t
                            .workspace = scratch.reserve(bytes),
                            .workspace_bytes = bytes});
}

void run_on_pool(void* pool, int64_t count, void (*task)(void* context, int64_t index),
                 void* context) {
  static_cast<Pool*>(pool)->run(count, [=](int64_t index) { task(context, index); });
}

/// Arguments of all operations, valid where they are not run.
struct Operations {
  Operations() {
    attend.sources = sources;
    attend.queries = queries.view();
    attend.out = outs;
    attend.lse = lse.view();
    attend_backward.sources = sources;
    attend_backward.queries = queries.view();
    attend_backward.lse = lse.view();
    attend_backward.logits = logits.view();
    attend_backward.inv_rms = inv_rms.view();
    attend_backward.dqueries = dqueries.view();
    read.sources = sources;
    read.query = query.view();
    read.x = x.view();
    read_backward.sources = sources;
    read_backward.query = query.view();
    read_backward.logits = inv_rms.view();
    read_backward.inv_rms = inv_rms.view();
    read_backward.dx = x.view();
    stochastic_add.terms = sources;
    stochastic_add.seed = seed.data();
    stochastic_add.out = {halves.data(), kTokens, kWidth, kWidth, far::DType::kBFloat16};
    quantize.terms = sources;
    quantize.out = {halves.data(), kTokens, kWidth, kWidth, far::DType::kFloat16};
    quantize.scale = {scales.data(), kTokens, 1, 1, far::DType::kFloat8E8M0};
  }

  Bank bank;
  Tensor queries{kQueries, kWidth, 2}, query{1, kWidth, 3}, dqueries{kQueries, kWidth, 4};
  Tensor out1{kTokens, kWidth, 5}, out2{kTokens, kWidth, 6}, x{kTokens, kWidth, 7};
  Tensor lse{kQueries, kTokens, 8}, logits{kTokens, kQueries* kBlocks, 9};
  Tensor inv_rms{kTokens, kBlocks, 10};
  std::vector<uint16_t> halves = std::vector<uint16_t>(static_cast<size_t>(kTokens * kWidth));
  std::vector<uint8_t> scales = std::vector<uint8_t>(static_cast<size_t>(kTokens));
  std::array<int64_t, 2> seed = {1, 0};
  std::vector<far::ConstMatrix> sources = bank.rows(kBlocks);
  std::array<far::Matrix, kQueries> outs = {out1.view(), out2.view()};

  far::AttendArgs attend;
  far::AttendBackwardArgs attend_backward;
  far::ReadArgs read;
  far::ReadBackwardArgs read_backward;
  far::StochasticAddArgs stochastic_add;
  far::QuantizeArgs quantize;
};

TEST(Documentation, AGpuInABuildWithoutCuda) {
  if (FLASH_ATTN_RES_TEST_CUDA) {
    GTEST_SKIP() << "this build has CUDA kernels";
  }
  Operations o;
  const std::vector<float> before = o.out1.values;
  const auto expect = [](const char* op, const far::Status& status) {
    EXPECT_EQ(status.code(), far::StatusCode::kUnsupportedDevice);
    EXPECT_EQ(
        status.message(),
        std::string(op) +
            ": this build of flash_attn_res has no CUDA kernels; build it where nvcc is found");
  };
  Scratch scratch;
  expect("attend", attend_on_gpu(o.attend, 0, nullptr, scratch));
  const far::Context gpu = {.device = {far::DeviceType::kCuda, 0}};
  expect("attend", far::attend(o.attend, gpu));
  expect("attend_backward", far::attend_backward(o.attend_backward, gpu));
  expect("read", far::read(o.read, gpu));
  expect("read_backward", far::read_backward(o.read_backward, gpu));
  expect("stochastic_add", far::stochastic_add(o.stochastic_add, gpu));
  expect("quantize", far::quantize(o.quantize, gpu));
  EXPECT_EQ(o.out1.values, before);
  // What is wrong with the arguments comes first, as on a GPU.
  o.attend.eps = 0;
  EXPECT_EQ(far::attend(o.attend, gpu).code(), far::StatusCode::kInvalidArgument);
}

TEST(Documentation, Executor) {
  Operations o;
  Scratch scratch;
  const int64_t bytes = far::attend_workspace_bytes(o.attend);
  void* const memory = scratch.reserve(bytes);
  ASSERT_TRUE(far::attend(o.attend, {.workspace = memory, .workspace_bytes = bytes}).ok());
  const std::vector<float> expected = o.out2.values;
  o.out2.values.assign(o.out2.values.size(), NAN);

  Pool pool;
  const far::Executor executor = {.run = run_on_pool, .pool = &pool};
  const far::Context context = {
      .workspace = memory, .workspace_bytes = bytes, .executor = &executor};
  ASSERT_TRUE(far::attend(o.attend, context).ok());
  EXPECT_GT(pool.tasks, 1);
  EXPECT_EQ(o.out2.values, expected);
}

TEST(Documentation, SiteOfKimiK3) {
  Bank bank;
  Tensor sum(kTokens, kWidth, 2);
  Tensor output(kTokens, kWidth, 3);
  Tensor query(1, kWidth, 4);
  Tensor weight(1, kWidth, 5);
  Tensor scales(kTokens, kGroups, 6);
  std::vector<uint8_t> bytes(static_cast<size_t>(kTokens * kWidth));
  Scratch scratch;
  const auto run = [&](const far::ReadArgs& args) {
    const int64_t needed = far::read_workspace_bytes(args);
    const far::Status status =
        far::read(args, {.workspace = scratch.reserve(needed), .workspace_bytes = needed});
    ASSERT_TRUE(status.ok()) << status.message();
  };

  // The same with a float32 x, into memory of its own.
  Tensor wide(kTokens, kWidth, 7);
  Tensor wide_sum(kTokens, kWidth, 8);
  const std::vector<far::ConstMatrix> sources = bank.rows(kBlocks);
  const std::array<far::ConstMatrix, 1> updates = {output.view()};
  run({.sources = sources,
       .partial = sum.view(),
       .updates = updates,
       .query = query.view(),
       .eps = 1e-5,
       .norm = far::OutputNorm::kRms,
       .norm_weight = weight.view(),
       .norm_eps = 1e-5,
       .x = wide.view(),
       .partial_out = wide_sum.view()});

  const far::ConstMatrix folded = query.view();
  const far::ConstMatrix norm_weight = weight.view();
  const far::Matrix prefix = sum.view();
  const far::Matrix x8 = {bytes.data(), kTokens, kWidth, kWidth, far::DType::kFloat8E4M3};
  const far::Matrix x_scale = scales.view();
  const int64_t blocks = kBlocks;
  const far::ReadArgs site = {
      .sources = sources,  // the bank's rows 0..blocks - 1
      .partial = prefix,
      .updates = updates,  // what the last sublayer produced
      .query = folded,
      .eps = 1e-5,
      .norm = far::OutputNorm::kRms,
      .norm_weight = norm_weight,
      .norm_eps = 1e-5,
      .x = x8,                       // [T, D] float8 e4m3
      .partial_out = prefix,         // in place
      .x_scale = x_scale,            // [T, ceil(D / 128)] float32
      .snapshot = bank.row(blocks),  // where a block ends, else left out
  };
  run(site);

  EXPECT_EQ(sum.values, wide_sum.values);
  EXPECT_EQ(std::memcmp(site.snapshot.data, sum.values.data(), sum.values.size() * 4), 0);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t group = 0; group < kGroups; ++group) {
      float largest = 0;
      for (int64_t d = group * 128; d < std::min<int64_t>(kWidth, group * 128 + 128); ++d) {
        largest = std::max(largest, std::fabs(wide.at(t, d)));
      }
      EXPECT_NEAR(scales.at(t, group), largest / kLargestE4m3, 1e-6 * largest);
    }
  }

  // Behind the block's end there is no prefix: the output that is pending begins it.
  const std::vector<far::ConstMatrix> more = bank.rows(kBlocks + 1);
  far::ReadArgs next = site;
  next.sources = more;
  next.partial = {};
  next.snapshot = {};
  run(next);
  EXPECT_EQ(sum.values, output.values);
}

}  // namespace
