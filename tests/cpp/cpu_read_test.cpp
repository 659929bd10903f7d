// read and read_backward on the CPU against the reference, for every instruction set.

#include "flash_attn_res/read.h"

#include <bit>

#include "common/float_types.h"
#include "cpu_testing.h"
#include "reference/reference.h"

namespace flash_attn_res {
namespace {

/// A call of read and of its backward, described.
struct ReadCase {
  int64_t T = 5, D = 64, R = 64, N = 3;
  bool with_phase1 = false, with_partial = false;
  int64_t num_updates = 0;
  bool with_partial_out = false;  // always there with updates
  bool partial_in_place = false;  // partial_out is the memory of partial, or of the first update
  bool with_query = true;
  OutputNorm norm = OutputNorm::kNone;
  bool with_norm_weight = true;
  MixRounding rounding = MixRounding::kFloat32;
  bool with_mix = true;
  DType phase1 = DType::kFloat32, sources = DType::kFloat32, partial = DType::kFloat32,
        update = DType::kFloat32, partial_out = DType::kFloat32, norm_weight = DType::kFloat32,
        x = DType::kFloat32, mix = DType::kFloat32, grad = DType::kFloat32;
  Layout layout;
  double scale = 1.0, eps = 1e-6, norm_eps = 1e-6;
  // Backward.
  bool with_dx = true, with_dmix = true, with_dpartial_out = true;
  bool accumulate = false, dpartial_in_place = false;
  bool dh_in_place = false;  // dh is the memory of phase1_out, where their dtypes allow it
  bool with_dsources = true, with_dpartial = true, with_dquery = true, with_dnorm_weight = true,
       with_dh = true;

