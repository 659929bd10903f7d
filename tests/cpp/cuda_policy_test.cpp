// Launch choices of the CUDA backend that can be checked without a GPU.

#include "cuda/policy.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>

#include "cuda/hopper_read_backward_plan.h"

namespace flash_attn_res::cuda {
namespace {

constexpr int64_t kSegment = 256;

TEST(ReadRows, RegistersOfAMultiprocessorHoldTheBlocksOfEachForm) {
  for (const bool half : {false, true}) {
    int terms = 0;
    int chunks = 0;
    for (const ReadRowsForm& form : read_rows_forms(half)) {
      EXPECT_TRUE(form.terms > terms || (form.terms == terms && form.chunks < chunks))
          << "forms are listed by terms, those with more chunks first";
      terms = form.terms;
      chunks = form.chunks;
      EXPECT_LE(form.max_threads(), 1024);
      EXPECT_LE(form.max_threads() * form.registers, 65536);
      EXPECT_GE(form.max_threads() / form.blocks, 96);
      EXPECT_EQ(read_rows_form(half, form.terms, form.chunks).registers, form.registers);
      EXPECT_LE(form.least_terms, form.terms);
      EXPECT_TRUE(form.least_warps == 0 || form.chunks > 1) << "narrow tokens need a form as well";
    }
    EXPECT_EQ(chunks, 1) << "few tokens have one chunk a thread";
    EXPECT_LE(terms, kReadRowsMaxTerms);
  }
}

TEST(ReadRows, AChoiceCoversTheTokenAndWastesNoBlock) {
  for (const bool half : {false, true}) {
    for (const bool clusters : {false, true}) {
      for (int64_t terms = 1; terms <= 40; ++terms) {
        for (int64_t dim = 8; dim <= 32768; dim += dim < 4096 ? 8 : 1016) {
          for (const int64_t tokens : {int64_t{1}, kReadThinTokens, kReadThinTokens + 1,
                                       kReadFewTokens, kReadFewTokens + 1}) {
            const ReadRowsPolicy policy = choose_read_rows(half, terms, dim, clusters, tokens);
            if (policy.terms == 0) {
              EXPECT_TRUE(terms > read_rows_forms(half).back().terms || dim > 3072)
                  << "K=" << terms << " D=" << dim;
              continue;
            }
            SCOPED_TRACE(testing::Message() << "K=" << terms << " D=" << dim << " half=" << half);
            const ReadRowsForm form = read_rows_form(half, policy.terms, policy.chunks);
            const int64_t per_block = int64_t{policy.threads} / 32 * form.chunks * kSegment;
            ASSERT_GE(policy.terms, terms);
            ASSERT_EQ(policy.threads % 32, 0);
            ASSERT_LE(policy.threads * policy.tokens, form.max_threads());
            ASSERT_GE(per_block * policy.cluster, dim);
            ASSERT_LT((per_block - form.chunks * kSegment) * policy.cluster, dim);
            ASSERT_TRUE(clusters || policy.cluster == 1);
            ASSERT_TRUE(policy.tokens == 1 || policy.cluster == 1);
            // Sums are formed in an order that the form knows from least_terms on.
            ASSERT_GE(terms, form.least_terms);
          }
        }
      }
    }
  }
}

TEST(ReadRows, TheShapesOfTheBenchmarksAreServed) {
  const auto choose = [](int64_t terms, int64_t dim, int64_t tokens) {
    return choose_read_rows(/*half=*/true, terms, dim, /*clusters=*/true, tokens);
  };
  EXPECT_EQ(choose(4, 2048, 8192), (ReadRowsPolicy{4, 2, 1, 128, 1}));
  EXPECT_EQ(choose(2, 2048, 8192), (ReadRowsPolicy{2, 2, 1, 128, 1}));
  EXPECT_EQ(choose(2, 7168, 8192), (ReadRowsPolicy{2, 2, 1, 448, 1}));
  EXPECT_EQ(choose(2, 2304, 8192), (ReadRowsPolicy{2, 2, 1, 160, 1}));
  EXPECT_EQ(choose(8, 7168, 8192), (ReadRowsPolicy{8, 2, 2, 224, 1}));
  EXPECT_EQ(choose(6, 7168, 8192), (ReadRowsPolicy{6, 2, 4, 128, 1}));
  EXPECT_EQ(choose(9, 2304, 8192), (ReadRowsPolicy{10, 2, 1, 160, 1}));
  EXPECT_EQ(choose(2, 1024, 8192), (ReadRowsPolicy{2, 2, 1, 64, 2}));
  EXPECT_EQ(choose(2, 256, 8192), (ReadRowsPolicy{2, 2, 1, 32, 4}));
  EXPECT_EQ(choose(8, 1024, 8192), (ReadRowsPolicy{8, 1, 1, 128, 1})) << "too few warps for two";
  EXPECT_EQ(choose(9, 7168, 128), (ReadRowsPolicy{10, 1, 2, 448, 1}));
  // Few tokens are split thinly, but not into blocks of fewer than four warps.
  EXPECT_EQ(choose(2, 7168, 1), (ReadRowsPolicy{2, 1, 8, 128, 1}));
  EXPECT_EQ(choose(9, 7168, 32), (ReadRowsPolicy{10, 1, 8, 128, 1}));
  EXPECT_EQ(choose(2, 2048, 1), (ReadRowsPolicy{2, 1, 2, 128, 1}));
  EXPECT_EQ(choose(2, 256, 1), (ReadRowsPolicy{2, 1, 1, 32, 4}));
  // Whether rows in registers serve a token does not depend on how many there are.
  EXPECT_EQ(choose(2, 100000, 1), choose(2, 100000, 999));
}

constexpr DeviceLimits kH100 = {.major = 9,
                                .minor = 0,
                                .multiprocessors = 132,
                                .shared_per_block = 227 * 1024,
                                .shared_per_multiprocessor = 228 * 1024};

TEST(ReadAhead, RegistersOfAMultiprocessorHoldABlockOfEachForm) {
  for (const ReadAheadForm& form : kReadAhead) {
    EXPECT_LE(form.max_threads() * form.registers, 65536);
    EXPECT_GE(form.max_threads(), 384);
    EXPECT_EQ(read_ahead_form(form.terms, form.chunks).registers, form.registers);
    EXPECT_EQ(form.least_terms, form.terms == 2 ? 1 : form.terms - 1);
  }
}

constexpr auto kNoSums = [](int) { return int64_t{0}; };

TEST(ReadAhead, AChoiceDividesTheRowAndFits) {
  int served = 0;
  for (int64_t terms = 1; terms <= 12; ++terms) {
    for (int64_t dim = 8; dim <= 16384; dim += 8) {
      for (const int64_t updates : {0, 1}) {
        const ReadAheadPolicy policy = choose_read_ahead(terms, updates, dim, kH100, kNoSums);
        if (policy.terms == 0) {
          EXPECT_TRUE(terms > 10 || dim > 7168 || (dim % 512 != 0 && dim % 768 != 0))
              << "K=" << terms << " D=" << dim;
          continue;
        }
        ++served;
        const ReadAheadForm form = read_ahead_form(policy.terms, policy.chunks);
        ASSERT_GE(policy.terms, terms);
        ASSERT_LE(form.least_terms, terms);
        ASSERT_EQ(int64_t{policy.threads} * policy.chunks * 8, dim);
        ASSERT_LE(policy.threads, form.max_threads());
        ASSERT_EQ(policy.shared_bytes,
                  int64_t{policy.threads} * policy.chunks * 16 * (policy.terms + updates));
        ASSERT_LE(policy.shared_bytes, kH100.shared_per_block);
      }
    }
  }
  EXPECT_GT(served, 300);
}

TEST(ReadAhead, TheShapesOfTheBenchmarksHaveTheirForms) {
  const auto choose = [](int64_t terms, int64_t dim) {
    const ReadAheadPolicy policy = choose_read_ahead(terms, 0, dim, kH100, kNoSums);
    return std::array{policy.terms, policy.chunks, policy.threads};
  };
  EXPECT_EQ(choose(1, 2048), (std::array{2, 4, 64}));
  EXPECT_EQ(choose(4, 2048), (std::array{4, 4, 64}));
  EXPECT_EQ(choose(2, 7168), (std::array{2, 4, 224}));
  EXPECT_EQ(choose(9, 7168), (std::array{10, 2, 448}));
  EXPECT_EQ(choose(2, 2304), (std::array{2, 3, 96}));
  EXPECT_EQ(choose(10, 2304), (std::array{10, 3, 96}));
  EXPECT_EQ(choose(4, 512), (std::array{4, 2, 32}));
  EXPECT_EQ(choose(4, 1000)[0], 0) << "a row that does not divide evenly";
}

TEST(ReadAhead, BandsCoverEveryTokenOnce) {
  for (const int64_t resident : {132, 264, 396, 1056}) {
    for (int64_t tokens = 1; tokens < 20000; tokens += tokens < 300 ? 1 : 97) {
      const ReadAheadBands bands = read_ahead_bands(tokens, resident, 132);
      SCOPED_TRACE(testing::Message() << "T=" << tokens << " resident=" << resident);
      const int64_t of_band = int64_t{bands.stride} * bands.count;
      ASSERT_GE(of_band * bands.bands, tokens);
      ASSERT_LT(of_band * (bands.bands - 1), tokens) << "a band without tokens";
      ASSERT_LE(bands.stride, resident);
      ASSERT_LE(bands.count, resident == 132 ? tokens : resident < 500 ? 6 : 3);
    }
  }
  EXPECT_EQ(read_ahead_bands(65536, 1056, 132), (ReadAheadBands{1056, 3, 21}));
  EXPECT_EQ(read_ahead_bands(8192, 132, 132), (ReadAheadBands{132, 63, 1}));
}

/// Shared memory of a block with eight sources, about as the kernel needs it.
constexpr auto kFewBytes = [](const AttendFewForm& form, int64_t teams, int64_t warps) {
  const int64_t columns = warps * form.chunks * 256;
  return columns * 4 * form.queries + teams * (columns * 8 + 1024 * warps);
};

TEST(AttendFew, RegistersOfAMultiprocessorHoldABlockOfEachForm) {
  for (const AttendFewForm& form : kAttendFew) {
    EXPECT_LE(form.max_threads() * form.registers, 65536);
    EXPECT_EQ(attend_few_form(form.queries, form.chunks).registers, form.registers);
  }
}

TEST(AttendFew, AChoiceCoversTheRowAndFits) {
  int served = 0;
  for (int64_t queries = 1; queries <= 5; ++queries) {
    for (int64_t dim = 16; dim <= 16384; dim += 16) {
      const AttendFewPolicy many = choose_attend_few(queries, dim, 8192, kH100, kFewBytes);
      const AttendFewPolicy one = choose_attend_few(queries, dim, 1, kH100, kFewBytes);
      SCOPED_TRACE(testing::Message() << "S=" << queries << " D=" << dim);
      // What decides the order of sums does not depend on how many tokens there are.
      ASSERT_EQ(many.queries, one.queries);
      ASSERT_EQ(many.chunks, one.chunks);
      ASSERT_EQ(many.warps, one.warps);
      if (many.queries == 0) {
        EXPECT_TRUE(queries == 5 || dim > 4096) << "not served";
        continue;
      }
      ++served;
      ASSERT_EQ(one.teams, 1);
      ASSERT_GE(many.teams, 2);
      ASSERT_GE(many.queries, queries);
      ASSERT_GE(int64_t{many.warps} * many.chunks * 256, dim);
      ASSERT_LT(int64_t{many.warps - 1} * many.chunks * 256, dim) << "a warp without columns";
      ASSERT_LE(many.teams * many.warps * 32,
                attend_few_form(many.queries, many.chunks).max_threads());
      ASSERT_LE(many.shared_bytes, kH100.shared_per_block);
    }
  }
  EXPECT_GT(served, 1000);
  const auto choose = [](int64_t queries, int64_t dim) {
    const AttendFewPolicy policy = choose_attend_few(queries, dim, 8192, kH100, kFewBytes);
    return std::array{policy.queries, policy.chunks, policy.warps, policy.teams};
  };
  EXPECT_EQ(choose(1, 2048), (std::array{1, 4, 2, 8}));
  EXPECT_EQ(choose(1, 2304), (std::array{1, 3, 3, 6}));
  EXPECT_EQ(choose(2, 7168), (std::array{2, 4, 7, 2}));
  EXPECT_EQ(choose(4, 7168)[0], 0) << "a team would be alone";
}

/// Sums of a token with norm: see SumMap in the kernel.
hopper::ReadBackwardExtents extents(int terms, int narrow, int wide) {
  return {.terms = terms,
          .narrow_rows = narrow,
          .wide_rows = wide,
          .sums = static_cast<int>(round_up(2 * terms + 1, 4))};
}

TEST(HopperReadBackward, AChoiceCoversTheTokenAndFitsTheDevice) {
  int served = 0;
  for (const int terms : {1, 2, 3, 5, 9, 17, 32}) {
    for (const int wide : {0, 1, terms}) {
      for (int64_t dim = 8; dim <= 16384; dim += dim < 4096 ? 8 : 1016) {
        const hopper::ReadBackwardExtents sizes = extents(terms, terms + 2, wide);
        const hopper::ReadBackwardPlan plan = hopper::choose_read_backward(sizes, dim, kH100);
        if (plan.columns == 0) {
          continue;
        }
        ++served;
        SCOPED_TRACE(testing::Message() << "K=" << terms << " D=" << dim << " wide=" << wide);
        const int64_t bytes = hopper::read_backward_map(plan, sizes).bytes;
        ASSERT_GE(int64_t{plan.columns} * plan.cluster, dim);
        ASSERT_LT(int64_t{plan.columns} * (plan.cluster - 1), dim);
        ASSERT_TRUE(plan.chunks == 1 || plan.chunks == 2);
        ASSERT_LE(plan.columns, plan.warps * plan.chunks * hopper::kReadWarpColumns);
        ASSERT_GT(plan.columns, (plan.warps - 1) * plan.chunks * hopper::kReadWarpColumns);
        ASSERT_LE(plan.threads() * plan.blocks,
                  hopper::read_resident_warps(terms, plan.chunks) * 32);
        ASSERT_TRUE(plan.groups == 1 || (plan.groups == 2 && plan.cluster == 1 && terms != 2));
        ASSERT_LE(bytes, kH100.shared_per_block);
        ASSERT_LE((bytes + 1024) * plan.blocks, kH100.shared_per_multiprocessor);
        ASSERT_GE(plan.stages, 3);
        ASSERT_LE(plan.stages, hopper::kReadStagesMax);
        ASSERT_GE(plan.lead, 1);
        ASSERT_GE(plan.look, 1);
      }
    }
  }
  EXPECT_GT(served, 5000);
}

TEST(HopperReadBackward, TheShapesOfTheBenchmarksHaveTheirPlans) {
  using Plan = hopper::ReadBackwardPlan;
  const auto choose = [](int terms, int64_t dim) {  // terms, dx, and with two terms dpartial_out
    return hopper::choose_read_backward(extents(terms, terms + (terms == 2 ? 2 : 1), 0), dim,
                                        kH100);
  };
  const auto plan = [](int cluster, int columns, int chunks, int warps, int stages, int blocks,
                       int lead, int look) {
    return Plan{.cluster = cluster,
                .columns = columns,
                .chunks = chunks,
                .warps = warps,
                .stages = stages,
                .blocks = blocks,
                .lead = lead,
                .look = look};
  };
  EXPECT_EQ(choose(2, 2048), plan(1, 2048, 2, 4, 5, 2, 192, 2));
  EXPECT_EQ(choose(2, 2304), plan(1, 2304, 1, 9, 4, 2, 170, 2));
  EXPECT_EQ(choose(2, 4096), plan(1, 4096, 2, 8, 5, 1, 96, 1));
  EXPECT_EQ(choose(2, 7168), plan(2, 3584, 2, 7, 3, 2, 54, 1));
  EXPECT_EQ(choose(4, 2048), plan(1, 2048, 1, 8, 4, 2, 153, 2));
  EXPECT_EQ(choose(8, 7168), plan(4, 1792, 1, 7, 3, 2, 24, 1));
  Plan in_turn = plan(1, 2304, 1, 9, 3, 1, 62, 1);
  in_turn.groups = 2;
  EXPECT_EQ(choose(10, 2304), in_turn);
  EXPECT_EQ(choose(2, 1024), plan(1, 1024, 2, 2, 5, 4, 384, 4));
  EXPECT_EQ(choose(2, 512).look, 8);
  EXPECT_EQ(choose(4, 512).look, 4);
}

TEST(HopperReadBackward, ALaneHasTwoChunksOfTwoTermsWhereNoneIsIdle) {
  for (const int columns : {8, 256, 264, 512, 520, 768, 1000, 1032, 2304, 2816}) {
    EXPECT_EQ(hopper::read_chunks(2, columns), 1) << columns;
  }
  for (const int columns : {1024, 1536, 2048, 2560, 3584, 4096, 5120}) {
    EXPECT_EQ(hopper::read_chunks(2, columns), 2) << columns;
    EXPECT_EQ(hopper::read_chunks(3, columns), 1) << columns;
  }
}

TEST(HopperReadBackward, WarpsFillTheRegistersOfAMultiprocessor) {
  for (const int terms : {1, 2, 3, 32}) {
    for (const int chunks : {1, 2}) {
      const int warps = hopper::read_resident_warps(terms, chunks);
      EXPECT_EQ(warps % 4, 0) << "a quarter of a multiprocessor has registers of its own";
      EXPECT_GE(warps, hopper::kReadWarpsMax + hopper::kReadServiceWarps) << "one CTA fits";
      EXPECT_LE(warps * 32, 1024);
    }
  }
}

}  // namespace
}  // namespace flash_attn_res::cuda
