// attend and attend_backward on the CPU against the reference, for every instruction set.

#include "flash_attn_res/attend.h"

#include <array>

#include "cpu_testing.h"
#include "reference/reference.h"

namespace flash_attn_res {
namespace {

/// A call of attend and of its backward, described.
struct AttendCase {
  int64_t T = 5, N = 3, S = 2, D = 64, R = 64;
  DType sources = DType::kFloat32;
  DType out = DType::kFloat32;
  DType dsources = DType::kFloat32;
  Layout layout;
  bool repeated_sources = false;
  bool with_dout = true, with_gate = true, with_dlse = true;
  bool with_dsources = true, with_dqueries = true, accumulate = false, with_options = true;
  double scale = 1.0;
  double eps = 1e-6;
};

std::string describe(const AttendCase& c) {
  return "T=" + std::to_string(c.T) + " N=" + std::to_string(c.N) + " S=" + std::to_string(c.S) +
         " D=" + std::to_string(c.D) + " R=" + std::to_string(c.R) +
         " sources=" + std::to_string(static_cast<int>(c.sources)) +
         " out=" + std::to_string(static_cast<int>(c.out)) +
         " dsources=" + std::to_string(static_cast<int>(c.dsources)) +
         " accumulate=" + std::to_string(c.accumulate);
}

struct AttendInputs {
  Tensors sources;
  Tensor queries;
  Tensors dout;
  Tensor gate, dlse;
  Tensors dsources_before;
  Tensor dqueries_before;
};

struct AttendForward {
  Tensors out;
  Tensor lse, logits, inv_rms, probs;
};

struct AttendBackward {
  Tensors dsources;
  Tensor dqueries;
};

AttendInputs make_inputs(const AttendCase& c, Rng& rng) {
  AttendInputs in;
  Layout source_layout = c.layout;
  source_layout.repeated = c.repeated_sources;
  for (int64_t n = 0; n < c.N; ++n) {
    in.sources.emplace_back(c.sources, c.T, c.D, source_layout).fill(rng);
    in.dsources_before.emplace_back(c.dsources, c.T, c.D, c.layout).fill(rng);
  }
  in.queries = Tensor(DType::kFloat32, c.S, c.R, c.layout);
  in.queries.fill(rng, 1.0 / std::sqrt(static_cast<double>(c.R)));
  for (int64_t s = 0; s < c.S; ++s) {
    in.dout.emplace_back(c.out, c.T, c.D, c.layout).fill(rng);
  }
  in.gate = Tensor(DType::kFloat32, c.S, c.T, c.layout);
  in.gate.fill(rng);
  in.dlse = Tensor(DType::kFloat32, c.S, c.T, c.layout);
  in.dlse.fill(rng);
  in.dqueries_before = Tensor(DType::kFloat32, c.S, c.R, c.layout);
  in.dqueries_before.fill(rng);
  return in;
}

/// Outputs in the dtypes of the case, or in double for the reference.
AttendForward forward_outputs(const AttendCase& c, bool wide) {
  const DType value = wide ? DType::kFloat64 : c.out;
  const DType statistic = wide ? DType::kFloat64 : DType::kFloat32;
  AttendForward result;
  for (int64_t s = 0; s < c.S; ++s) {
    result.out.emplace_back(value, c.T, c.D, c.layout);
  }
  result.lse = Tensor(statistic, c.S, c.T, c.layout);
  if (c.with_options) {
    result.logits = Tensor(statistic, c.T, c.S * c.N, c.layout);
    result.inv_rms = Tensor(statistic, c.T, c.N, c.layout);
    result.probs = Tensor(statistic, c.T, c.S * c.N, c.layout);
  }
  return result;
}

template <class Run>
void with_forward_args(const AttendCase& c, const AttendInputs& in, AttendForward& out, Run run) {
  const std::vector<ConstMatrix> sources = const_views(in.sources);
  const std::vector<Matrix> outs = views(out.out);
  AttendArgs args;
  args.sources = sources;
  args.queries = in.queries.view();
  args.scale = c.scale;
  args.eps = c.eps;
  args.out = outs;
  args.lse = out.lse.view();
  args.logits = out.logits.view();
  args.inv_rms = out.inv_rms.view();
  args.probs = out.probs.view();
  run(args);
}

AttendForward run_forward(const AttendCase& c, const AttendInputs& in,
                          const Executor* executor = nullptr) {
  AttendForward out = forward_outputs(c, false);
  with_forward_args(c, in, out, [&](const AttendArgs& args) {
    Workspace workspace(attend_workspace_bytes(args));
    const Status status = attend(args, workspace.context(executor));
    EXPECT_TRUE(status.ok()) << status.message();
  });
  return out;
}

AttendForward reference_forward(const AttendCase& c, const AttendInputs& in) {
  AttendForward out = forward_outputs(c, true);
  with_forward_args(c, in, out,
                    [&](const AttendArgs& args) { EXPECT_TRUE(reference::attend(args, {}).ok()); });
  return out;
}

template <class Run>
void with_backward_args(const AttendCase& c, const AttendInputs& in, const AttendForward& saved,
                        AttendBackward& out, Run run) {
  const std::vector<ConstMatrix> sources = const_views(in.sources);
  const std::vector<ConstMatrix> dout = const_views(in.dout);
  const std::vector<Matrix> dsources = views(out.dsources);
  AttendBackwardArgs args;
  args.sources = sources;
  args.queries = in.queries.view();
  args.scale = c.scale;
  args.lse = saved.lse.view();
  args.logits = saved.logits.view();
  args.inv_rms = saved.inv_rms.view();
  if (c.with_dout) {
    args.dout = dout;
  }
  if (c.with_gate && c.with_dout) {
    args.gate = in.gate.view();
  }
  if (c.with_dlse) {
    args.dlse = in.dlse.view();
  }
  if (c.with_dsources) {
    args.dsources = dsources;
  }
  if (c.with_dqueries) {
    args.dqueries = out.dqueries.view();
  }
  args.accumulate_dsources = c.accumulate;
  args.accumulate_dqueries = c.accumulate;
  run(args);
}

AttendBackward backward_outputs(const AttendCase& c, const AttendInputs& in, bool wide) {
  AttendBackward out;
  const auto like = [&](const Tensor& before, DType dtype) {
    Tensor tensor(wide ? DType::kFloat64 : dtype, before.rows(), before.cols(), c.layout);
    for (int64_t r = 0; c.accumulate && r < before.rows(); ++r) {
      for (int64_t d = 0; d < before.cols(); ++d) {
        tensor.set(r, d, before.at(r, d));
      }
    }
    return tensor;
  };
  for (const Tensor& before : in.dsources_before) {
    out.dsources.push_back(like(before, c.dsources));
  }
  out.dqueries = like(in.dqueries_before, DType::kFloat32);
  return out;
}

AttendBackward run_backward(const AttendCase& c, const AttendInputs& in, const AttendForward& saved,
                            const Executor* executor = nullptr) {
  AttendBackward out = backward_outputs(c, in, false);
  with_backward_args(c, in, saved, out, [&](const AttendBackwardArgs& args) {
    Workspace workspace(attend_backward_workspace_bytes(args));
    const Status status = attend_backward(args, workspace.context(executor));
    EXPECT_TRUE(status.ok()) << status.message();
  });
  return out;
}

AttendBackward reference_backward(const AttendCase& c, const AttendInputs& in,
                                  const AttendForward& saved) {
  AttendBackward out = backward_outputs(c, in, true);
  with_backward_args(c, in, saved, out, [&](const AttendBackwardArgs& args) {
    Workspace workspace(reference::attend_backward_workspace_bytes(args));
    EXPECT_TRUE(reference::attend_backward(args, workspace.context()).ok());
  });
  return out;
}

void check(const AttendCase& c, Rng& rng) {
  SCOPED_TRACE(describe(c));
  const AttendInputs in = make_inputs(c, rng);
  const AttendForward got = run_forward(c, in);
  const AttendForward want = reference_forward(c, in);
  for (int64_t s = 0; s < c.S; ++s) {
    expect_close(got.out[s], want.out[s], "out[" + std::to_string(s) + "]");
  }
  expect_close(got.lse, want.lse, "lse");
  if (!c.with_options) {
    return;
  }
  expect_close(got.logits, want.logits, "logits");
  expect_close(got.inv_rms, want.inv_rms, "inv_rms");
  expect_close(got.probs, want.probs, "probs");

  // The backward from the kernel's own statistics, so that rounding of the forward hides nothing.
  const AttendBackward grad = run_backward(c, in, got);
  const AttendBackward expected = reference_backward(c, in, got);
  for (int64_t n = 0; c.with_dsources && n < c.N; ++n) {
    expect_close(grad.dsources[n], expected.dsources[n], "dsources[" + std::to_string(n) + "]");
  }
  if (c.with_dqueries) {
    expect_close(grad.dqueries, expected.dqueries, "dqueries");
  }
}

class CpuAttend : public CpuTest {};

TEST_P(CpuAttend, Shapes) {
  Rng rng(1);
  for (const int64_t D : widths()) {
    for (const int64_t N : {1, 2, 3, 8, 33}) {
      for (const int64_t S : {1, 2, 5, 8, 24}) {
        if (D == 2048 && N * S > 64) {
          continue;  // the reference is slow; the loops that these would reach are covered at 257
        }
        AttendCase c;
        c.T = D == 2048 ? 2 : 3;
        c.N = N;
        c.S = S;
        c.D = D;
        c.R = D;
        c.sources = pick_dtype(rng);
        c.out = c.dsources = c.sources;
        check(c, rng);
      }
    }
  }
}

TEST_P(CpuAttend, RandomCases) {
  Rng rng(2);
  for (int i = 0; i < random_cases(150); ++i) {
    AttendCase c;
    c.T = pick<int64_t>(rng, {1, 2, 7, 19, 70});
    c.N = 1 + static_cast<int64_t>(rng() % 12);
    c.S = 1 + static_cast<int64_t>(rng() % 10);
    c.D = 1 + static_cast<int64_t>(rng() % 150);
    c.R = rng() % 2 == 0 ? c.D : 1 + static_cast<int64_t>(rng() % c.D);
    c.sources = pick_dtype(rng);
    c.out = rng() % 2 == 0 ? c.sources : pick_dtype(rng);
    c.dsources = rng() % 2 == 0 ? c.sources : DType::kFloat32;
    c.layout = pick_layout(rng);
    c.repeated_sources = rng() % 8 == 0;
    c.with_dout = rng() % 5 != 0;
    c.with_gate = rng() % 2 == 0;
    c.with_dlse = rng() % 2 == 0;
    c.with_dsources = rng() % 5 != 0;
    c.with_dqueries = rng() % 5 != 0;
    c.accumulate = rng() % 2 == 0;
    c.with_options = rng() % 10 != 0;
    c.scale = pick(rng, {1.0, 0.25, -3.0});
    c.eps = pick(rng, {1e-6, 1e-3});
    check(c, rng);
  }
}

TEST_P(CpuAttend, ManySourcesAndQueries) {
  Rng rng(3);
  AttendCase c;
  c.T = 2;
  c.N = kMaxSources;
  c.S = kMaxQueries;
  c.D = 24;
  c.R = 17;
  c.sources = c.out = c.dsources = DType::kBFloat16;
  check(c, rng);
}

TEST_P(CpuAttend, RowsFurtherApartThan32BitsCount) {
  if (!can_map_far_rows()) {
    GTEST_SKIP() << kNoAddressSpace;
  }
  Rng rng(10);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool accumulate : {false, true}) {
      AttendCase c;
      c.S = 5;  // the rows of queries and of lse are queries
      c.D = 40;
      c.R = 33;
      c.sources = c.out = c.dsources = dtype;
      c.layout = kFarRows;
      c.accumulate = accumulate;
      check(c, rng);
    }
  }
}