  bool has_sum() const { return with_partial || num_updates > 0; }
  bool writes_sum() const { return num_updates > 0 || (with_partial_out && has_sum()); }
  int64_t K() const { return (with_phase1 ? 1 : 0) + N + (has_sum() ? 1 : 0); }
};

std::string describe(const ReadCase& c) {
  const auto text = [](const char* name, int64_t value) {
    return std::string(" ") + name + "=" + std::to_string(value);
  };
  return text("T", c.T) + text("D", c.D) + text("R", c.R) + text("N", c.N) +
         text("phase1", c.with_phase1) + text("partial", c.with_partial) +
         text("updates", c.num_updates) + text("norm", static_cast<int>(c.norm)) +
         text("rounding", static_cast<int>(c.rounding)) + text("x", static_cast<int>(c.x)) +
         text("grad", static_cast<int>(c.grad)) + text("query", c.with_query) +
         text("dx", c.with_dx) + text("dmix", c.with_dmix) + text("accumulate", c.accumulate);
}

struct ReadInputs {
  Tensor phase1_out, phase1_lse;
  Tensors sources;
  Tensor partial;
  Tensors updates;
  Tensor query, norm_weight;
  Tensor dx, dmix, dpartial_out;
  Tensors dsources_before;
  Tensor dquery_before, dnorm_weight_before;
};

struct ReadForward {
  Tensor x, partial_out, mix, logits, inv_rms, mix_inv_rms, probs;
};

struct ReadBackward {
  Tensor dphase1_out, dphase1_lse, dh, gate;
  Tensors dsources;
  Tensor dpartial, dquery, dnorm_weight;
};

ReadInputs make_inputs(const ReadCase& c, Rng& rng) {
  ReadInputs in;
  const auto tensor = [&](DType dtype, int64_t rows, int64_t cols, double sigma = 1.0) {
    Tensor result(dtype, rows, cols, c.layout);
    result.fill(rng, sigma);
    return result;
  };
  if (c.with_phase1) {
    in.phase1_out = tensor(c.phase1, c.T, c.D);
    in.phase1_lse = tensor(DType::kFloat32, 1, c.T);
  }
  for (int64_t n = 0; n < c.N; ++n) {
    in.sources.push_back(tensor(c.sources, c.T, c.D));
    in.dsources_before.push_back(tensor(c.grad, c.T, c.D));
  }
  if (c.with_partial) {
    in.partial = tensor(c.partial, c.T, c.D);
  }
  for (int64_t i = 0; i < c.num_updates; ++i) {
    in.updates.push_back(tensor(c.update, c.T, c.D));
  }
  if (c.with_query) {
    in.query = tensor(DType::kFloat32, 1, c.R, 1.0 / std::sqrt(static_cast<double>(c.R)));
  }
  if (c.norm == OutputNorm::kRms && c.with_norm_weight) {
    in.norm_weight = tensor(c.norm_weight, 1, c.D);
  }
  if (c.with_dx) {
    in.dx = tensor(c.x, c.T, c.D);
  }
  if (c.with_dmix) {
    in.dmix = tensor(c.mix, c.T, c.D);
  }
  if (c.with_dpartial_out && c.has_sum()) {
    in.dpartial_out = tensor(c.grad, c.T, c.D);
  }
  in.dquery_before = tensor(DType::kFloat32, 1, c.R);
  in.dnorm_weight_before = tensor(c.norm_weight, 1, c.D);
  return in;
}

ReadForward forward_outputs(const ReadCase& c, bool wide) {
  const auto tensor = [&](DType dtype, int64_t rows, int64_t cols) {
    return Tensor(wide ? DType::kFloat64 : dtype, rows, cols, c.layout);
  };
  ReadForward out;
  out.x = tensor(c.x, c.T, c.D);
  if (c.writes_sum() && !wide) {
    out.partial_out = tensor(c.partial_out, c.T, c.D);
  }
  if (c.with_mix) {
    out.mix = tensor(c.mix, c.T, c.D);
  }
  out.logits = tensor(DType::kFloat32, c.T, c.K());
  out.inv_rms = tensor(DType::kFloat32, c.T, c.K());
  out.probs = tensor(DType::kFloat32, c.T, c.K());
  if (c.norm == OutputNorm::kRms) {
    out.mix_inv_rms = tensor(DType::kFloat32, 1, c.T);
  }
  return out;
}

template <class Run>
void with_forward_args(const ReadCase& c, ReadInputs& in, ReadForward& out, Run run) {
  const std::vector<ConstMatrix> sources = const_views(in.sources);
  const std::vector<ConstMatrix> updates = const_views(in.updates);
  ReadArgs args;
  args.phase1_out = in.phase1_out.view();
  args.phase1_lse = in.phase1_lse.view();
  args.sources = sources;
  args.partial = in.partial.view();
  args.updates = updates;
  args.query = in.query.view();
  args.scale = c.scale;
  args.eps = c.eps;
  args.norm = c.norm;
  args.norm_weight = in.norm_weight.view();
  args.norm_eps = c.norm_eps;
  args.mix_rounding = c.rounding;
  args.x = out.x.view();
  args.partial_out = out.partial_out.view();
  args.mix = out.mix.view();
  args.logits = out.logits.view();
  args.inv_rms = out.inv_rms.view();
  args.mix_inv_rms = out.mix_inv_rms.view();
  args.probs = out.probs.view();
  run(args);
}

ReadForward run_forward(const ReadCase& c, const ReadInputs& given_inputs,
                        const Executor* executor = nullptr) {
  ReadInputs in = given_inputs;
  ReadForward out = forward_outputs(c, false);
  with_forward_args(c, in, out, [&](ReadArgs args) {
    Tensor* home = nullptr;
    if (c.writes_sum() && c.partial_in_place) {
      home = c.with_partial ? &in.partial : &in.updates[0];
      args.partial_out = home->view();
    }
    Workspace workspace(read_workspace_bytes(args));
    const Status status = read(args, workspace.context(executor));
    EXPECT_TRUE(status.ok()) << status.message();
    if (home != nullptr) {
      out.partial_out = *home;
    }
  });
  return out;
}

/// The reference on the same inputs. It is given the sum that the kernel stored: rounding that sum
/// is part of the operation, and a float32 sum of three may round to the neighbour.
ReadForward reference_forward(const ReadCase& c, const ReadInputs& given_inputs,
                              const ReadForward& got) {
  ReadInputs in = given_inputs;
  if (c.writes_sum()) {
    in.partial = got.partial_out;
    in.updates.clear();
  }
  ReadForward out = forward_outputs(c, true);
  with_forward_args(c, in, out, [&](ReadArgs args) {
    // The reference rounds h to the dtype of x, which here is double: a case of its own below.
    args.mix_rounding = MixRounding::kFloat32;
    EXPECT_TRUE(reference::read(args, {}).ok());
  });
  return out;
}

template <class Run>
void with_backward_args(const ReadCase& c, const ReadInputs& in, const ReadForward& saved,
                        ReadBackward& out, Run run) {
  const std::vector<ConstMatrix> sources = const_views(in.sources);
  const std::vector<Matrix> dsources = views(out.dsources);
  ReadBackwardArgs args;
  args.phase1_out = in.phase1_out.view();
  args.sources = sources;
  args.partial = c.writes_sum() ? saved.partial_out.view() : in.partial.view();
  args.query = in.query.view();
  args.scale = c.scale;
  args.norm = c.norm;
  args.norm_weight = in.norm_weight.view();
  args.mix_rounding = c.rounding;
  args.logits = saved.logits.view();
  args.inv_rms = saved.inv_rms.view();
  args.mix_inv_rms = saved.mix_inv_rms.view();
  args.dx = in.dx.view();
  args.dmix = in.dmix.view();
  args.dpartial_out = in.dpartial_out.view();
  args.dphase1_out = out.dphase1_out.view();
  args.dphase1_lse = out.dphase1_lse.view();
  args.dh = out.dh.view();
  args.gate = out.gate.view();
  args.dsources = dsources;
  args.accumulate_dsources = c.accumulate;
  args.dpartial = out.dpartial.view();
  args.dquery = out.dquery.view();
  args.accumulate_dquery = c.accumulate;
  args.dnorm_weight = out.dnorm_weight.view();
  args.accumulate_dnorm_weight = c.accumulate;
  run(args);
}

ReadBackward backward_outputs(const ReadCase& c, const ReadInputs& in, bool wide) {
  const auto tensor = [&](DType dtype, int64_t rows, int64_t cols) {
    return Tensor(wide ? DType::kFloat64 : dtype, rows, cols, c.layout);
  };
  const auto like = [&](const Tensor& before) {
    Tensor result = tensor(before.dtype(), before.rows(), before.cols());
    for (int64_t r = 0; c.accumulate && r < before.rows(); ++r) {
      for (int64_t d = 0; d < before.cols(); ++d) {
        result.set(r, d, before.at(r, d));
      }
    }
    return result;
  };
  ReadBackward out;
  if (c.with_phase1) {
    out.dphase1_out = tensor(c.grad, c.T, c.D);
    out.dphase1_lse = tensor(DType::kFloat32, 1, c.T);
    out.gate = tensor(DType::kFloat32, 1, c.T);
  }
  if (c.with_dh) {
    out.dh = tensor(c.grad, c.T, c.D);
  }
  for (int64_t n = 0; c.with_dsources && n < c.N; ++n) {
    out.dsources.push_back(like(in.dsources_before[n]));
  }
  if (c.with_dpartial && c.has_sum()) {
    out.dpartial = tensor(c.grad, c.T, c.D);
  }
  if (c.with_dquery && c.with_query) {
    out.dquery = like(in.dquery_before);
  }
  if (c.with_dnorm_weight && c.norm == OutputNorm::kRms) {
    out.dnorm_weight = like(in.dnorm_weight_before);
  }
  return out;
}

ReadBackward run_backward(const ReadCase& c, const ReadInputs& in, const ReadForward& saved,
                          const Executor* executor = nullptr) {
  ReadBackward out = backward_outputs(c, in, false);
  with_backward_args(c, in, saved, out, [&](ReadBackwardArgs args) {
    const bool in_place =
        c.dpartial_in_place && in.dpartial_out.present() && out.dpartial.present();
    if (in_place) {
      out.dpartial = in.dpartial_out;
      args.dpartial = out.dpartial.view();
      args.dpartial_out = args.dpartial;
    }
    if (c.dh_in_place && c.with_dh && c.with_phase1 && c.grad == c.phase1) {
      out.dh = in.phase1_out;
      args.dh = out.dh.view();
      args.phase1_out = args.dh;
    }
    Workspace workspace(read_backward_workspace_bytes(args));
    const Status status = read_backward(args, workspace.context(executor));
    EXPECT_TRUE(status.ok()) << status.message();
  });
  return out;
}

ReadBackward reference_backward(const ReadCase& c, const ReadInputs& in, const ReadForward& saved) {
  ReadBackward out = backward_outputs(c, in, true);
  with_backward_args(c, in, saved, out, [&](const ReadBackwardArgs& args) {
    Workspace workspace(reference::read_backward_workspace_bytes(args));
    EXPECT_TRUE(reference::read_backward(args, workspace.context()).ok());
  });
  return out;
}

void check(const ReadCase& c, Rng& rng) {
  SCOPED_TRACE(describe(c));
  const ReadInputs in = make_inputs(c, rng);
  const ReadForward got = run_forward(c, in);
  if (c.writes_sum()) {
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t d = 0; d < c.D; ++d) {
        double sum = c.with_partial ? in.partial.at(t, d) : 0;
        double magnitude = std::abs(sum);
        for (const Tensor& update : in.updates) {
          sum += update.at(t, d);
          magnitude += std::abs(update.at(t, d));
        }
        const double bound = roundoff(c.partial_out) * std::abs(sum) + 0x1p-22 * magnitude + 1e-7;
        ASSERT_TRUE(std::abs(got.partial_out.at(t, d) - sum) <= bound) << t << ", " << d;
      }
    }
    EXPECT_TRUE(got.partial_out.untouched_outside());
  }
  const ReadForward want = reference_forward(c, in, got);
  // Rounding h first costs x one more rounding in the storage dtype.
  double extra = c.rounding == MixRounding::kStorage ? 2 * roundoff(c.x) : 0;
  expect_close(got.x, want.x, "x", extra);
  if (c.with_mix) {
    expect_close(got.mix, want.mix, "mix");
  }
  expect_close(got.logits, want.logits, "logits");
  expect_close(got.inv_rms, want.inv_rms, "inv_rms");
  expect_close(got.probs, want.probs, "probs");
  if (c.norm == OutputNorm::kRms) {
    expect_close(got.mix_inv_rms, want.mix_inv_rms, "mix_inv_rms", extra);
  }

