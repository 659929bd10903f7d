// stochastic_add on the CPU. Integer work for the most part, the same for every instruction set.

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/dispatch.h"
#include "common/philox.h"
#include "cpu/backend.h"
#include "cpu/parallel.h"

namespace flash_attn_res::cpu {
namespace {

constexpr int64_t kColumns = 8;           // of a chunk, which shares one call of the generator
constexpr int64_t kTaskElements = 32768;  // enough to pay for handing out a task

/// sums[0..count) = or += row `t` of a term, from column `col` on.
void add_term(const ConstMatrix& term, int64_t t, int64_t col, int64_t count, bool first,
              float* sums) {
  dispatch_dtype(term.dtype, [&]<class T>() {
    const T* const values = static_cast<const T*>(term.data) + t * term.stride + col;
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = first ? to_float(values[i]) : sums[i] + to_float(values[i]);
    }
  });
}

void add_rows(const StochasticAddArgs& args, int64_t begin, int64_t end) {
  const int64_t dim = args.out.cols;
  const int64_t chunks = (dim + kColumns - 1) / kColumns;
  const auto site = static_cast<uint32_t>(args.site);
  for (int64_t t = begin; t < end; ++t) {
    auto* const out = static_cast<BFloat16*>(args.out.data) + t * args.out.stride;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t col = c * kColumns;
      const int64_t count = std::min(kColumns, dim - col);
      float sums[kColumns];
      for (size_t k = 0; k < args.terms.size(); ++k) {
        add_term(args.terms[k], t, col, count, k == 0, sums);
      }
      const PhiloxWords words = chunk_words(args.seed[0], args.seed[1], site, t * chunks + c);
      for (int64_t i = 0; i < count; ++i) {
        out[col + i] = {round_stochastically(std::bit_cast<uint32_t>(sums[i]),
                                             lane_bits(words, static_cast<int>(i)))};
      }
    }
  }
}

}  // namespace

Status stochastic_add(const StochasticAddArgs& args, const Context& context) {
  const int64_t tokens = args.out.rows;
  const int64_t rows = std::max<int64_t>(1, kTaskElements / args.out.cols);
  for_each_task(context.executor, (tokens + rows - 1) / rows,
                [&](int64_t i) { add_rows(args, i * rows, std::min(tokens, (i + 1) * rows)); });
  return {};
}

}  // namespace flash_attn_res::cpu
