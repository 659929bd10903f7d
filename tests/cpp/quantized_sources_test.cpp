// quantize, and attend and read over what it makes, on the CPU against the reference.
//
// A quantised source stands for values that float32 holds exactly. So the reference must give, bit
// for bit, what it gives for those values, and the kernels what they give for them in float32.

#include <cmath>
#include <limits>

#include "cpu_testing.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "reference/reference.h"

namespace flash_attn_res {
namespace {

int64_t groups_of(int64_t dim, bool by_group) {
  return by_group ? (dim + kScaleGroup - 1) / kScaleGroup : 1;
}

/// A [T, D] tensor in a storage mode.
struct Stored {
  Tensor values, scale;

  Stored(DType dtype, int64_t T, int64_t D, bool by_group, Layout layout = {})
      : values(dtype, T, D, layout),
        scale(DType::kFloat8E8M0, T, groups_of(D, by_group), {layout.row_gap, layout.shift}) {}

  double scale_at(int64_t t, int64_t d) const {
    return scale.at(t, scale.cols() == 1 ? 0 : d / kScaleGroup);
  }
  /// What it stands for.
  Tensor widened(DType dtype = DType::kFloat32) const {
    Tensor wide(dtype, values.rows(), values.cols());
    for (int64_t t = 0; t < values.rows(); ++t) {
      for (int64_t d = 0; d < values.cols(); ++d) {
        wide.set(t, d, values.at(t, d) * scale_at(t, d));
      }
    }
    return wide;
  }
};

void run(const QuantizeArgs& args, const Executor* executor = nullptr) {
  Context context;
  context.executor = executor;
  const Status status = quantize(args, context);
  ASSERT_TRUE(status.ok()) << status.message();
}

Stored store(const Tensor& values, DType dtype, bool by_group, Layout layout = {}) {
  Stored stored(dtype, values.rows(), values.cols(), by_group, layout);
  const std::vector<ConstMatrix> terms = {values.view()};
  run({terms, stored.values.view(), stored.scale.view()});
  return stored;
}

/// The rule of quantize.h, group by group.
void expect_quantized(const Tensor& values, const Stored& stored) {
  const bool half = stored.values.dtype() == DType::kFloat16;
  const int64_t width = stored.scale.cols() == 1 ? values.cols() : kScaleGroup;
  for (int64_t t = 0; t < values.rows(); ++t) {
    for (int64_t group = 0; group < stored.scale.cols(); ++group) {
      const int64_t end = std::min(values.cols(), (group + 1) * width);
      double amax = 0;
      for (int64_t d = group * width; d < end; ++d) {
        amax = std::max(amax, std::abs(values.at(t, d)));
      }
      const double scale = stored.scale.at(t, group);
      if (half) {
        ASSERT_TRUE(scale == 0x1p-126 || amax / scale >= 0x1p14) << amax << " / " << scale;
        ASSERT_LT(amax / scale, 0x1p15);
      } else {
        ASSERT_TRUE(scale == 0x1p-126 || amax / scale > 224) << amax << " / " << scale;
        ASSERT_LE(amax / scale, 448);
      }
      for (int64_t d = group * width; d < end; ++d) {
        ASSERT_EQ(stored.values.at(t, d), round_to(stored.values.dtype(), values.at(t, d) / scale))
            << "[" << t << ", " << d << "] of " << values.at(t, d) << " with scale " << scale;
      }
    }
  }
  EXPECT_TRUE(stored.values.untouched_outside());
  EXPECT_TRUE(stored.scale.untouched_outside());
}

class CpuQuantize : public CpuTest {};

TEST_P(CpuQuantize, FollowsItsRule) {
  Rng rng(1);
  for (const int64_t D : {1, 7, 128, 129, 300, 1024}) {
    for (const DType values_dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const DType dtype : {DType::kFloat16, DType::kFloat8E4M3}) {
        for (const bool by_group : {false, true}) {
          Tensor values(values_dtype, 9, D, pick_layout(rng));
          values.fill(rng);
          for (int64_t d = 0; d < D; ++d) {  // rows of very different magnitudes
            values.set(1, d, values.at(1, d) * 1e-4);
            values.set(2, d, values_dtype == DType::kFloat16 ? 0 : values.at(2, d) * 1e30);
            values.set(3, d, values_dtype == DType::kFloat16 ? 1 : values.at(3, d) * 1e-36);
            values.set(4, d, d % 3 == 0 ? 0 : values.at(4, d));
            values.set(5, d, d % 2 == 0 ? 448 : -448.25);
            values.set(6, d, std::ldexp(1, static_cast<int>(d % 8)));
          }
          expect_quantized(values, store(values, dtype, by_group, pick_layout(rng)));
        }
      }
    }
  }
}

TEST_P(CpuQuantize, AddsItsTermsInFloat32) {
  Rng rng(2);
  Tensor terms[] = {Tensor(DType::kBFloat16, 5, 200), Tensor(DType::kFloat32, 5, 200),
                    Tensor(DType::kFloat16, 5, 200)};
  Tensor sum(DType::kFloat32, 5, 200);
  std::vector<ConstMatrix> term_views;
  for (Tensor& term : terms) {
    term.fill(rng);
    term_views.push_back(term.view());
  }
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t d = 0; d < 200; ++d) {
      const auto at = [&](int k) { return static_cast<float>(terms[k].at(t, d)); };
      sum.set(t, d, at(0) + at(1) + at(2));
    }
  }
  Stored stored(DType::kFloat8E4M3, 5, 200, true);
  run({term_views, stored.values.view(), stored.scale.view()});
  expect_quantized(sum, stored);
}

