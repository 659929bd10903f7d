// stochastic_add on the CPU: known answers of the generator, the definition of the rounding spelt
// out once more, in double precision, and its expectation.

#include <bit>
#include <cmath>
#include <vector>

#include "common/philox.h"
#include "cpu_testing.h"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res {
namespace {

constexpr int64_t kSeed[2] = {0x123456789abcdef0, 7};

struct KnownAnswer {
  uint32_t counter[4], key[2], words[4];
};

TEST(Philox, KnownAnswers) {
  // kat_vectors of Random123, philox4x32 with 10 rounds.
  constexpr KnownAnswer kAnswers[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const KnownAnswer& a : kAnswers) {
    const PhiloxWords words =
        philox({{a.counter[0], a.counter[1], a.counter[2], a.counter[3]}}, a.key[0], a.key[1]);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(words.v[i], a.words[i]);
    }
  }
}

void run(const std::vector<ConstMatrix>& terms, Tensor& out, const int64_t* seed, int64_t site,
         const Executor* executor = nullptr) {
  StochasticAddArgs args;
  args.terms = terms;
  args.seed = seed;
  args.site = site;
  args.out = out.view();
  Context context;
  context.executor = executor;
  const Status status = stochastic_add(args, context);
  ASSERT_TRUE(status.ok()) << status.message();
}

/// The definition in doubles: the neighbour of `total` farther from zero where the random number
/// over 2^16 is at least what is left to it.
double expected(float total, uint32_t random) {
  const double magnitude = std::fabs(total);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const double ulp = std::ldexp(1.0, std::max(exponent, -125) - 8);  // of bfloat16
  const double low = std::floor(magnitude / ulp) * ulp;
  const double fraction = (magnitude - low) / ulp;
  const double rounded = fraction + random / 65536.0 >= 1.0 ? low + ulp : low;
  return std::copysign(rounded, total);
}

TEST(StochasticAdd, FollowsTheDefinition) {
  Rng rng(1);
  for (const int64_t dim : {1, 7, 8, 9, 64, 257}) {
    for (const int64_t tokens : {0, 1, 5, 131}) {
      for (int count = 1; count <= kMaxStochasticTerms; ++count) {
        const DType dtypes[] = {DType::kBFloat16, DType::kFloat32, DType::kFloat16,
                                DType::kFloat32};
        std::vector<Tensor> terms;
        std::vector<ConstMatrix> views;
        for (int k = 0; k < count; ++k) {
          terms.emplace_back(dtypes[k], tokens, dim, Layout{.row_gap = k, .shift = k});
          terms.back().fill(rng);
        }
        for (const Tensor& term : terms) {
          views.push_back(term.view());
        }
        Tensor out(DType::kBFloat16, tokens, dim, {.row_gap = 3});
        run(views, out, kSeed, 11);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t d = 0; d < dim; ++d) {
            float total = static_cast<float>(terms[0].at(t, d));
            for (int k = 1; k < count; ++k) {
              total += static_cast<float>(terms[static_cast<size_t>(k)].at(t, d));
            }
            const auto chunk = static_cast<uint64_t>(t * ((dim + 7) / 8) + d / 8);
            const PhiloxWords words =
                philox({{static_cast<uint32_t>(chunk), static_cast<uint32_t>(chunk >> 32), 11, 7}},
                       0x9abcdef0, 0x12345678);
            const uint32_t random = words.v[d % 8 / 2] >> (d % 2 == 0 ? 0 : 16) & 0xffff;
            ASSERT_EQ(out.at(t, d), expected(total, random)) << total << " " << random;
          }
        }
        EXPECT_TRUE(out.untouched_outside());
      }
    }
  }
}

TEST(StochasticAdd, IsUnbiased) {
  // 2^20 draws of one value: the mean lies within five standard errors of the value.
  constexpr int64_t kTokens = 1024;
  constexpr int64_t kDim = 1024;
  for (const float value : {1.001F, -3.3F, 0.1F, 1e-39F, 255.51F}) {
    Tensor term(DType::kFloat32, kTokens, kDim);
    term.fill_with(value);
    Tensor out(DType::kBFloat16, kTokens, kDim);
    run({term.view()}, out, kSeed, 0);
    const double low = expected(value, 0);
    const double high = expected(value, 0xffff);
    ASSERT_NE(low, high);
    double sum = 0;
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t d = 0; d < kDim; ++d) {
        const double got = out.at(t, d);
        ASSERT_TRUE(got == low || got == high) << got;
        sum += got - value;
      }
    }
    const double p = (value - low) / (high - low);
    constexpr double kCount = static_cast<double>(kTokens * kDim);
    const double error = std::fabs(high - low) * std::sqrt(p * (1 - p) / kCount);
    EXPECT_LT(std::fabs(sum / kCount), 5 * error) << value;
  }
}

