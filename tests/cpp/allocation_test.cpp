// Calls on the CPU allocate nothing: memory and workspace are the caller's.

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu_testing.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/fold.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/stochastic.h"

namespace {

std::atomic<int64_t> allocations{0};  // of all threads

void* allocate(std::size_t size, std::size_t align) {
  ++allocations;
  const std::size_t whole = (size + align - 1) / align * align;
  void* const memory = std::aligned_alloc(align, whole > 0 ? whole : align);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

// The forms with arrays and without exceptions call these. Were one of a pair inlined and the
// other not, GCC would take them for mismatched.
[[gnu::noinline]] void* operator new(std::size_t size) {
  return allocate(size, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new(std::size_t size, std::align_val_t align) {
  return allocate(size, static_cast<std::size_t>(align));
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}

namespace flash_attn_res {
namespace {

constexpr int64_t kT = 200, kN = 3, kS = 2, kD = 300;  // several chunks, a tail in every row

/// Tasks one after the other on this thread: an executor of its own has nothing to allocate.
void run_in_order(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) {
    task(context, i);
  }
}
constexpr Executor kInOrder = {run_in_order, nullptr};

/// What `call` allocates; it must succeed.
template <class Call>
int64_t allocated_by(Call call) {
  const int64_t before = allocations;
  const Status status = call();
  const int64_t count = allocations - before;
  EXPECT_TRUE(status.ok()) << status.message();
  return count;
}

/// Values, and the statistics of a forward, in one storage dtype.
struct Site {
  explicit Site(DType dtype) {
    for (int64_t n = 0; n < kN; ++n) {
      sources.emplace_back(dtype, kT, kD).fill(rng);
      dsources.emplace_back(dtype, kT, kD);
    }
    for (int64_t s = 0; s < kS; ++s) {
      out.emplace_back(dtype, kT, kD).fill(rng);
    }
    for (Tensor* value : {&partial, &update, &x, &mix, &total, &dpartial}) {
      *value = Tensor(dtype, kT, kD);
      value->fill(rng);
    }
    for (Tensor* rows : {&queries, &key_weight, &folded, &dqueries}) {
      *rows = Tensor(DType::kFloat32, kS, kD);
      rows->fill(rng, 0.05);
    }
    lse = Tensor(DType::kFloat32, kS, kT);
    norm_weight = Tensor(DType::kFloat32, 1, kD);
    norm_weight.fill(rng);
    dnorm_weight = Tensor(DType::kFloat32, 1, kD);
    dquery = Tensor(DType::kFloat32, 1, kD);
    inv_rms = Tensor(DType::kFloat32, kT, kN + 2);
    logits = Tensor(DType::kFloat32, kT, kS * kN);
    mix_inv_rms = Tensor(DType::kFloat32, 1, kT);
    dlse = Tensor(DType::kFloat32, 1, kT);
    source_views = const_views(sources);
    out_views = views(out);
    dout_views = const_views(out);
    dsource_views = views(dsources);
    update_views = {update.view()};
  }

  Rng rng{1};
  Tensors sources, dsources, out;
  Tensor partial, update, x, mix, total, dpartial, queries, key_weight, folded, dqueries, lse;
  Tensor norm_weight, dnorm_weight, dquery, inv_rms, logits, mix_inv_rms, dlse;
  std::vector<ConstMatrix> source_views, dout_views, update_views;
  std::vector<Matrix> out_views, dsource_views;
};

/// The first `cols` columns, as statistics of so many terms.
Matrix columns(const Matrix& view, int64_t cols) {
  return {view.data, view.rows, cols, view.stride, view.dtype};
}
ConstMatrix row(const ConstMatrix& view, int64_t index) {
  const auto* data = static_cast<const float*>(view.data) + index * view.stride;
  return {data, 1, view.cols, view.stride, view.dtype};
}

class AllocationTest : public testing::TestWithParam<DType> {};

TEST_P(AllocationTest, TheCounterCounts) {
  EXPECT_EQ(allocated_by([] {
              ::operator delete(::operator new(8));  // which no compiler may leave out
              return Status();
            }),
            1);
}

TEST_P(AllocationTest, Attend) {
  Site site(GetParam());
  AttendArgs args;
  args.sources = site.source_views;
  args.queries = site.queries.view();
  args.out = site.out_views;
  args.lse = site.lse.view();
  args.logits = site.logits.view();
  args.inv_rms = columns(site.inv_rms.view(), kN);
  Workspace workspace(attend_workspace_bytes(args));
  const Context& context = workspace.context(&kInOrder);
  EXPECT_EQ(allocated_by([&] { return attend(args, context); }), 0);

  AttendBackwardArgs back;
  back.sources = site.source_views;
  back.queries = site.queries.view();
  back.lse = site.lse.view();
  back.logits = site.logits.view();
  back.inv_rms = columns(site.inv_rms.view(), kN);
  back.dout = site.dout_views;
  back.dsources = site.dsource_views;
  back.dqueries = site.dqueries.view();
  Workspace scratch(attend_backward_workspace_bytes(back));
  const Context& back_context = scratch.context(&kInOrder);
  EXPECT_EQ(allocated_by([&] { return attend_backward(back, back_context); }), 0);
  EXPECT_EQ(allocated_by([&] {
              attend_workspace_bytes(args);
              attend_backward_workspace_bytes(back);
              return Status();
            }),
            0);
}

TEST_P(AllocationTest, Read) {
  Site site(GetParam());
  constexpr int64_t kTerms = kN + 2;
  site.lse.fill(site.rng);
  ReadArgs args;
  args.phase1_out = site.out[0].view();
  args.phase1_lse = row(site.lse.view(), 0);
  args.sources = site.source_views;
  args.partial = site.partial.view();
  args.updates = site.update_views;
  args.query = row(site.queries.view(), 0);
  args.norm = OutputNorm::kRms;
  args.norm_weight = site.norm_weight.view();
  args.x = site.x.view();
  args.partial_out = site.total.view();
  args.mix = site.mix.view();
  args.logits = columns(site.logits.view(), kTerms);
  args.inv_rms = columns(site.inv_rms.view(), kTerms);
  args.mix_inv_rms = site.mix_inv_rms.view();
  Workspace workspace(read_workspace_bytes(args));
  const Context& context = workspace.context(&kInOrder);
  EXPECT_EQ(allocated_by([&] { return read(args, context); }), 0);

  ReadBackwardArgs back;
  back.phase1_out = args.phase1_out;
  back.sources = site.source_views;
  back.partial = site.total.view();
  back.query = args.query;
  back.norm = OutputNorm::kRms;
  back.norm_weight = site.norm_weight.view();
  back.logits = args.logits;
  back.inv_rms = args.inv_rms;
  back.mix_inv_rms = args.mix_inv_rms;
  back.dx = site.x.view();
  back.dphase1_out = site.out[1].view();
  back.dphase1_lse = site.dlse.view();
  back.dsources = site.dsource_views;
  back.dpartial = site.dpartial.view();
  back.dquery = site.dquery.view();
  back.dnorm_weight = site.dnorm_weight.view();
  Workspace scratch(read_backward_workspace_bytes(back));
  const Context& back_context = scratch.context(&kInOrder);
  EXPECT_EQ(allocated_by([&] { return read_backward(back, back_context); }), 0);
}

TEST_P(AllocationTest, FoldQuantizeAndStochasticAdd) {
  Site site(GetParam());
  EXPECT_EQ(allocated_by([&] {
              return fold_queries(site.queries.view(), site.key_weight.view(), site.folded.view());
            }),
            0);
  EXPECT_EQ(allocated_by([&] {
              return fold_queries_backward(site.queries.view(), site.key_weight.view(),
                                           site.folded.view(), site.dqueries.view(),
                                           site.folded.view());
            }),
            0);

  Context context;
  context.executor = &kInOrder;
  const std::vector<ConstMatrix> terms = {site.partial.view(), site.update.view()};
  Tensor stored(DType::kFloat8E4M3, kT, kD);
  Tensor scales(DType::kFloat8E8M0, kT, (kD + 127) / 128);
  const QuantizeArgs quantize_args = {terms, stored.view(), scales.view()};
  EXPECT_EQ(allocated_by([&] { return quantize(quantize_args, context); }), 0);

  Tensor sum(DType::kBFloat16, kT, kD);
  const int64_t seed[2] = {1, 0};
  StochasticAddArgs add_args;
  add_args.seed = seed;
  add_args.terms = terms;
  add_args.out = sum.view();
  EXPECT_EQ(allocated_by([&] { return stochastic_add(add_args, context); }), 0);
}

INSTANTIATE_TEST_SUITE_P(Storage, AllocationTest,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kFloat16));

}  // namespace
}  // namespace flash_attn_res