  if (c.norm == OutputNorm::kRms && c.D == 1) {
    extra += 1e-3;  // the norm of one number is its sign: dh is a difference of equals
  }
  const ReadBackward grad = run_backward(c, in, got);
  const ReadBackward expected = reference_backward(c, in, got);
  if (c.with_phase1) {
    expect_close(grad.dphase1_out, expected.dphase1_out, "dphase1_out", extra);
    expect_close(grad.dphase1_lse, expected.dphase1_lse, "dphase1_lse", extra);
    expect_close(grad.gate, expected.gate, "gate");
  }
  if (c.with_dh) {
    expect_close(grad.dh, expected.dh, "dh", extra);
  }
  for (size_t n = 0; n < grad.dsources.size(); ++n) {
    expect_close(grad.dsources[n], expected.dsources[n], "dsources[" + std::to_string(n) + "]",
                 extra);
  }
  if (grad.dpartial.present()) {
    expect_close(grad.dpartial, expected.dpartial, "dpartial", extra);
  }
  if (grad.dquery.present()) {
    expect_close(grad.dquery, expected.dquery, "dquery", extra);
  }
  if (grad.dnorm_weight.present()) {
    expect_close(grad.dnorm_weight, expected.dnorm_weight, "dnorm_weight", extra);
  }
}

