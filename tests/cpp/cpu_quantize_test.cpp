// The quantised x of read and the snapshot of its partial sum, on the CPU against the reference.

#include <bit>

#include "common/float_types.h"
#include "cpu_testing.h"
#include "flash_attn_res/read.h"
#include "reference/reference.h"

namespace flash_attn_res {
namespace {

constexpr double kLargest = 448;      // of e4m3
constexpr double kStep = 0x1p-9;      // between its subnormals
constexpr double kHalfUlp = 0x1p-4;   // of a normal value, relative
constexpr double kSmallest = 0x1p-6;  // normal value

int64_t groups_of(int64_t dim, bool by_group) {
  return by_group ? (dim + kScaleGroup - 1) / kScaleGroup : 1;
}

/// x [T, D] and x_scale of one call.
struct Quantized {
  Tensor x, scale;

  Quantized(int64_t T, int64_t D, bool by_group, Layout layout = {})
      : x(DType::kFloat8E4M3, T, D, layout), scale(DType::kFloat32, T, groups_of(D, by_group)) {}

  double value(int64_t t, int64_t d) const { return x.at(t, d) * scale_at(t, d); }
  double scale_at(int64_t t, int64_t d) const {
    return scale.at(t, scale.cols() == 1 ? 0 : d / kScaleGroup);
  }
};

void run(const ReadArgs& args) {
  Workspace workspace(read_workspace_bytes(args));
  const Status status = read(args, workspace.context());
  ASSERT_TRUE(status.ok()) << status.message();
}

/// x = source, quantised.
void quantize(const Tensor& source, Quantized& result, ScaleRounding rounding) {
  ReadArgs args;
  const std::vector<ConstMatrix> sources = {source.view()};
  args.sources = sources;
  args.x = result.x.view();
  args.x_scale = result.scale.view();
  args.scale_rounding = rounding;
  run(args);
}

TEST(Float8, EveryCodeComesBack) {
  for (int code = 0; code < 256; ++code) {
    const Float8E4M3 value = {static_cast<uint8_t>(code)};
    const float wide = to_float(value);
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(wide));
      EXPECT_EQ(to_float8_e4m3(wide).bits & 0x7f, 0x7f);
    } else {
      EXPECT_EQ(to_float8_e4m3(wide).bits, code);
      // The definition: sign, exponent with bias 7, three fraction bits; subnormals in 2^-9.
      const int exponent = (code >> 3) & 15;
      const double fraction = code & 7;
      const double magnitude =
          exponent == 0 ? fraction * kStep : std::ldexp(8 + fraction, exponent - 10);
      EXPECT_EQ(wide, (code & 0x80) != 0 ? -magnitude : magnitude);
    }
  }
}

TEST(Float8, NearestWithTiesToEven) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = to_float(Float8E4M3{static_cast<uint8_t>(code)});
    const float high = to_float(Float8E4M3{static_cast<uint8_t>(code + 1)});
    const float middle = (low + high) / 2;  // exact
    const int even = code % 2 == 0 ? code : code + 1;
    EXPECT_EQ(to_float8_e4m3(middle).bits, even);
    EXPECT_EQ(to_float8_e4m3(-middle).bits, even | 0x80);
    EXPECT_EQ(to_float8_e4m3(std::nextafter(middle, 0.0F)).bits, code);
    EXPECT_EQ(to_float8_e4m3(std::nextafter(middle, 1e9F)).bits, code + 1);
  }
  const float inf = std::numeric_limits<float>::infinity();
  for (const float large : {448.0F, 449.0F, 464.0F, 1e6F, 3e38F, inf}) {
    EXPECT_EQ(to_float8_e4m3(large).bits, 0x7e);
    EXPECT_EQ(to_float8_e4m3(-large).bits, 0xfe);
  }
}

class CpuQuantize : public CpuTest {};