TEST_P(CpuQuantize, WhatIsNotFiniteShows) {
  for (const DType dtype : {DType::kFloat16, DType::kFloat8E4M3}) {
    for (const double bad :
         {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
          std::numeric_limits<double>::quiet_NaN()}) {
      Tensor values(DType::kFloat32, 2, 300);
      values.fill_with(1);
      values.set(1, 200, bad);
      const Tensor wide = store(values, dtype, true).widened();
      for (int64_t d = 0; d < 300; ++d) {
        EXPECT_EQ(wide.at(0, d), 1);
        EXPECT_EQ(std::isnan(wide.at(1, d)), d >= 128 && d < 256) << d;
      }
    }
  }
}

TEST_P(CpuQuantize, ThreadsDoNotMatterAndEmptyIsFine) {
  Rng rng(3);
  Tensor values(DType::kBFloat16, 1000, 131);
  values.fill(rng);
  const Stored one = store(values, DType::kFloat8E4M3, true);
  Stored other(DType::kFloat8E4M3, 1000, 131, true);
  const std::vector<ConstMatrix> terms = {values.view()};
  run({terms, other.values.view(), other.scale.view()}, &kThreaded);
  EXPECT_TRUE(one.values.same_bits(other.values));
  EXPECT_TRUE(one.scale.same_bits(other.scale));
  store(Tensor(DType::kFloat32, 0, 5), DType::kFloat16, false);
}

TEST(Quantize, Float16IsEightTimesFinerThanBFloat16) {
  Rng rng(4);
  Tensor values(DType::kFloat32, 64, 256);
  values.fill(rng, 300);
  const Tensor half = store(values, DType::kFloat16, false).widened();
  double half_error = 0;
  double bfloat_error = 0;
  for (int64_t t = 0; t < 64; ++t) {
    for (int64_t d = 0; d < 256; ++d) {
      const double value = values.at(t, d);
      half_error += std::pow(half.at(t, d) - value, 2);
      bfloat_error += std::pow(round_to(DType::kBFloat16, value) - value, 2);
    }
  }
  EXPECT_NEAR(std::sqrt(bfloat_error / half_error), 8, 0.2);
}

// ------------------------------------------------------------------------------------- the users

struct Case {
  int64_t T = 5, N = 3, S = 2, D = 64, R = 64;
  DType storage = DType::kFloat16;
  bool by_group = false;
  DType other = DType::kFloat32;  // of every other value
  Layout layout;
  bool phase1 = false, partial = false, update = false, norm = false, accumulate = false;
};

std::string describe(const Case& c) {
  return "T=" + std::to_string(c.T) + " N=" + std::to_string(c.N) + " S=" + std::to_string(c.S) +
         " D=" + std::to_string(c.D) + " R=" + std::to_string(c.R) +
         " storage=" + std::to_string(static_cast<int>(c.storage)) +
         " by_group=" + std::to_string(c.by_group) +
         " other=" + std::to_string(static_cast<int>(c.other)) +
         " phase1=" + std::to_string(c.phase1) + " partial=" + std::to_string(c.partial) +
         " update=" + std::to_string(c.update) + " norm=" + std::to_string(c.norm) +
         " accumulate=" + std::to_string(c.accumulate);
}

