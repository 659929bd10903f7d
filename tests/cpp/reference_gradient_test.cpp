// The reference against central finite differences, in double precision: every gradient of attend
// and of every case of read, for every knob. This is what makes the reference an oracle.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res {
namespace {

/// A dense float64 matrix that owns its memory.
struct Buffer {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  Buffer() = default;
  Buffer(int64_t rows, int64_t cols, double value = NAN)
      : rows(rows), cols(cols), values(static_cast<size_t>(rows * cols), value) {}

  Matrix view() { return {values.data(), rows, cols, cols, DType::kFloat64}; }
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  Buffer matrix(int64_t rows, int64_t cols) {
    Buffer buffer(rows, cols);
    for (double& value : buffer.values) {
      value = normal_(engine_);
    }
    return buffer;
  }

  std::vector<Buffer> matrices(int64_t count, int64_t rows, int64_t cols) {
    std::vector<Buffer> buffers;
    for (int64_t i = 0; i < count; ++i) {
      buffers.push_back(matrix(rows, cols));
    }
    return buffers;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

template <class View>
std::vector<View> views(std::vector<Buffer>& buffers) {
  std::vector<View> result;
  for (Buffer& buffer : buffers) {
    result.push_back(buffer.view());
  }
  return result;
}

std::vector<Buffer> poisoned(int64_t count, int64_t rows, int64_t cols) {
  return std::vector<Buffer>(static_cast<size_t>(count), Buffer(rows, cols));
}

double dot(const Buffer& a, const Buffer& b) {
  double sum = 0;
  for (size_t i = 0; i < a.values.size(); ++i) {
    sum += a.values[i] * b.values[i];
  }
  return sum;
}

/// Holds every entry of `gradient` against (loss(x + h) - loss(x - h)) / 2h.
void expect_gradient(const std::string& name, Buffer& input, const Buffer& gradient,
                     const std::function<double()>& loss) {
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < input.values.size(); ++i) {
    const double held = input.values[i];
    input.values[i] = held + kStep;
    const double above = loss();
    input.values[i] = held - kStep;
    const double below = loss();
    input.values[i] = held;
    const double numeric = (above - below) / (2 * kStep);
    const double error = std::abs(gradient.values[i] - numeric);
    EXPECT_TRUE(error <= 2e-8 * (1 + std::abs(numeric)))
        << name << "[" << i << "]: gradient " << gradient.values[i] << ", finite difference "
        << numeric;
  }
}

Context with_workspace(std::vector<double>& memory, int64_t bytes) {
  memory.assign(static_cast<size_t>(bytes) / sizeof(double) + 16, NAN);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  Context context;
  context.workspace = reinterpret_cast<void*>((address + 63) / 64 * 64);
  context.workspace_bytes = bytes;
  return context;
}

struct AttendCase {
  int64_t num_queries, tokens, num_sources, dim, key_dim;
  double scale, eps;
  bool gated, with_dlse, with_dout;
};

class AttendGradient : public testing::TestWithParam<AttendCase> {};

TEST_P(AttendGradient, MatchesFiniteDifferences) {
  const AttendCase c = GetParam();
  Random random(7);
  std::vector<Buffer> sources = random.matrices(c.num_sources, c.tokens, c.dim);
  Buffer queries = random.matrix(c.num_queries, c.key_dim);
  std::vector<Buffer> dout = random.matrices(c.num_queries, c.tokens, c.dim);
  Buffer dlse = random.matrix(c.num_queries, c.tokens);
  Buffer gate = random.matrix(c.num_queries, c.tokens);

  std::vector<Buffer> out = poisoned(c.num_queries, c.tokens, c.dim);
  Buffer lse(c.num_queries, c.tokens);
  Buffer logits(c.tokens, c.num_queries * c.num_sources);
  Buffer inv_rms(c.tokens, c.num_sources);

  const auto forward = [&] {
    const auto source_views = views<ConstMatrix>(sources);
    const auto out_views = views<Matrix>(out);
    AttendArgs args;
    args.sources = source_views;
    args.queries = queries.view();
    args.scale = c.scale;
    args.eps = c.eps;
    args.out = out_views;
    args.lse = lse.view();
    args.logits = logits.view();
    args.inv_rms = inv_rms.view();
    const Status status = attend(args);
    ASSERT_TRUE(status.ok()) << status.message();
  };
  const auto loss = [&] {
    forward();
    double sum = c.with_dlse ? dot(lse, dlse) : 0;
    for (int64_t s = 0; s < c.num_queries && c.with_dout; ++s) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        const double factor = c.gated ? gate.values[s * c.tokens + t] : 1;
        for (int64_t d = 0; d < c.dim; ++d) {
          sum += factor * dout[s].values[t * c.dim + d] * out[s].values[t * c.dim + d];
        }
      }
    }
    return sum;
  };

