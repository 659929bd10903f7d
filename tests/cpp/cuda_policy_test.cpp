// Launch choices of the CUDA backend that can be checked without a GPU.

#include "cuda/policy.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace flash_attn_res::cuda {
namespace {

constexpr int64_t kSegment = 256;

TEST(ReadRows, RegistersOfAMultiprocessorHoldTheBlocksOfEachForm) {
  for (const bool half : {false, true}) {
    int terms = 0;
    for (const ReadRowsForm& form : read_rows_forms(half)) {
      EXPECT_GT(form.terms, terms) << "forms are listed by terms";
      terms = form.terms;
      EXPECT_LE(form.max_threads(), 1024);
      EXPECT_LE(form.max_threads() * form.registers, 65536);
      EXPECT_GE(form.max_threads() / form.blocks, 96);
      EXPECT_EQ(read_rows_form(half, form.terms).registers, form.registers);
    }
    EXPECT_LE(terms, kReadRowsMaxTerms);
  }
}

TEST(ReadRows, AChoiceCoversTheTokenAndWastesNoBlock) {
  for (const bool half : {false, true}) {
    for (const bool clusters : {false, true}) {
      for (int64_t terms = 1; terms <= 40; ++terms) {
        for (int64_t dim = 8; dim <= 32768; dim += dim < 4096 ? 8 : 1016) {
          const ReadRowsPolicy policy = choose_read_rows(half, terms, dim, clusters);
          if (policy.terms == 0) {
            EXPECT_TRUE(terms > read_rows_forms(half).back().terms || dim > 3072)
                << "K=" << terms << " D=" << dim;
            continue;
          }
          SCOPED_TRACE(testing::Message() << "K=" << terms << " D=" << dim << " half=" << half);
          const ReadRowsForm form = read_rows_form(half, policy.terms);
          const int64_t per_block = int64_t{policy.threads} / 32 * form.chunks * kSegment;
          ASSERT_GE(policy.terms, terms);
          ASSERT_EQ(policy.threads % 32, 0);
          ASSERT_LE(policy.threads * policy.tokens, form.max_threads());
          ASSERT_GE(per_block * policy.cluster, dim);
          ASSERT_LT((per_block - form.chunks * kSegment) * policy.cluster, dim);
          ASSERT_TRUE(clusters || policy.cluster == 1);
          ASSERT_TRUE(policy.tokens == 1 || policy.cluster == 1);
        }
      }
    }
  }
}

TEST(ReadRows, TheShapesOfTheBenchmarksAreServed) {
  EXPECT_EQ(choose_read_rows(true, 4, 2048, true), (ReadRowsPolicy{4, 1, 128, 1}));
  EXPECT_EQ(choose_read_rows(true, 2, 2048, true), (ReadRowsPolicy{2, 1, 128, 1}));
  EXPECT_EQ(choose_read_rows(true, 8, 7168, true), (ReadRowsPolicy{8, 4, 224, 1}));
  EXPECT_EQ(choose_read_rows(true, 2, 7168, true), (ReadRowsPolicy{2, 1, 448, 1}));
  EXPECT_EQ(choose_read_rows(true, 2, 256, true), (ReadRowsPolicy{2, 1, 32, 4}));
}

}  // namespace
}  // namespace flash_attn_res::cuda