void set_all_dtypes(ReadCase& c, DType dtype) {
  c.phase1 = c.sources = c.partial = c.update = c.partial_out = c.norm_weight = c.x = c.mix =
      c.grad = dtype;
}

class CpuRead : public CpuTest {};

// The cases of the table in read.h.
TEST_P(CpuRead, NamedCases) {
  Rng rng(1);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t D : widths()) {
      for (const OutputNorm norm : {OutputNorm::kNone, OutputNorm::kRms}) {
        if (D == 1 && norm == OutputNorm::kRms) {
          continue;  // x is then the sign of h, and its gradient what cancellation leaves
        }
        ReadCase c;
        set_all_dtypes(c, dtype);
        c.D = c.R = D;
        c.T = D == 2048 ? 2 : 5;
        c.norm = norm;
        for (const int64_t N : {1, 2, 3, 8, 33}) {  // one-shot
          ReadCase oneshot = c;
          oneshot.N = N;
          check(oneshot, rng);
        }
        ReadCase merge = c;
        merge.N = 0;
        merge.with_phase1 = merge.with_partial = true;
        check(merge, rng);
        ReadCase advance = merge;
        advance.num_updates = 1;
        check(advance, rng);
        ReadCase kimi = c;
        kimi.N = 8;
        kimi.with_partial = true;
        kimi.num_updates = 1;
        check(kimi, rng);
      }
    }
  }
}