// With one source and no norm, x is the source: only the quantisation is at work. Powers of two
// scale exactly, so that even the bits are those of the conversion.
TEST_P(CpuQuantize, StoresTheNearestValues) {
  Rng rng(11);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t D : {1, 7, 127, 128, 129, 300, 2304}) {
      for (const bool by_group : {false, true}) {
        for (const ScaleRounding rounding : {ScaleRounding::kNone, ScaleRounding::kPowerOfTwo}) {
          const Layout layout = pick_layout(rng);
          const int64_t T = 5;
          Tensor source(dtype, T, D, layout);
          source.fill(rng, dtype == DType::kFloat16 ? 30 : 1e4);
          Quantized got(T, D, by_group, layout);
          quantize(source, got, rounding);
          EXPECT_TRUE(got.x.untouched_outside());
          EXPECT_TRUE(got.scale.untouched_outside());
          const int64_t width = by_group ? kScaleGroup : D;
          for (int64_t t = 0; t < T; ++t) {
            for (int64_t begin = 0; begin < D; begin += width) {
              double amax = 0;
              for (int64_t d = begin; d < std::min(D, begin + width); ++d) {
                amax = std::max(amax, std::abs(source.at(t, d)));
              }
              const double scale = got.scale_at(t, begin);
              if (rounding == ScaleRounding::kNone) {
                EXPECT_EQ(scale, static_cast<float>(amax) / 448.0F);
              } else {
                EXPECT_EQ(std::exp2(std::round(std::log2(scale))), scale);
                EXPECT_GE(scale * kLargest, amax * (1 - 1e-6));
                EXPECT_LT(scale / 2 * kLargest, amax * (1 + 1e-6));
              }
              for (int64_t d = begin; d < std::min(D, begin + width); ++d) {
                const double x = source.at(t, d);
                const double unit = std::max(std::abs(x), kSmallest * scale) * kHalfUlp;
                EXPECT_LE(std::abs(got.value(t, d) - x), unit * (1 + 1e-5));
                if (rounding == ScaleRounding::kPowerOfTwo) {
                  EXPECT_EQ(got.x.at(t, d),
                            to_float(to_float8_e4m3(static_cast<float>(x / scale))));
                }
              }
            }
          }
        }
      }
    }
  }
}

// Whole sites, against the same site in double precision: values agree to one step of e4m3 (two
// results on either side of a tie), scales to float32 noise. Most values agree to the bit.
TEST_P(CpuQuantize, SitesAgreeWithTheReference) {
  Rng rng(12);
  for (int i = 0; i < random_cases(120); ++i) {
    const int64_t T = pick<int64_t>(rng, {1, 3, 70});
    const int64_t D = 1 + static_cast<int64_t>(rng() % 400);
    const int64_t N = static_cast<int64_t>(rng() % 4);
    const DType dtype = pick_dtype(rng);
    const bool normed = rng() % 2 == 0;
    const bool by_group = rng() % 2 == 0;
    const Layout layout = pick_layout(rng);
    Tensors sources;
    for (int64_t n = 0; n < N; ++n) {
      sources.push_back(Tensor(dtype, T, D, layout).fill(rng));
    }
    Tensor partial = Tensor(dtype, T, D, layout).fill(rng);
    const Tensor update = Tensor(dtype, T, D).fill(rng);
    const Tensor query = Tensor(DType::kFloat32, 1, D).fill(rng, 1 / std::sqrt(double(D)));
    const Tensor weight = Tensor(dtype, 1, D).fill(rng);
    const std::vector<ConstMatrix> source_views = const_views(sources);
    const std::vector<ConstMatrix> updates = {update.view()};

    ReadArgs args;
    args.sources = source_views;
    args.partial = partial.view();
    args.updates = updates;
    args.query = query.view();
    args.norm = normed ? OutputNorm::kRms : OutputNorm::kNone;
    args.norm_weight = normed ? weight.view() : ConstMatrix{};
    args.mix_rounding = rng() % 2 == 0 ? MixRounding::kFloat32 : MixRounding::kStorage;
    args.scale_rounding = rng() % 2 == 0 ? ScaleRounding::kNone : ScaleRounding::kPowerOfTwo;

    Quantized got(T, D, by_group, layout);
    Quantized want(T, D, by_group, layout);
    Tensor sums[2] = {Tensor(dtype, T, D, layout), Tensor(dtype, T, D)};
    Tensor snapshots[2] = {Tensor(dtype, T, D, layout), Tensor(dtype, T, D)};
    Tensor mixes[2] = {Tensor(dtype, T, D, layout), Tensor(DType::kFloat32, T, D)};
    for (const bool reference : {false, true}) {
      Quantized& result = reference ? want : got;
      args.x = result.x.view();
      args.x_scale = result.scale.view();
      args.partial_out = sums[reference].view();
      args.snapshot = snapshots[reference].view();
      args.mix = mixes[reference].view();
      if (reference) {
        ASSERT_TRUE(reference::read(args, Context{}).ok());
      } else {
        run(args);
      }
    }
    EXPECT_TRUE(sums[0].same_bits(sums[1]));
    EXPECT_TRUE(snapshots[0].same_bits(sums[0]));
    EXPECT_TRUE(snapshots[0].untouched_outside());
    expect_close(mixes[0], mixes[1], "mix");
    int64_t same = 0;
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        const double a = got.scale_at(t, d);
        const double b = want.scale_at(t, d);
        if (a != b && args.scale_rounding == ScaleRounding::kPowerOfTwo) {
          EXPECT_TRUE(a == 2 * b || b == 2 * a);  // amax on either side of a power of two
        } else if (args.mix_rounding == MixRounding::kFloat32) {
          EXPECT_NEAR(a, b, 1e-4 * b);
        }
        const double step = std::max(std::abs(want.value(t, d)) / 4, 2 * kStep * std::max(a, b));
        EXPECT_LE(std::abs(got.value(t, d) - want.value(t, d)), step);
        same += got.value(t, d) == want.value(t, d) || std::abs(a - b) > 0 ? 1 : 0;
      }
    }
    EXPECT_GE(static_cast<double>(same), 0.9 * static_cast<double>(T * D) - 2);
  }
}