Case pick_case(Rng& rng) {
  Case c;
  c.T = pick<int64_t>(rng, {1, 3, 9});
  c.N = 1 + static_cast<int64_t>(rng() % 9);
  c.S = 1 + static_cast<int64_t>(rng() % 5);
  c.D = pick<int64_t>(rng, {1, 7, 64, 128, 200, 384});
  c.R = rng() % 2 == 0 ? c.D : 1 + static_cast<int64_t>(rng() % c.D);
  c.storage = pick(rng, {DType::kFloat16, DType::kFloat8E4M3});
  c.by_group = rng() % 2 == 0;
  c.other = pick_dtype(rng);
  c.layout = pick_layout(rng);
  c.phase1 = rng() % 2 == 0;
  c.partial = rng() % 2 == 0;
  c.update = rng() % 2 == 0;
  c.norm = rng() % 2 == 0;
  c.accumulate = rng() % 2 == 0;
  return c;
}

/// Quantised sources, and the same values in another dtype.
struct Sources {
  std::vector<Stored> stored;
  Tensors wide;

  Sources(const Case& c, Rng& rng, DType wide_dtype) {
    for (int64_t n = 0; n < c.N; ++n) {
      Tensor values(DType::kFloat32, c.T, c.D);
      values.fill(rng, std::ldexp(1, static_cast<int>(n)));
      stored.push_back(store(values, c.storage, c.by_group, c.layout));
      wide.push_back(stored.back().widened(wide_dtype));
    }
  }
  std::vector<ConstMatrix> values() const {
    std::vector<ConstMatrix> list;
    for (const Stored& source : stored) {
      list.push_back(source.values.view());
    }
    return list;
  }
  std::vector<ConstMatrix> scales() const {
    std::vector<ConstMatrix> list;
    for (const Stored& source : stored) {
      list.push_back(source.scale.view());
    }
    return list;
  }
};

/// All results of one operation, forward and backward.
using Results = std::vector<std::pair<std::string, Tensor>>;

void expect_same(const Results& got, const Results& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i].second.same_bits(want[i].second)) << got[i].first;
    EXPECT_TRUE(got[i].second.untouched_outside()) << got[i].first;
  }
}

/// Runs `forward` and `backward` of one backend.
struct Backend {
  Status (*attend)(const AttendArgs&, const Context&);
  Status (*attend_backward)(const AttendBackwardArgs&, const Context&);
  Status (*read)(const ReadArgs&, const Context&);
  Status (*read_backward)(const ReadBackwardArgs&, const Context&);
  DType other, statistic;
};

constexpr int64_t kScratch = int64_t{1} << 22;

Results run_attend(const Case& c, const Backend& backend, const std::vector<ConstMatrix>& sources,
                   const std::vector<ConstMatrix>& scales, uint64_t seed) {
  Rng rng(seed);
  const DType value = backend.other == DType::kNone ? c.other : backend.other;
  Tensor queries(backend.statistic, c.S, c.R);
  queries.fill(rng);
  Tensors out, dout, dsources;
  for (int64_t s = 0; s < c.S; ++s) {
    out.emplace_back(value, c.T, c.D, c.layout);
    dout.emplace_back(value, c.T, c.D, c.layout).fill(rng);
  }
  for (int64_t n = 0; n < c.N; ++n) {
    dsources.emplace_back(value, c.T, c.D, c.layout).fill(rng);
  }
  Tensor lse(backend.statistic, c.S, c.T), logits(backend.statistic, c.T, c.S * c.N);
  Tensor inv_rms(backend.statistic, c.T, c.N), dqueries(backend.statistic, c.S, c.R);
  dqueries.fill(rng);
  Workspace workspace(kScratch);

  const std::vector<Matrix> out_views = views(out);
  AttendArgs args;
  args.sources = sources;
  args.source_scales = scales;
  args.queries = queries.view();
  args.out = out_views;
  args.lse = lse.view();
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  Status status = backend.attend(args, workspace.context());
  EXPECT_TRUE(status.ok()) << status.message();

  const std::vector<ConstMatrix> dout_views = const_views(dout);
  const std::vector<Matrix> dsource_views = views(dsources);
  AttendBackwardArgs grad;
  grad.sources = sources;
  grad.source_scales = scales;
  grad.queries = queries.view();
  grad.lse = lse.view();
  grad.logits = logits.view();
  grad.inv_rms = inv_rms.view();
  grad.dout = dout_views;
  grad.dsources = dsource_views;
  grad.accumulate_dsources = c.accumulate;
  grad.dqueries = dqueries.view();
  grad.accumulate_dqueries = c.accumulate;
  status = backend.attend_backward(grad, workspace.context());
  EXPECT_TRUE(status.ok()) << status.message();

  Results results = {
      {"lse", lse}, {"logits", logits}, {"inv_rms", inv_rms}, {"dqueries", dqueries}};
  for (Tensor& tensor : out) {
    results.emplace_back("out", tensor);
  }
  for (Tensor& tensor : dsources) {
    results.emplace_back("dsources", tensor);
  }
  return results;
}