TEST_P(CpuRead, RandomCases) {
  Rng rng(2);
  const auto coin = [&rng] { return rng() % 2 == 0; };
  for (int i = 0; i < random_cases(400); ++i) {
    ReadCase c;
    c.T = pick<int64_t>(rng, {1, 2, 7, 19, 70});
    c.D = 1 + static_cast<int64_t>(rng() % 120);
    c.R = coin() ? c.D : 1 + static_cast<int64_t>(rng() % c.D);
    c.N = static_cast<int64_t>(rng() % 7);
    c.with_phase1 = coin();
    c.with_partial = coin();
    c.num_updates = static_cast<int64_t>(rng() % 3);
    if (c.K() == 0) {
      c.N = 1;
    }
    c.with_partial_out = coin();
    c.with_query = c.K() > 1 || coin();
    if (!c.with_query) {
      c.R = c.D;
    }
    set_all_dtypes(c, pick_dtype(rng));
    if (rng() % 3 == 0) {
      c.phase1 = pick_dtype(rng);
      c.sources = pick_dtype(rng);
      c.partial = pick_dtype(rng);
      c.update = pick_dtype(rng);
      c.partial_out = pick_dtype(rng);
      c.x = pick_dtype(rng);
      c.mix = pick_dtype(rng);
      c.grad = pick_dtype(rng);
    }
    c.norm_weight = pick_dtype(rng);
    c.grad = coin() ? c.sources : DType::kFloat32;
    c.partial_in_place = coin() && (c.with_partial || c.num_updates > 0);
    if (c.partial_in_place) {
      c.partial_out = c.with_partial ? c.partial : c.update;
    }
    c.norm = coin() ? OutputNorm::kRms : OutputNorm::kNone;
    c.with_norm_weight = rng() % 4 != 0;
    c.rounding = coin() ? MixRounding::kStorage : MixRounding::kFloat32;
    c.with_mix = coin();
    c.layout = pick_layout(rng);
    c.scale = pick(rng, {1.0, 0.25, -3.0});
    c.eps = pick(rng, {1e-6, 1e-3});
    c.norm_eps = pick(rng, {1e-6, 1e-2});
    c.with_dx = rng() % 4 != 0;
    c.with_dmix = coin();
    c.with_dpartial_out = coin();
    c.accumulate = coin();
    c.dpartial_in_place = coin();
    c.with_dsources = rng() % 4 != 0;
    c.with_dpartial = rng() % 4 != 0;
    c.with_dquery = rng() % 4 != 0;
    c.with_dnorm_weight = rng() % 4 != 0;
    c.with_dh = coin();
    c.dh_in_place = coin();
    check(c, rng);
    if (HasFatalFailure()) {
      return;
    }
  }
}