TEST_P(CpuQuantize, ZerosNanAndInf) {
  const int64_t D = 300;  // groups of 128, 128 and 44
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Tensor source(DType::kFloat32, 4, D);
  source.fill_with(0);
  source.set(1, 130, nan);
  source.set(1, 131, 5);
  source.set(2, 299, -inf);
  source.set(2, 298, 1);
  source.set(3, 0, 1e-42);  // its scale would be subnormal, its reciprocal Inf
  for (const ScaleRounding rounding : {ScaleRounding::kNone, ScaleRounding::kPowerOfTwo}) {
    Quantized got(4, D, true);
    quantize(source, got, rounding);
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        const bool bad = (t == 1 && d / 128 == 1) || (t == 2 && d / 128 == 2);
        EXPECT_EQ(std::isnan(got.value(t, d)), bad) << t << " " << d;
        if (!bad) {
          EXPECT_EQ(got.value(t, d), 0);
          EXPECT_EQ(got.scale_at(t, d), 0x1p-126);
        }
      }
    }
    EXPECT_TRUE(std::isnan(got.scale.at(1, 1)));
    EXPECT_TRUE(std::isinf(got.scale.at(2, 2)));
  }
}

// The sum reaches the snapshot without a partial_out as well, and is the term that the site reads.
TEST_P(CpuQuantize, SnapshotOfAnUnchangedSum) {
  Rng rng(13);
  const Tensor partial = Tensor(DType::kBFloat16, 6, 40).fill(rng);
  Tensor snapshot(DType::kBFloat16, 6, 40, {.row_gap = 80});
  Tensor x(DType::kBFloat16, 6, 40);
  ReadArgs args;
  args.partial = partial.view();
  args.x = x.view();
  args.snapshot = snapshot.view();
  run(args);
  EXPECT_TRUE(snapshot.same_bits(partial));
  EXPECT_TRUE(x.same_bits(partial));
  EXPECT_TRUE(snapshot.untouched_outside());
}

INSTANTIATE_TEST_SUITE_P(Isa, CpuQuantize, testing::ValuesIn(available_isas()), isa_name);

}  // namespace
}  // namespace flash_attn_res