Results run_read(const Case& c, const Backend& backend, const std::vector<ConstMatrix>& sources,
                 const std::vector<ConstMatrix>& scales, uint64_t seed) {
  Rng rng(seed);
  const DType value = backend.other == DType::kNone ? c.other : backend.other;
  const DType statistic = backend.statistic;
  const bool sum = c.partial || c.update;
  const int64_t K = c.N + (c.phase1 ? 1 : 0) + (sum ? 1 : 0);
  const auto random = [&](DType dtype, int64_t rows, int64_t cols) {
    Tensor tensor(dtype, rows, cols, c.layout);
    tensor.fill(rng);
    return tensor;
  };
  const Tensor query = random(statistic, 1, c.R), phase1_out = random(value, c.T, c.D);
  const Tensor phase1_lse = random(statistic, 1, c.T), partial = random(value, c.T, c.D);
  const Tensor update = random(value, c.T, c.D), norm_weight = random(value, 1, c.D);
  const Tensor dx = random(value, c.T, c.D), dsum = random(value, c.T, c.D);
  Tensor x(value, c.T, c.D, c.layout), total(value, c.T, c.D, c.layout);
  Tensor logits(statistic, c.T, K), inv_rms(statistic, c.T, K), mix_inv_rms(statistic, 1, c.T);
  Tensor dphase1(value, c.T, c.D), dpartial(value, c.T, c.D), dquery(statistic, 1, c.R);
  Tensor dweight(value, 1, c.D);
  Tensors dsources;
  for (int64_t n = 0; n < c.N; ++n) {
    dsources.push_back(random(value, c.T, c.D));
  }
  dquery.fill(rng);
  Workspace workspace(kScratch);

  const std::vector<ConstMatrix> updates = {update.view()};
  ReadArgs args;
  args.sources = sources;
  args.source_scales = scales;
  args.query = query.view();
  args.x = x.view();
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  ReadBackwardArgs grad;
  grad.sources = sources;
  grad.source_scales = scales;
  grad.query = query.view();
  grad.logits = logits.view();
  grad.inv_rms = inv_rms.view();
  grad.dx = dx.view();
  if (c.phase1) {
    args.phase1_out = grad.phase1_out = phase1_out.view();
    args.phase1_lse = phase1_lse.view();
    grad.dphase1_out = dphase1.view();
  }
  if (c.partial) {
    args.partial = grad.partial = partial.view();
  }
  if (c.update) {
    args.updates = updates;
    args.partial_out = total.view();
    grad.partial = total.view();
  }
  if (sum) {
    grad.dpartial = dpartial.view();
    grad.dpartial_out = dsum.view();
  }
  if (c.norm) {
    args.norm = grad.norm = OutputNorm::kRms;
    args.norm_weight = grad.norm_weight = norm_weight.view();
    args.mix_inv_rms = mix_inv_rms.view();
    grad.mix_inv_rms = mix_inv_rms.view();
    grad.dnorm_weight = dweight.view();
  }
  const std::vector<Matrix> dsource_views = views(dsources);
  grad.dsources = dsource_views;
  grad.accumulate_dsources = c.accumulate;
  grad.dquery = dquery.view();
  grad.accumulate_dquery = c.accumulate;
  Status status = backend.read(args, workspace.context());
  EXPECT_TRUE(status.ok()) << status.message();
  status = backend.read_backward(grad, workspace.context());
  EXPECT_TRUE(status.ok()) << status.message();

  Results results = {{"x", x},
                     {"partial_out", total},
                     {"logits", logits},
                     {"inv_rms", inv_rms},
                     {"mix_inv_rms", mix_inv_rms},
                     {"dphase1_out", dphase1},
                     {"dpartial", dpartial},
                     {"dquery", dquery},
                     {"dnorm_weight", dweight}};
  for (Tensor& tensor : dsources) {
    results.emplace_back("dsources", tensor);
  }
  return results;
}