// Rounding to storage before the norm, against its definition.
TEST_P(CpuRead, RowsFurtherApartThan32BitsCount) {
  if (!can_map_far_rows()) {
    GTEST_SKIP() << kNoAddressSpace;
  }
  Rng rng(9);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool accumulate : {false, true}) {
      ReadCase kimi;
      set_all_dtypes(kimi, dtype);
      kimi.D = 40;
      kimi.R = 33;
      kimi.with_partial = true;
      kimi.num_updates = 1;
      kimi.norm = OutputNorm::kRms;
      kimi.layout = kFarRows;
      kimi.accumulate = accumulate;
      check(kimi, rng);
      ReadCase advance = kimi;
      advance.N = 0;
      advance.with_phase1 = true;
      check(advance, rng);
    }
  }
}

TEST_P(CpuRead, MixIsRoundedBeforeTheNorm) {
  Rng rng(3);
  ReadCase c;
  set_all_dtypes(c, DType::kFloat32);
  c.x = DType::kBFloat16;
  c.N = 1;  // h is the source itself
  c.norm = OutputNorm::kRms;
  c.rounding = MixRounding::kStorage;
  c.with_norm_weight = false;
  const ReadInputs in = make_inputs(c, rng);
  const ReadForward got = run_forward(c, in);
  for (int64_t t = 0; t < c.T; ++t) {
    double sum = 0;
    for (int64_t d = 0; d < c.D; ++d) {
      const double h = round_to(DType::kBFloat16, in.sources[0].at(t, d));
      sum += h * h;
    }
    const double rh = 1 / std::sqrt(sum / static_cast<double>(c.D) + c.norm_eps);
    EXPECT_NEAR(got.mix_inv_rms.at(0, t), rh, 1e-6 * rh);
    for (int64_t d = 0; d < c.D; ++d) {
      EXPECT_EQ(got.mix.at(t, d), in.sources[0].at(t, d));  // mix is not rounded
    }
  }
}

TEST_P(CpuRead, SameBitsOnAnyThreads) {
  Rng rng(4);
  ReadCase c;
  c.T = 300;
  c.with_phase1 = c.with_partial = true;
  c.num_updates = 1;
  c.norm = OutputNorm::kRms;
  const ReadInputs in = make_inputs(c, rng);
  const ReadForward first = run_forward(c, in);
  const ReadBackward first_grad = run_backward(c, in, first);
  for (const Executor* executor : {&kReversed, &kThreaded}) {
    const ReadForward other = run_forward(c, in, executor);
    EXPECT_TRUE(other.x.same_bits(first.x));
    EXPECT_TRUE(other.partial_out.same_bits(first.partial_out));
    const ReadBackward grad = run_backward(c, in, first, executor);
    EXPECT_TRUE(grad.dquery.same_bits(first_grad.dquery));
    EXPECT_TRUE(grad.dnorm_weight.same_bits(first_grad.dnorm_weight));
    EXPECT_TRUE(grad.dpartial.same_bits(first_grad.dpartial));
    EXPECT_TRUE(grad.dsources[0].same_bits(first_grad.dsources[0]));
  }
}