TEST(StochasticAdd, ExactAndSpecialValues) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::bit_cast<float>(0x7f800001u);
  const std::vector<float> values = {0.0F, -0.0F, 1.0F, -2.5F, inf, -inf, nan, 0x1p-133F};
  Tensor term(DType::kFloat32, 64, static_cast<int64_t>(values.size()));
  for (int64_t t = 0; t < term.rows(); ++t) {
    for (int64_t d = 0; d < term.cols(); ++d) {
      static_cast<float*>(term.view().data)[t * term.view().stride + d] =
          values[static_cast<size_t>(d)];
    }
  }
  Tensor out(DType::kBFloat16, term.rows(), term.cols());
  run({term.view()}, out, kSeed, 0);
  for (int64_t t = 0; t < term.rows(); ++t) {
    for (int64_t d = 0; d < term.cols(); ++d) {
      const float value = values[static_cast<size_t>(d)];
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(out.at(t, d)));
      } else {
        EXPECT_EQ(out.at(t, d), value);
        EXPECT_EQ(std::signbit(out.at(t, d)), std::signbit(value));
      }
    }
  }
}

TEST(StochasticAdd, SeedStepAndSiteMatterThreadsAndPlaceDoNot) {
  Rng rng(2);
  Tensor term(DType::kFloat32, 300, 129);
  term.fill(rng);
  const auto result = [&](int64_t seed, int64_t step, int64_t site,
                          const Executor* executor = nullptr) {
    const int64_t numbers[] = {seed, step};
    Tensor out(DType::kBFloat16, term.rows(), term.cols());
    run({term.view()}, out, numbers, site, executor);
    std::vector<double> values;
    for (int64_t t = 0; t < out.rows(); ++t) {
      for (int64_t d = 0; d < out.cols(); ++d) {
        values.push_back(out.at(t, d));
      }
    }
    return values;
  };
  const std::vector<double> first = result(1, 2, 3);
  EXPECT_NE(result(2, 2, 3), first);
  EXPECT_NE(result(int64_t{1} << 32 | 1, 2, 3), first);
  EXPECT_NE(result(1, 3, 3), first);
  EXPECT_NE(result(1, 2, 4), first);
  const Executor backwards = {
      [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
        for (int64_t i = count - 1; i >= 0; --i) {
          task(context, i);
        }
      },
      nullptr};
  EXPECT_EQ(result(1, 2, 3, &backwards), first);

  // Over the memory of a term.
  const int64_t numbers[] = {1, 2};
  Tensor update(DType::kFloat32, 300, 129);
  update.fill(rng);
  Tensor sum(DType::kBFloat16, 300, 129);
  sum.fill(rng);
  Tensor apart(DType::kBFloat16, 300, 129);
  run({sum.view(), update.view()}, apart, numbers, 3);
  run({sum.view(), update.view()}, sum, numbers, 3);
  for (int64_t t = 0; t < sum.rows(); ++t) {
    for (int64_t d = 0; d < sum.cols(); ++d) {
      ASSERT_EQ(sum.at(t, d), apart.at(t, d));
    }
  }
}

TEST(StochasticAdd, NamesWhatIsWrong) {
  Tensor term(DType::kFloat32, 3, 8);
  Tensor narrow(DType::kFloat32, 3, 7);
  Tensor wide(DType::kFloat64, 3, 8);
  Tensor out(DType::kBFloat16, 3, 8);
  Tensor half(DType::kFloat16, 3, 8);
  const auto message = [](const std::vector<ConstMatrix>& terms, const Matrix& result,
                          const int64_t* seed, int64_t site) {
    StochasticAddArgs args;
    args.terms = terms;
    args.out = result;
    args.seed = seed;
    args.site = site;
    const Status status = stochastic_add(args);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  EXPECT_EQ(message({}, out.view(), kSeed, 0),
            "stochastic_add: terms has 0 items, expected 1 to 4");
  EXPECT_EQ(message({term.view(), narrow.view()}, out.view(), kSeed, 0),
            "stochastic_add: terms[1] has shape [3, 7], expected [3, 8] ([T, D])");
  EXPECT_EQ(message({wide.view()}, out.view(), kSeed, 0),
            "stochastic_add: terms[0] is float64, expected float32, bfloat16 or float16");
  EXPECT_EQ(message({term.view()}, half.view(), kSeed, 0),
            "stochastic_add: out is float16, expected bfloat16");
  EXPECT_EQ(message({term.view()}, out.view(), kSeed, -1),
            "stochastic_add: site is -1, expected 0 to 2^32 - 1");
  EXPECT_EQ(message({term.view()}, out.view(), nullptr, 0),
            "stochastic_add: seed is a null pointer, expected two int64 numbers: seed and step");
}

}  // namespace
}  // namespace flash_attn_res