  forward();
  std::vector<Buffer> dsources = poisoned(c.num_sources, c.tokens, c.dim);
  Buffer dqueries(c.num_queries, c.key_dim);
  const auto source_views = views<ConstMatrix>(sources);
  const auto dout_views = views<ConstMatrix>(dout);
  const auto dsource_views = views<Matrix>(dsources);
  AttendBackwardArgs args;
  args.sources = source_views;
  args.queries = queries.view();
  args.scale = c.scale;
  args.lse = lse.view();
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  if (c.with_dout) {
    args.dout = dout_views;
  }
  if (c.gated) {
    args.gate = gate.view();
  }
  if (c.with_dlse) {
    args.dlse = dlse.view();
  }
  args.dsources = dsource_views;
  args.dqueries = dqueries.view();
  std::vector<double> memory;
  const Status status =
      attend_backward(args, with_workspace(memory, attend_backward_workspace_bytes(args)));
  ASSERT_TRUE(status.ok()) << status.message();

  expect_gradient("queries", queries, dqueries, loss);
  for (int64_t n = 0; n < c.num_sources; ++n) {
    expect_gradient("sources[" + std::to_string(n) + "]", sources[n], dsources[n], loss);
  }

  // Accumulating adds to what the buffers hold. The differences above left perturbed statistics.
  forward();
  const double first = dqueries.values[0];
  const double source = dsources[0].values[0];
  args.accumulate_dqueries = args.accumulate_dsources = true;
  ASSERT_TRUE(
      attend_backward(args, with_workspace(memory, attend_backward_workspace_bytes(args))).ok());
  EXPECT_NEAR(dqueries.values[0], 2 * first, 1e-12 * (1 + std::abs(first)));
  EXPECT_NEAR(dsources[0].values[0], 2 * source, 1e-12 * (1 + std::abs(source)));
}

INSTANTIATE_TEST_SUITE_P(Reference, AttendGradient,
                         testing::Values(AttendCase{1, 2, 1, 5, 5, 1.0, 1e-6, false, true, true},
                                         AttendCase{1, 3, 4, 7, 7, 1.0, 1e-6, false, false, true},
                                         AttendCase{3, 2, 3, 6, 6, 0.7, 1e-2, false, true, true},
                                         AttendCase{2, 2, 3, 8, 3, -1.3, 1e-3, false, true, true},
                                         AttendCase{2, 3, 2, 4, 4, 1.0, 1e-6, true, true, true},
                                         AttendCase{2, 2, 3, 1, 1, 2.0, 0.5, false, true, true},
                                         AttendCase{2, 2, 3, 5, 5, 1.0, 1e-6, false, true, false}));

struct ReadCase {
  const char* name;
  bool phase1;
  int64_t num_sources;
  bool partial;
  int64_t num_updates;
  OutputNorm norm;
  bool norm_weight;
  int64_t dim, key_dim;
  bool with_dx, with_dmix;
};

class ReadGradient : public testing::TestWithParam<ReadCase> {};