TEST_P(CpuRead, TokenDoesNotDependOnItsBatch) {
  Rng rng(5);
  ReadCase c;
  set_all_dtypes(c, DType::kBFloat16);
  c.T = 2200;  // large enough to stream results past the caches
  c.D = c.R = 2048;
  c.N = 0;
  c.with_phase1 = c.with_partial = true;
  c.num_updates = 1;
  c.norm = OutputNorm::kRms;
  c.with_mix = false;
  ReadInputs in;
  const auto tensor = [&](int64_t rows, int64_t cols, DType dtype) {
    Tensor result(dtype, rows, cols);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < cols; ++d) {
        result.set(r, d, static_cast<double>((r * 131 + d * 17) % 251) / 97.0 - 1.25);
      }
    }
    return result;
  };
  in.phase1_out = tensor(c.T, c.D, c.phase1);
  in.phase1_lse = tensor(1, c.T, DType::kFloat32);
  in.partial = tensor(c.T, c.D, c.partial);
  in.updates.push_back(tensor(c.T, c.D, c.update));
  in.query = tensor(1, c.R, DType::kFloat32);
  in.norm_weight = tensor(1, c.D, c.norm_weight);
  const ReadForward all = run_forward(c, in);
  ReadCase one = c;
  one.T = 1;
  for (const int64_t t : {0, 777, 2199}) {
    const auto row = [&](const Tensor& from) {
      Tensor to(from.dtype(), 1, c.D, {0, 1, false});
      for (int64_t d = 0; d < c.D; ++d) {
        to.set(0, d, from.at(t, d));
      }
      return to;
    };
    ReadInputs alone = in;
    alone.phase1_out = row(in.phase1_out);
    alone.phase1_lse = Tensor(DType::kFloat32, 1, 1);
    alone.phase1_lse.set(0, 0, in.phase1_lse.at(0, t));
    alone.partial = row(in.partial);
    alone.updates[0] = row(in.updates[0]);
    const ReadForward single = run_forward(one, alone);
    for (int64_t d = 0; d < c.D; ++d) {
      ASSERT_EQ(single.x.at(0, d), all.x.at(t, d));
      ASSERT_EQ(single.partial_out.at(0, d), all.partial_out.at(t, d));
    }
  }
}

TEST_P(CpuRead, OneTermGivesNoQueryGradient) {
  Rng rng(6);
  ReadCase c;
  c.N = 1;
  const ReadInputs in = make_inputs(c, rng);
  const ReadForward got = run_forward(c, in);
  const ReadBackward grad = run_backward(c, in, got);
  EXPECT_TRUE(got.x.same_bits(in.sources[0]));
  for (int64_t r = 0; r < c.R; ++r) {
    EXPECT_EQ(grad.dquery.at(0, r), 0.0);
  }
}

TEST_P(CpuRead, NoTokens) {
  Rng rng(7);
  ReadCase c;
  c.T = 0;
  c.with_partial = true;
  c.norm = OutputNorm::kRms;
  const ReadInputs in = make_inputs(c, rng);
  const ReadForward got = run_forward(c, in);
  for (const bool accumulate : {false, true}) {
    c.accumulate = accumulate;
    const ReadBackward grad = run_backward(c, in, got);
    for (int64_t d = 0; d < c.D; ++d) {
      EXPECT_EQ(grad.dquery.at(0, d), accumulate ? in.dquery_before.at(0, d) : 0.0);
      EXPECT_EQ(grad.dnorm_weight.at(0, d), accumulate ? in.dnorm_weight_before.at(0, d) : 0.0);
    }
  }
}

TEST_P(CpuRead, NanAndInfStayInTheirToken) {
  Rng rng(8);
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const OutputNorm norm : {OutputNorm::kNone, OutputNorm::kRms}) {
        ReadCase c;
        set_all_dtypes(c, dtype);
        c.with_partial = true;
        c.num_updates = 1;
        c.D = c.R = 37;
        c.norm = norm;
        ReadInputs in = make_inputs(c, rng);
        in.updates[0].set(2, 36, bad);
        const ReadForward got = run_forward(c, in);
        const ReadForward want = reference_forward(c, in, got);
        const ReadBackward grad = run_backward(c, in, got);
        for (int64_t t = 0; t < c.T; ++t) {
          for (int64_t d = 0; d < c.D; ++d) {
            EXPECT_EQ(std::isfinite(got.x.at(t, d)), t != 2);
            EXPECT_EQ(std::isnan(got.x.at(t, d)), std::isnan(want.x.at(t, d)));
            EXPECT_EQ(std::isfinite(got.partial_out.at(t, d)), t != 2 || d != 36);
            EXPECT_EQ(std::isfinite(grad.dsources[0].at(t, d)), t != 2);
          }
        }
        EXPECT_TRUE(std::isnan(grad.dquery.at(0, 0)));
      }
    }
  }
}