TEST_P(CpuAttend, SameBitsOnAnyThreads) {
  Rng rng(4);
  for (const int64_t S : {1, 3}) {
    AttendCase c;
    c.T = 300;
    c.N = 4;
    c.S = S;
    c.D = c.R = 40;
    const AttendInputs in = make_inputs(c, rng);
    const AttendForward first = run_forward(c, in);
    const AttendBackward first_grad = run_backward(c, in, first);
    for (const Executor* executor : {&kReversed, &kThreaded}) {
      const AttendForward other = run_forward(c, in, executor);
      const AttendBackward grad = run_backward(c, in, first, executor);
      for (int64_t s = 0; s < c.S; ++s) {
        EXPECT_TRUE(other.out[s].same_bits(first.out[s]));
      }
      EXPECT_TRUE(other.lse.same_bits(first.lse));
      for (int64_t n = 0; n < c.N; ++n) {
        EXPECT_TRUE(grad.dsources[n].same_bits(first_grad.dsources[n]));
      }
      EXPECT_TRUE(grad.dqueries.same_bits(first_grad.dqueries));
    }
  }
}

TEST_P(CpuAttend, TokenDoesNotDependOnItsBatch) {
  Rng rng(5);
  for (const int64_t S : {1, 3}) {
    AttendCase c;
    c.N = 5;
    c.S = S;
    c.D = c.R = 2048;  // large enough for T = 700 to stream its results past the caches
    c.T = 700;
    c.sources = c.out = DType::kBFloat16;
    const AttendInputs in = make_inputs(c, rng);
    const AttendForward all = run_forward(c, in);
    AttendCase one = c;
    one.T = 1;
    for (const int64_t t : {0, 13, 699}) {
      AttendInputs alone = in;
      for (int64_t n = 0; n < c.N; ++n) {
        alone.sources[n] = Tensor(c.sources, 1, c.D, {0, 3, false});
        for (int64_t d = 0; d < c.D; ++d) {
          alone.sources[n].set(0, d, in.sources[n].at(t, d));
        }
      }
      const AttendForward single = run_forward(one, alone);
      for (int64_t s = 0; s < c.S; ++s) {
        for (int64_t d = 0; d < c.D; ++d) {
          ASSERT_EQ(single.out[s].at(0, d), all.out[s].at(t, d));
        }
        EXPECT_EQ(single.lse.at(s, 0), all.lse.at(s, t));
      }
    }
  }
}