TEST_P(ReadGradient, MatchesFiniteDifferences) {
  const ReadCase c = GetParam();
  constexpr int64_t T = 3;
  Random random(11);
  Buffer phase1_out = random.matrix(T, c.dim);
  Buffer phase1_lse = random.matrix(1, T);
  std::vector<Buffer> sources = random.matrices(c.num_sources, T, c.dim);
  Buffer partial = random.matrix(T, c.dim);
  std::vector<Buffer> updates = random.matrices(c.num_updates, T, c.dim);
  Buffer query = random.matrix(1, c.key_dim);
  Buffer norm_weight = random.matrix(1, c.dim);
  Buffer dx = random.matrix(T, c.dim);
  Buffer dmix = random.matrix(T, c.dim);
  Buffer dpartial_out = random.matrix(T, c.dim);
  const bool has_partial = c.partial || c.num_updates > 0;
  const int64_t K = (c.phase1 ? 1 : 0) + c.num_sources + (has_partial ? 1 : 0);

  Buffer x(T, c.dim);
  Buffer partial_out(T, c.dim);
  Buffer mix(T, c.dim);
  Buffer logits(T, K);
  Buffer inv_rms(T, K);
  Buffer mix_inv_rms(1, T);

  const auto forward = [&] {
    const auto source_views = views<ConstMatrix>(sources);
    const auto update_views = views<ConstMatrix>(updates);
    ReadArgs args;
    if (c.phase1) {
      args.phase1_out = phase1_out.view();
      args.phase1_lse = phase1_lse.view();
    }
    args.sources = source_views;
    if (c.partial) {
      args.partial = partial.view();
    }
    args.updates = update_views;
    args.query = query.view();
    args.scale = 1.2;
    args.eps = 1e-3;
    args.norm = c.norm;
    args.norm_eps = 2e-2;
    if (c.norm_weight) {
      args.norm_weight = norm_weight.view();
    }
    args.x = x.view();
    if (has_partial) {
      args.partial_out = partial_out.view();
    }
    args.mix = mix.view();
    args.logits = logits.view();
    args.inv_rms = inv_rms.view();
    if (c.norm == OutputNorm::kRms) {
      args.mix_inv_rms = mix_inv_rms.view();
    }
    ASSERT_EQ(read_terms(args), K);
    const Status status = read(args);
    ASSERT_TRUE(status.ok()) << status.message();
  };
  const auto loss = [&] {
    forward();
    return (c.with_dx ? dot(x, dx) : 0) + (c.with_dmix ? dot(mix, dmix) : 0) +
           (has_partial ? dot(partial_out, dpartial_out) : 0);
  };

  forward();
  const auto source_views = views<ConstMatrix>(sources);
  Buffer dphase1_out(T, c.dim);
  Buffer dphase1_lse(1, T);
  Buffer dh(T, c.dim);
  Buffer gate(1, T);
  std::vector<Buffer> dsources = poisoned(c.num_sources, T, c.dim);
  Buffer dpartial(T, c.dim);
  Buffer dquery(1, c.key_dim);
  Buffer dnorm_weight(1, c.dim);
  const auto dsource_views = views<Matrix>(dsources);
  ReadBackwardArgs args;
  if (c.phase1) {
    args.phase1_out = phase1_out.view();
    args.dphase1_out = dphase1_out.view();
    args.dphase1_lse = dphase1_lse.view();
    args.gate = gate.view();
  }
  args.sources = source_views;
  if (has_partial) {
    args.partial = partial_out.view();
    args.dpartial_out = dpartial_out.view();
    args.dpartial = dpartial.view();
  }
  args.query = query.view();
  args.scale = 1.2;
  args.norm = c.norm;
  if (c.norm_weight) {
    args.norm_weight = norm_weight.view();
    args.dnorm_weight = dnorm_weight.view();
  }
  args.logits = logits.view();
  args.inv_rms = inv_rms.view();
  if (c.norm == OutputNorm::kRms) {
    args.mix_inv_rms = mix_inv_rms.view();
  }
  if (c.with_dx) {
    args.dx = dx.view();
  }
  if (c.with_dmix) {
    args.dmix = dmix.view();
  }
  args.dh = dh.view();
  args.dsources = dsource_views;
  args.dquery = dquery.view();
  std::vector<double> memory;
  const Status status =
      read_backward(args, with_workspace(memory, read_backward_workspace_bytes(args)));
  ASSERT_TRUE(status.ok()) << status.message();

  if (c.phase1) {
    // dh may be the memory of phase1_out.
    const std::vector<Buffer> dsources_before = dsources;
    const std::vector<double> dpartial_before = dpartial.values;
    Buffer over = phase1_out;
    ReadBackwardArgs in_place = args;
    in_place.phase1_out = over.view();
    in_place.dh = over.view();
    ASSERT_TRUE(
        read_backward(in_place, with_workspace(memory, read_backward_workspace_bytes(in_place)))
            .ok());
    EXPECT_EQ(over.values, dh.values);
    if (has_partial) {
      EXPECT_EQ(dpartial.values, dpartial_before);
    }
    for (int64_t n = 0; n < c.num_sources; ++n) {
      EXPECT_EQ(dsources[n].values, dsources_before[n].values);
    }
  }

  expect_gradient("query", query, dquery, loss);
  for (int64_t n = 0; n < c.num_sources; ++n) {
    expect_gradient("sources[" + std::to_string(n) + "]", sources[n], dsources[n], loss);
  }
  if (c.phase1) {
    expect_gradient("phase1_out", phase1_out, dphase1_out, loss);
    expect_gradient("phase1_lse", phase1_lse, dphase1_lse, loss);
    // gate and dh are dphase1_out in factored form.
    for (int64_t i = 0; i < T * c.dim; ++i) {
      EXPECT_NEAR(dphase1_out.values[i], gate.values[i / c.dim] * dh.values[i], 1e-12);
    }
  }
  if (c.partial) {
    expect_gradient("partial", partial, dpartial, loss);
  }
  for (int64_t i = 0; i < c.num_updates; ++i) {
    expect_gradient("updates[" + std::to_string(i) + "]", updates[i], dpartial, loss);
  }
  if (c.norm_weight) {
    expect_gradient("norm_weight", norm_weight, dnorm_weight, loss);
  }
}

