// Bad arguments: each is refused before anything is written, and the message names the argument,
// its shape and what was expected.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "flash_attn_res/flash_attn_res.h"

namespace flash_attn_res {
namespace {

using testing::Test;

constexpr int64_t kTokens = 3;
constexpr int64_t kDim = 8;
constexpr int64_t kQueries = 2;
constexpr int64_t kSources = 2;

/// A float32 matrix of ones.
struct Buffer {
  std::vector<float> values;
  int64_t rows, cols;

  Buffer(int64_t rows, int64_t cols)
      : values(static_cast<size_t>(rows * cols), 1.0F), rows(rows), cols(cols) {}
  Matrix view() { return {values.data(), rows, cols, cols, DType::kFloat32}; }
};

std::string text(const Status& status) { return status.message(); }

/// Valid arguments for all four operations, for tests to spoil one of.
class ValidateTest : public Test {
 protected:
  ValidateTest() {
    attend_.sources = source_views_;
    attend_.queries = queries_.view();
    attend_.out = out_views_;
    attend_.lse = lse_.view();

    attend_backward_.sources = source_views_;
    attend_backward_.queries = queries_.view();
    attend_backward_.lse = lse_.view();
    attend_backward_.logits = logits_.view();
    attend_backward_.inv_rms = inv_rms_.view();
    attend_backward_.dqueries = dqueries_.view();

    read_.sources = source_views_;
    read_.query = query_.view();
    read_.x = x_.view();

    read_backward_.sources = source_views_;
    read_backward_.query = query_.view();
    read_backward_.logits = inv_rms_.view();
    read_backward_.inv_rms = inv_rms_.view();
    read_backward_.dx = x_.view();
  }

  template <class Args>
  static void expect_refused(const Args& args, Status (*op)(const Args&, const Context&),
                             const std::string& words) {
    const Status status = op(args, Context{});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(text(status).find(words), std::string::npos)
        << "message: " << text(status) << "\nexpected it to contain: " << words;
  }