// A block that is read in parts, in a pipeline say, gives what it gives as a whole.
TEST_P(CpuAttend, QueryDoesNotDependOnTheOthers) {
  Rng rng(11);
  for (int i = 0; i < random_cases(30); ++i) {
    AttendCase c;
    c.T = pick<int64_t>(rng, {1, 7, 70});
    c.N = 1 + static_cast<int64_t>(rng() % 9);
    c.S = 2 + static_cast<int64_t>(rng() % 8);
    c.D = 1 + static_cast<int64_t>(rng() % 1200);
    c.R = rng() % 2 == 0 ? c.D : 1 + static_cast<int64_t>(rng() % c.D);
    c.sources = c.out = c.dsources = pick_dtype(rng);
    c.with_dsources = false;  // they are sums over the queries
    const AttendInputs in = make_inputs(c, rng);
    const AttendForward all = run_forward(c, in);
    const AttendBackward all_grad = run_backward(c, in, all);
    AttendCase alone = c;
    alone.S = 1;
    const auto row = [](const Tensor& tensor, int64_t s) {
      Tensor one(tensor.view().dtype, 1, tensor.view().cols);
      for (int64_t i = 0; i < one.view().cols; ++i) {
        one.set(0, i, tensor.at(s, i));
      }
      return one;
    };
    for (int64_t s = 0; s < c.S; ++s) {
      AttendInputs own = in;
      own.queries = row(in.queries, s);
      own.dout = {in.dout[s]};
      own.gate = row(in.gate, s);
      own.dlse = row(in.dlse, s);
      own.dqueries_before = row(in.dqueries_before, s);
      const AttendForward got = run_forward(alone, own);
      const AttendBackward grad = run_backward(alone, own, got);
      EXPECT_TRUE(got.out[0].same_bits(all.out[s])) << describe(c);
      EXPECT_TRUE(got.lse.same_bits(row(all.lse, s))) << describe(c);
      EXPECT_TRUE(grad.dqueries.same_bits(row(all_grad.dqueries, s))) << describe(c);
    }
  }
}