constexpr Backend kReference = {reference::attend, reference::attend_backward,
                                reference::read,   reference::read_backward,
                                DType::kFloat64,   DType::kFloat64};
constexpr Backend kCpu = {attend,        attend_backward, read,
                          read_backward, DType::kNone,    DType::kFloat32};

TEST(QuantizedSources, ReferenceComputesWhatTheyStandFor) {
  Rng rng(11);
  for (int i = 0; i < random_cases(60); ++i) {
    const Case c = pick_case(rng);
    SCOPED_TRACE(describe(c));
    const Sources given(c, rng, DType::kFloat64);
    const uint64_t seed = rng();
    expect_same(run_attend(c, kReference, given.values(), given.scales(), seed),
                run_attend(c, kReference, const_views(given.wide), {}, seed));
    expect_same(run_read(c, kReference, given.values(), given.scales(), seed),
                run_read(c, kReference, const_views(given.wide), {}, seed));
  }
}

class CpuQuantizedSources : public CpuTest {};

TEST_P(CpuQuantizedSources, KernelsComputeWhatTheyStandFor) {
  Rng rng(12);
  for (int i = 0; i < random_cases(150); ++i) {
    Case c = pick_case(rng);
    SCOPED_TRACE(describe(c));
    const Sources given(c, rng, DType::kFloat32);
    const uint64_t seed = rng();
    expect_same(run_attend(c, kCpu, given.values(), given.scales(), seed),
                run_attend(c, kCpu, const_views(given.wide), {}, seed));
    expect_same(run_read(c, kCpu, given.values(), given.scales(), seed),
                run_read(c, kCpu, const_views(given.wide), {}, seed));
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuQuantize, testing::ValuesIn(available_isas()), isa_name);
INSTANTIATE_TEST_SUITE_P(Isa, CpuQuantizedSources, testing::ValuesIn(available_isas()), isa_name);

// ------------------------------------------------------------------------------------- bad input

TEST(QuantizedSources, BadInputIsNamed) {
  Tensor values(DType::kFloat8E4M3, 4, 300), plain(DType::kFloat32, 4, 300);
  Tensor scale(DType::kFloat8E8M0, 4, 3), short_scale(DType::kFloat8E8M0, 4, 2);
  Tensor float_scale(DType::kFloat32, 4, 3), queries(DType::kFloat32, 2, 300);
  Tensor lse(DType::kFloat32, 2, 4);
  Tensors out;
  out.emplace_back(DType::kBFloat16, 4, 300);
  out.emplace_back(DType::kBFloat16, 4, 300);
  const std::vector<Matrix> outs = views(out);
  const auto message = [&](const Tensor& source, const std::vector<ConstMatrix>& scales) {
    const std::vector<ConstMatrix> sources = {source.view()};
    AttendArgs args;
    args.sources = sources;
    args.source_scales = scales;
    args.queries = queries.view();
    args.out = outs;
    args.lse = lse.view();
    Workspace workspace(kScratch);
    return attend(args, workspace.context()).message();
  };
  EXPECT_EQ(message(values, {}),
            "attend: sources[0] is float8_e4m3 but source_scales is empty, expected 1 items of "
            "shape [4, 1] or [4, 3]");
  EXPECT_EQ(message(values, {short_scale.view()}),
            "attend: source_scales[0] has shape [4, 2], expected [4, 3] ([T, 1] or [T, ceil(D / "
            "128)])");
  EXPECT_EQ(message(values, {float_scale.view()}),
            "attend: source_scales[0] is float32, expected float8_e8m0");
  EXPECT_EQ(message(plain, {scale.view()}),
            "attend: sources[0] is float32 with scales, expected float16 or float8_e4m3");
  EXPECT_EQ(message(values, {scale.view(), scale.view()}),
            "attend: source_scales has 2 items, expected 1, one for each source, or none");
  const std::vector<ConstMatrix> terms = {plain.view()};
  const std::vector<ConstMatrix> stored = {values.view()};
  EXPECT_EQ(quantize({terms, plain.view(), scale.view()}).message(),
            "quantize: out is float32, expected float16 or float8_e4m3");
  EXPECT_EQ(quantize({terms, values.view(), float_scale.view()}).message(),
            "quantize: scale is float32, expected float8_e8m0");
  EXPECT_EQ(quantize({stored, values.view(), scale.view()}).message(),
            "quantize: terms[0] is float8_e4m3, expected float32, bfloat16 or float16");
}

}  // namespace
}  // namespace flash_attn_res