  Buffer first_{kTokens, kDim}, second_{kTokens, kDim}, queries_{kQueries, kDim}, query_{1, kDim};
  Buffer out_first_{kTokens, kDim}, out_second_{kTokens, kDim}, lse_{kQueries, kTokens};
  Buffer logits_{kTokens, kQueries* kSources}, inv_rms_{kTokens, kSources};
  Buffer dqueries_{kQueries, kDim}, x_{kTokens, kDim};
  std::vector<ConstMatrix> source_views_{first_.view(), second_.view()};
  std::vector<Matrix> out_views_{out_first_.view(), out_second_.view()};
  AttendArgs attend_;
  AttendBackwardArgs attend_backward_;
  ReadArgs read_;
  ReadBackwardArgs read_backward_;
};

TEST_F(ValidateTest, NoSources) {
  attend_.sources = {};
  expect_refused(attend_, attend, "attend: sources has 0 items, expected 1 to 512");
  read_.sources = {};
  expect_refused(read_, read, "read: no value was given");
}

TEST_F(ValidateTest, TooManySources) {
  const std::vector<ConstMatrix> many(kMaxSources + 1, first_.view());
  attend_.sources = many;
  expect_refused(attend_, attend, "sources has 513 items, expected 1 to 512");
  read_.sources = many;
  expect_refused(read_, read, "sources has 513 items");
}

TEST_F(ValidateTest, WidthMismatch) {
  Buffer narrow(kTokens, kDim - 1);
  source_views_[1] = narrow.view();
  expect_refused(attend_, attend, "sources[1] has shape [3, 7], expected [3, 8] ([T, D])");
  expect_refused(read_, read, "sources[1] has shape [3, 7], expected [3, 8]");
}

TEST_F(ValidateTest, TokenMismatch) {
  Buffer longer(kTokens + 1, kDim);
  source_views_[1] = longer.view();
  expect_refused(attend_, attend, "sources[1] has shape [4, 8], expected [3, 8]");
}

TEST_F(ValidateTest, MixedSourceDtypes) {
  source_views_[1].dtype = DType::kBFloat16;
  expect_refused(attend_, attend, "sources[1] is bfloat16 but sources[0] is float32");
}

TEST_F(ValidateTest, UnsupportedDtypes) {
  attend_.queries.dtype = DType::kBFloat16;
  expect_refused(attend_, attend, "queries is bfloat16, expected float32");
  attend_.queries.dtype = static_cast<DType>(99);
  expect_refused(attend_, attend, "queries is an unknown dtype, expected float32");
  read_.x.dtype = DType::kFloat64;
  expect_refused(read_, read, "x is float64, expected float32, bfloat16 or float16");
}

TEST_F(ValidateTest, Float64DoesNotMix) {
  std::vector<double> wide(kTokens * kDim);
  for (ConstMatrix& view : source_views_) {
    view.data = wide.data();
    view.dtype = DType::kFloat64;
  }
  expect_refused(attend_, attend, "queries is float32, expected float64");
}

TEST_F(ValidateTest, BadNumbers) {
  for (const double eps : {0.0, -1e-6, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    attend_.eps = eps;
    expect_refused(attend_, attend, "eps is ");
    read_.eps = eps;
    expect_refused(read_, read, "expected a number > 0");
  }
  attend_.eps = read_.eps = 1e-6;
  attend_.scale = NAN;
  expect_refused(attend_, attend, "scale is ");
  read_.norm = OutputNorm::kRms;
  read_.norm_eps = 0;
  expect_refused(read_, read, "norm_eps is 0");
}

TEST_F(ValidateTest, NegativeCountsAndStrides) {
  source_views_[0].rows = -1;
  expect_refused(attend_, attend, "sources[0] has shape [-1, 8]: a negative count");
  source_views_[0] = first_.view();
  source_views_[0].stride = -8;
  expect_refused(attend_, attend, "sources[0] of shape [3, 8] has row stride -8, expected >= 0");
  source_views_[0] = first_.view();
  out_views_[1].stride = 4;
  expect_refused(attend_, attend, "out[1] of shape [3, 8] has row stride 4");
}

TEST_F(ValidateTest, NullPointers) {
  source_views_[1].data = nullptr;
  expect_refused(attend_, attend, "sources[1] of shape [3, 8] has a null data pointer");
}

TEST_F(ValidateTest, QueryWidth) {
  Buffer wide(kQueries, kDim + 1);
  attend_.queries = wide.view();
  expect_refused(attend_, attend, "queries has shape [2, 9], expected a width R from 1 to 8");
  read_.query = wide.view();
  expect_refused(read_, read, "query has shape [2, 9]");
}

TEST_F(ValidateTest, QueryCount) {
  Buffer many(kMaxQueries + 1, kDim);
  attend_.queries = many.view();
  expect_refused(attend_, attend, "queries has shape [129, 8], expected 1 to 128 queries");
  attend_.queries = queries_.view();
  attend_.out = attend_.out.first(1);
  expect_refused(attend_, attend, "out has 1 items, expected 2, one for each row of queries");
}

TEST_F(ValidateTest, MissingArguments) {
  attend_.lse = {};
  expect_refused(attend_, attend, "lse is missing, expected shape [2, 3] ([S, T])");
  read_.query = {};
  expect_refused(read_, read, "query is missing, expected shape [1, R]: there are 2 terms");
  attend_backward_.logits = {};
  expect_refused(attend_backward_, attend_backward, "logits is missing, expected shape [3, 4]");
  read_backward_.inv_rms = {};
  expect_refused(read_backward_, read_backward, "inv_rms is missing, expected shape [3, 2]");
}

TEST_F(ValidateTest, ArgumentsThatNeedOthers) {
  read_.phase1_lse = lse_.view();
  expect_refused(read_, read, "phase1_lse has shape [2, 3], expected [1, 3]");
  Buffer row(1, kTokens);
  read_.phase1_lse = row.view();
  expect_refused(read_, read, "phase1_lse was given without phase1_out");
  read_.phase1_lse = {};
  Buffer weight(1, kDim);
  read_.norm_weight = weight.view();
  expect_refused(read_, read, "norm_weight was given but norm is kNone");
  read_.norm_weight = {};
  const std::vector<ConstMatrix> updates = {first_.view()};
  read_.updates = updates;
  expect_refused(read_, read, "partial_out is missing, expected shape [3, 8]");
  const std::vector<ConstMatrix> three(3, first_.view());
  read_.updates = three;
  expect_refused(read_, read, "updates has 3 items, expected 0 to 2");
  read_backward_.dpartial = x_.view();
  expect_refused(read_backward_, read_backward, "dpartial was given without partial");
}

TEST_F(ValidateTest, DhOverPhase1OutIsTheSameView) {
  Buffer statistics(kTokens, kSources + 1);
  read_backward_.logits = statistics.view();
  read_backward_.inv_rms = statistics.view();
  read_backward_.phase1_out = x_.view();
  read_backward_.query = query_.view();
  read_backward_.dh = x_.view();
  read_backward_.dh.stride += 1;
  expect_refused(read_backward_, read_backward,
                 "dh is the memory of phase1_out, expected the same dtype and row stride");
  read_backward_.dh = x_.view();
  read_backward_.dh.dtype = DType::kBFloat16;
  expect_refused(read_backward_, read_backward,
                 "dh is the memory of phase1_out, expected the same dtype and row stride");
}

TEST_F(ValidateTest, EnumsOutsideTheirRange) {
  read_.norm = static_cast<OutputNorm>(7);
  expect_refused(read_, read, "norm is 7, expected kNone (0) or kRms (1)");
  read_.norm = OutputNorm::kNone;
  read_.mix_rounding = static_cast<MixRounding>(5);
  expect_refused(read_, read, "mix_rounding is 5");
}

TEST_F(ValidateTest, QuantizedX) {
  std::vector<unsigned char> bytes(kTokens * 300);
  Buffer scale(kTokens, 1);
  Buffer wide(kTokens, 3);
  read_.x_scale = scale.view();
  expect_refused(read_, read, "x_scale was given but x is float32, expected float8_e4m3");
  read_.x = {bytes.data(), kTokens, kDim, kDim, DType::kFloat8E4M3};
  read_.x_scale = {};
  expect_refused(read_, read,
                 "x is float8_e4m3 but x_scale is missing, expected shape [3, 1] or [3, 1]");
  read_.x_scale = wide.view();
  expect_refused(read_, read, "x_scale has shape [3, 3], expected [3, 1]");
  read_.x_scale = scale.view();
  read_.x_scale.dtype = DType::kBFloat16;
  expect_refused(read_, read, "x_scale is bfloat16, expected float32");
  read_.x_scale = scale.view();
  read_.scale_rounding = static_cast<ScaleRounding>(4);
  expect_refused(read_, read, "scale_rounding is 4, expected kNone (0) or kPowerOfTwo (1)");
  read_.scale_rounding = ScaleRounding::kNone;
  read_.mix = read_.x;
  expect_refused(read_, read, "mix is float8_e4m3, expected float32, bfloat16 or float16");
}

TEST_F(ValidateTest, Snapshot) {
  Buffer sum(kTokens, kDim);
  Buffer snapshot(kTokens, kDim);
  Buffer partial(kTokens, kDim);
  read_.snapshot = snapshot.view();
  expect_refused(read_, read, "snapshot was given without partial or updates");
  read_.partial = partial.view();
  read_.snapshot.dtype = DType::kBFloat16;
  expect_refused(read_, read, "snapshot is bfloat16, expected the dtype of the sum, float32");
  read_.snapshot = second_.view();
  expect_refused(read_, read,
                 "snapshot of shape [3, 8] overlaps the memory of sources[1] of shape [3, 8]");
  read_.snapshot = partial.view();
  expect_refused(read_, read, "snapshot of shape [3, 8] overlaps the memory of partial");
  read_.snapshot = x_.view();
  expect_refused(read_, read, "snapshot of shape [3, 8] overlaps the memory of x of shape [3, 8]");
  read_.snapshot = sum.view();
  read_.partial_out = sum.view();
  expect_refused(read_, read, "partial_out of shape [3, 8] overlaps the memory of snapshot");
}

TEST_F(ValidateTest, Aliasing) {
  const std::vector<Matrix> outs = {out_first_.view(), second_.view()};
  attend_.out = outs;
  expect_refused(attend_, attend,
                 "out[1] of shape [3, 8] overlaps the memory of sources[1] of shape [3, 8]");
  read_.x = first_.view();
  expect_refused(read_, read, "x of shape [3, 8] overlaps the memory of sources[0]");
  // Rows of one bank [T, N, D] interleave without meeting; neighbours by half a row do meet.
  Buffer bank(kTokens * 3, kDim);
  const auto row = [&](int64_t first) {
    return Matrix{bank.values.data() + first, kTokens, kDim, 3 * kDim, DType::kFloat32};
  };
  const std::vector<ConstMatrix> sources = {row(0), row(kDim)};
  read_.sources = sources;
  read_.x = x_.view();
  read_.partial = first_.view();
  read_.snapshot = row(2 * kDim - 4);
  expect_refused(read_, read, "snapshot of shape [3, 8] overlaps the memory of sources[1]");
  read_.snapshot = row(2 * kDim);
  EXPECT_EQ(text(read(read_)).find("overlaps"), std::string::npos);
  EXPECT_EQ(read(read_).code(), StatusCode::kWorkspaceTooSmall);
}

TEST_F(ValidateTest, Workspace) {
  const int64_t needed = attend_backward_workspace_bytes(attend_backward_);
  ASSERT_GT(needed, 0);
  const Status missing = attend_backward(attend_backward_);
  EXPECT_EQ(missing.code(), StatusCode::kWorkspaceTooSmall);
  EXPECT_EQ(text(missing),
            "attend_backward: workspace has 0 bytes, expected at least " + std::to_string(needed));
  alignas(64) static char memory[1 << 20];
  ASSERT_LT(needed + 1, static_cast<int64_t>(sizeof(memory)));
  Context context;
  context.workspace = memory + 1;
  context.workspace_bytes = needed;
  EXPECT_EQ(text(attend_backward(attend_backward_, context)),
            "attend_backward: workspace is not aligned to 64 bytes");
  context.workspace = memory;
  EXPECT_EQ(text(attend_backward(attend_backward_, context)), "");
}

TEST_F(ValidateTest, UnknownDevice) {
  Context context;
  context.device.type = static_cast<DeviceType>(9);
  const Status status = attend(attend_, context);
  EXPECT_EQ(status.code(), StatusCode::kUnsupportedDevice);
  EXPECT_NE(text(status).find("unknown device type 9"), std::string::npos);
}

TEST_F(ValidateTest, NothingIsWrittenOnError) {
  attend_.eps = -1;
  out_first_.values.assign(out_first_.values.size(), -5.0F);
  ASSERT_FALSE(attend(attend_).ok());
  for (const float value : out_first_.values) {
    EXPECT_EQ(value, -5.0F);
  }
}

TEST_F(ValidateTest, WorkspaceQueryOfBadArgumentsIsZero) {
  attend_backward_.sources = {};
  EXPECT_EQ(attend_backward_workspace_bytes(attend_backward_), 0);
}

TEST(FoldTest, FoldsAndDifferentiates) {
  std::vector<float> w = {1, 2, 3, 4}, g = {5, 6}, u(4), du = {1, -1, 2, 0.5}, dw(4), dg(2);
  const ConstMatrix queries = {w.data(), 2, 2, 2, DType::kFloat32};
  const ConstMatrix weight = {g.data(), 1, 2, 2, DType::kFloat32};
  ASSERT_TRUE(fold_queries(queries, weight, {u.data(), 2, 2, 2, DType::kFloat32}).ok());
  EXPECT_EQ(u, (std::vector<float>{5, 12, 15, 24}));
  ASSERT_TRUE(fold_queries_backward(queries, weight, {du.data(), 2, 2, 2, DType::kFloat32},
                                    {dw.data(), 2, 2, 2, DType::kFloat32},
                                    {dg.data(), 1, 2, 2, DType::kFloat32})
                  .ok());
  EXPECT_EQ(dw, (std::vector<float>{5, -6, 10, 3}));
  EXPECT_EQ(dg, (std::vector<float>{7, 0}));
}

TEST(FoldTest, RefusesAMismatch) {
  std::vector<float> w(4), g(3), u(4);
  const Status status =
      fold_queries({w.data(), 2, 2, 2, DType::kFloat32}, {g.data(), 1, 3, 3, DType::kFloat32},
                   {u.data(), 2, 2, 2, DType::kFloat32});
  EXPECT_NE(status.message().find("key_weight has shape [1, 3], expected [1, 2]"),
            std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace flash_attn_res