TEST_P(CpuAttend, OneSourceIsCopiedAndGivesNoQueryGradient) {
  Rng rng(6);
  for (const int64_t S : {1, 3}) {
    AttendCase c;
    c.N = 1;
    c.S = S;
    c.D = c.R = 100;
    c.with_dlse = false;
    const AttendInputs in = make_inputs(c, rng);
    const AttendForward got = run_forward(c, in);
    const AttendBackward grad = run_backward(c, in, got);
    for (int64_t s = 0; s < c.S; ++s) {
      EXPECT_TRUE(got.out[s].same_bits(in.sources[0]));
      for (int64_t t = 0; t < c.T; ++t) {
        EXPECT_EQ(got.probs.at(t, s), 1.0);
        EXPECT_EQ(got.lse.at(s, t), got.logits.at(t, s));
      }
      for (int64_t r = 0; r < c.R; ++r) {
        EXPECT_EQ(grad.dqueries.at(s, r), 0.0);
      }
    }
  }
}

TEST_P(CpuAttend, NoTokens) {
  Rng rng(7);
  AttendCase c;
  c.T = 0;
  const AttendInputs in = make_inputs(c, rng);
  const AttendForward got = run_forward(c, in);
  for (const bool accumulate : {false, true}) {
    c.accumulate = accumulate;
    const AttendBackward grad = run_backward(c, in, got);
    for (int64_t r = 0; r < c.R; ++r) {
      EXPECT_EQ(grad.dqueries.at(1, r), accumulate ? in.dqueries_before.at(1, r) : 0.0);
    }
  }
}