/// Copies `values` through a read of one source, whose probability is exactly 1.
Tensor convert(const Tensor& values, DType to) {
  Tensor x(to, values.rows(), values.cols());
  const std::vector<ConstMatrix> sources = {values.view()};
  ReadArgs args;
  args.sources = sources;
  args.x = x.view();
  Workspace workspace(read_workspace_bytes(args));
  EXPECT_TRUE(read(args, workspace.context()).ok());
  return x;
}

// Every 16-bit value survives a copy, and widens to the float32 that the scalar code gives.
TEST_P(CpuRead, WideningIsExact) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Tensor values(dtype, 64, 1024);
    for (int i = 0; i < 65536; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(const_cast<unsigned char*>(values.row(i / 1024)) + i % 1024 * 2, &bits, 2);
    }
    const Tensor wide = convert(values, DType::kFloat32);
    const Tensor same = convert(values, dtype);
    for (int64_t r = 0; r < 64; ++r) {
      for (int64_t c = 0; c < 1024; ++c) {
        if (std::isnan(values.at(r, c))) {
          ASSERT_TRUE(std::isnan(wide.at(r, c)) && std::isnan(same.at(r, c)));
        } else {
          ASSERT_EQ(wide.at(r, c), values.at(r, c));
          ASSERT_EQ(same.at(r, c), values.at(r, c));
        }
      }
    }
  }
}

// Narrowing gives the bits of the scalar code: every exponent, ties, subnormals, Inf and NaN.
TEST_P(CpuRead, NarrowingRoundsToNearestEven) {
  Rng rng(9);
  Tensor values(DType::kFloat32, 512, 515);
  for (int64_t r = 0; r < values.rows(); ++r) {
    for (int64_t c = 0; c < values.cols(); ++c) {
      uint32_t bits = static_cast<uint32_t>(rng());
      switch (rng() % 4) {
        case 0:  // near the ties of bfloat16
          bits = (bits & 0xffff0000u) | (0x7fffu + static_cast<uint32_t>(rng() % 3));
          break;
        case 1:  // near the ties of float16, in its range
          bits =
              (bits & 0x80ffe000u) | static_cast<uint32_t>(0x33000000u + (rng() % 42) * 0x800000u);
          bits = (bits & ~0x1fffu) | (0xfffu + static_cast<uint32_t>(rng() % 3));
          break;
        case 2:  // Inf, NaN with any payload
          bits |= 0x7f800000u;
          bits &= rng() % 2 == 0 ? ~0u : 0xff800000u;
          break;
        default:
          break;
      }
      std::memcpy(const_cast<unsigned char*>(values.row(r)) + c * 4, &bits, 4);
    }
  }
  const auto bits_at = [](const Tensor& tensor, int64_t r, int64_t c) {
    uint16_t bits;
    std::memcpy(&bits, tensor.row(r) + c * 2, 2);
    return bits;
  };
  const Tensor bfloats = convert(values, DType::kBFloat16);
  const Tensor halves = convert(values, DType::kFloat16);
  for (int64_t r = 0; r < values.rows(); ++r) {
    for (int64_t c = 0; c < values.cols(); ++c) {
      const auto value = static_cast<float>(values.at(r, c));
      const auto source = std::bit_cast<uint32_t>(value);
      if (std::isnan(value)) {
        ASSERT_TRUE(std::isnan(bfloats.at(r, c)) && std::isnan(halves.at(r, c)));
        continue;
      }
      ASSERT_EQ(bits_at(bfloats, r, c), to_bfloat16(value).bits) << std::hex << source;
      ASSERT_EQ(bits_at(halves, r, c), to_float16(value).bits) << std::hex << source;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuRead, testing::ValuesIn(available_isas()), isa_name);

}  // namespace
}  // namespace flash_attn_res