constexpr OutputNorm kNone = OutputNorm::kNone;
constexpr OutputNorm kRms = OutputNorm::kRms;

INSTANTIATE_TEST_SUITE_P(
    Reference, ReadGradient,
    testing::Values(ReadCase{"one_shot", false, 4, false, 0, kNone, false, 6, 6, true, false},
                    ReadCase{"one_shot_sliced", false, 3, false, 0, kNone, false, 6, 2, true, true},
                    ReadCase{"one_shot_norm", false, 4, false, 0, kRms, true, 5, 5, true, false},
                    ReadCase{"one_source", false, 1, false, 0, kRms, true, 5, 5, true, true},
                    ReadCase{"merge", true, 0, true, 0, kNone, false, 6, 6, true, false},
                    ReadCase{"advance", true, 0, true, 1, kRms, true, 6, 6, true, false},
                    ReadCase{"advance_mix", true, 0, true, 2, kRms, true, 6, 6, true, true},
                    ReadCase{"advance_first", true, 0, false, 1, kRms, false, 6, 6, true, false},
                    ReadCase{"phase1_only", true, 0, false, 0, kRms, true, 6, 6, true, false},
                    ReadCase{"kimi_k3", false, 3, true, 1, kRms, true, 7, 7, true, true},
                    ReadCase{"everything", true, 2, true, 2, kRms, true, 7, 4, true, true},
                    ReadCase{"mix_alone", true, 2, true, 1, kRms, true, 4, 4, false, true},
                    ReadCase{"sum_alone", false, 2, true, 1, kNone, false, 4, 4, false, false}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace flash_attn_res