TEST_P(CpuAttend, NanAndInfStayInTheirToken) {
  Rng rng(8);
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (int i = 0; i < 6; ++i) {
      const DType dtype = std::array{DType::kFloat32, DType::kBFloat16, DType::kFloat16}[i % 3];
      AttendCase c;
      c.S = 1 + i / 3;
      c.T = 4;
      c.D = c.R = 37;
      c.sources = c.out = c.dsources = dtype;
      AttendInputs in = make_inputs(c, rng);
      in.sources[1].set(2, 35, bad);
      const AttendForward got = run_forward(c, in);
      const AttendForward want = reference_forward(c, in);
      const AttendBackward grad = run_backward(c, in, got);
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t d = 0; d < c.D; ++d) {
          EXPECT_EQ(std::isfinite(got.out[0].at(t, d)), t != 2);
          EXPECT_EQ(std::isnan(got.out[0].at(t, d)), std::isnan(want.out[0].at(t, d)));
          EXPECT_EQ(std::isfinite(grad.dsources[1].at(t, d)), t != 2);
        }
        EXPECT_EQ(std::isfinite(got.lse.at(0, t)), std::isfinite(want.lse.at(0, t)));
      }
      EXPECT_TRUE(std::isnan(grad.dqueries.at(0, 0)));
    }
  }
}

// Logits so far apart that all but one probability underflow must not turn into NaN.
TEST_P(CpuAttend, ExtremeLogits) {
  Rng rng(9);
  AttendCase c;
  c.N = 8;
  c.S = 4;
  c.scale = 4000.0;
  const AttendInputs in = make_inputs(c, rng);
  const AttendForward got = run_forward(c, in);
  const AttendForward want = reference_forward(c, in);
  expect_close(got.lse, want.lse, "lse");
  expect_close(got.logits, want.logits, "logits");
  // A logit of 4000 carries a float32 error of 2e-4, and so does the probability.
  expect_close(got.probs, want.probs, "probs", 1e-3);
  expect_close(got.out[0], want.out[0], "out", 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuAttend, testing::ValuesIn(available_isas()), isa_name);

}  // namespace
}  // namespace flash_attn_res
