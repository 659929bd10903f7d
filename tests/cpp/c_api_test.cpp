// Runs the checks of c_api_test.c, which is compiled as C11.

#include "c_api_test.h"

#include <gtest/gtest.h>

namespace {

#define C_API_TEST(name, check)                 \
  TEST(CApi, name) {                            \
    const char* failure = check();              \
    EXPECT_TRUE(failure == nullptr) << failure; \
  }

C_API_TEST(Version, c_api_version)
C_API_TEST(Defaults, c_api_defaults)
C_API_TEST(Attend, c_api_attend)
C_API_TEST(AttendBackward, c_api_attend_backward)
C_API_TEST(Read, c_api_read)
C_API_TEST(ReadQuantized, c_api_read_quantized)
C_API_TEST(ReadBackward, c_api_read_backward)
C_API_TEST(Fold, c_api_fold)
C_API_TEST(StochasticAdd, c_api_stochastic_add)
C_API_TEST(Quantize, c_api_quantize)
C_API_TEST(AttendStored, c_api_attend_stored)
C_API_TEST(ReadStored, c_api_read_stored)
C_API_TEST(Executor, c_api_executor)
C_API_TEST(BadLists, c_api_bad_lists)
C_API_TEST(BadStructs, c_api_bad_structs)
C_API_TEST(StructGrowth, c_api_struct_growth)
C_API_TEST(LibraryErrors, c_api_library_errors)
C_API_TEST(NoCuda, c_api_no_cuda)

}  // namespace
