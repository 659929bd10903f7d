// The PyTorch operators flash_attn_res::{read_site, read_site_backward}: one site of a training
// stream, forward and backward, as flash_attn_res/tape calls them. They pick rows out of what a
// group of sites shares and make their results themselves: of a step with short kernels the host's
// part counts, and a tensor made or a row taken in Python costs as much as all that is done here.
//
// Shapes: values [..., D], T tokens in any number of dimensions; what a group shares: phase1_out
// [S, ..., D], phase1_lse, gate and dphase1_lse [S, T], of which the site has row `slot`; queries
// and dqueries [L + 1, R], of which it has row `site`. Without norm_weight there is no norm.
//
// statistics: logits [T, K], inv_rms [T, K] and, with a norm, mix_inv_rms [T], one after the other.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch/context.h"
#include "bindings/torch/convert.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::torch_binding {
namespace {

/// Where the parts of a site's statistics lie.
struct StatisticsMap {
  int64_t tokens, terms;
  bool norm;

  int64_t size() const { return tokens * (2 * terms + (norm ? 1 : 0)); }

  /// One of the two matrices [T, K].
  Matrix matrix(const Matrix& whole, int64_t index) const {
    return view(whole, index, tokens, terms);
  }
  /// mix_inv_rms [1, T], absent without a norm.
  Matrix of_mix(const Matrix& whole) const { return norm ? view(whole, 2, 1, tokens) : Matrix{}; }

 private:
  Matrix view(const Matrix& whole, int64_t index, int64_t rows, int64_t cols) const {
    char* const base = static_cast<char*>(whole.data);
    return {base + index * tokens * terms * size_of(whole.dtype), rows, cols, cols, whole.dtype};
  }
};

int64_t count_terms(const std::optional<Tensor>& phase1_out, const std::vector<Tensor>& sources,
                    bool has_total) {
  return (phase1_out.has_value() ? 1 : 0) + static_cast<int64_t>(sources.size()) +
         (has_total ? 1 : 0);
}

std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>> read_site_op(
    std::optional<Tensor> phase1_out, std::optional<Tensor> phase1_lse, int64_t slot,
    std::vector<Tensor> sources, std::vector<Tensor> source_scales, std::optional<Tensor> partial,
    std::optional<Tensor> update, Tensor queries, int64_t site, std::optional<Tensor> norm_weight,
    double scale, double eps, double norm_eps, ScalarType dtype, ScalarType sum_dtype, bool keep) {
  STD_TORCH_CHECK(phase1_out.has_value() || !sources.empty() || partial.has_value(),
                  "flash_attn_res: read_site: no value was given: expected at least one of "
                  "phase1_out, sources and partial");
  const Tensor& like = phase1_out.has_value() ? *phase1_out
                       : partial.has_value()  ? *partial
                                              : sources[0];
  const IntHeaderOnlyArrayRef all = like.sizes();
  const size_t stacked = phase1_out.has_value() ? 1 : 0;
  const IntHeaderOnlyArrayRef shape(all.data() + stacked, all.size() - stacked);

  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  std::vector<ConstMatrix> update_views;
  std::optional<Tensor> total;
  if (update.has_value()) {
    update_views.push_back(views.read_value(*update));
    total = empty(like, shape, sum_dtype);
  }
  const Tensor x = empty(like, shape, dtype);

  ReadArgs args;
  if (phase1_out.has_value()) {
    args.phase1_out = slot_view("phase1_out", *phase1_out, slot);
    args.phase1_lse = row_view("phase1_lse", *phase1_lse, slot);
  }
  args.sources = source_views;
  args.source_scales = scale_views;
  args.partial = views.read_value(partial);
  args.updates = update_views;
  args.scale = scale;
  args.eps = eps;
  args.norm = norm_weight.has_value() ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.norm_eps = norm_eps;
  args.x = write_value(x);
  args.partial_out = write_value(total);
  const StatisticsMap map{args.x.rows, count_terms(phase1_out, sources, partial.has_value()),
                          norm_weight.has_value()};
  if (map.terms > 1) {
    args.query = row_view("queries", queries, site);
  }
  std::optional<Tensor> statistics;
  if (keep) {
    statistics = empty(like, {map.size()}, queries.scalar_type());
    const Matrix whole = write_view(*statistics);
    args.logits = map.matrix(whole, 0);
    args.inv_rms = map.matrix(whole, 1);
    args.mix_inv_rms = map.of_mix(whole);
  }

  const CallContext context(x, read_workspace_bytes(args, device_of(x)));
  check(read(args, context.get()));
  return {x, total, statistics};
}

/// With `gate` and `dphase1_lse` dh takes the place of the site's row of phase1_out. Results that
/// were not asked for are empty: PyTorch knows no operator that both writes to its arguments and
/// may return nothing.
std::tuple<Tensor, Tensor> read_site_backward_op(
    std::optional<Tensor> dx, std::optional<Tensor> dtotal, std::optional<Tensor> phase1_out,
    std::optional<Tensor> gate, std::optional<Tensor> dphase1_lse, int64_t slot,
    std::vector<Tensor> sources, std::vector<Tensor> source_scales, std::optional<Tensor> total,
    Tensor queries, int64_t site, std::optional<Tensor> norm_weight, Tensor statistics,
    double scale, std::vector<Tensor> dsources, bool accumulate_dsources, bool need_total,
    std::optional<Tensor> dqueries, bool need_weight) {
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  const std::vector<Matrix> dsource_views = write_values(dsources);

  ReadBackwardArgs args;
  if (phase1_out.has_value()) {
    args.phase1_out = slot_view("phase1_out", *phase1_out, slot);
    if (gate.has_value()) {
      args.dh = slot_view("phase1_out", *phase1_out, slot);
      args.gate = row_view("gate", *gate, slot);
      args.dphase1_lse = row_view("dphase1_lse", *dphase1_lse, slot);
    }
  }
  args.sources = source_views;
  args.source_scales = scale_views;
  args.partial = views.read_value(total);
  args.scale = scale;
  args.norm = norm_weight.has_value() ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.dx = views.read_value(dx);
  args.dpartial_out = views.read_value(dtotal);
  args.dsources = dsource_views;
  args.accumulate_dsources = accumulate_dsources;

  const ConstMatrix& some = args.partial.present()      ? args.partial
                            : args.phase1_out.present() ? args.phase1_out
                            : source_views.empty()      ? args.partial
                                                        : source_views[0];
  const StatisticsMap map{some.rows, count_terms(phase1_out, sources, total.has_value()),
                          norm_weight.has_value()};
  STD_TORCH_CHECK(
      statistics.dim() == 1 && statistics.is_contiguous() && statistics.numel() == map.size(),
      "flash_attn_res: read_site_backward: statistics has ", statistics.numel(),
      " elements, expected a contiguous vector of ", map.size());
  const Matrix whole = write_view(statistics);
  args.logits = map.matrix(whole, 0);
  args.inv_rms = map.matrix(whole, 1);
  args.mix_inv_rms = map.of_mix(whole);
  if (map.terms > 1) {
    args.query = row_view("queries", queries, site);
    if (dqueries.has_value()) {
      args.dquery = row_view("dqueries", *dqueries, site);
      args.accumulate_dquery = true;
    }
  }
  const auto gradient_of = [&](const std::optional<Tensor>& input, bool needed) {
    return needed && input.has_value() ? empty(*input, input->sizes(), input->scalar_type())
                                       : nothing(statistics, statistics.scalar_type());
  };
  const Tensor dpartial = gradient_of(total, need_total);
  if (need_total && total.has_value()) {
    args.dpartial = write_value(dpartial);
  }
  const Tensor dnorm_weight = gradient_of(norm_weight, need_weight);
  if (need_weight && norm_weight.has_value()) {
    args.dnorm_weight = write_view(dnorm_weight);
  }

  const CallContext context(statistics, read_backward_workspace_bytes(args, device_of(statistics)));
  check(read_backward(args, context.get()));
  return {dpartial, dnorm_weight};
}

void implement(auto& library) {
  library.impl("read_site", TORCH_BOX(&read_site_op));
  library.impl("read_site_backward", TORCH_BOX(&read_site_backward_op));
}

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_res, m) {
  m.def(
      "read_site(Tensor? phase1_out, Tensor? phase1_lse, int slot, Tensor[] sources,"
      " Tensor[] source_scales, Tensor? partial, Tensor? update, Tensor queries, int site,"
      " Tensor? norm_weight, float scale, float eps, float norm_eps, ScalarType dtype,"
      " ScalarType sum_dtype, bool keep) -> (Tensor x, Tensor? total, Tensor? statistics)");
  m.def(
      "read_site_backward(Tensor? dx, Tensor? dtotal, Tensor(a!)? phase1_out, Tensor(b!)? gate,"
      " Tensor(c!)? dphase1_lse, int slot, Tensor[] sources, Tensor[] source_scales,"
      " Tensor? total, Tensor queries, int site, Tensor? norm_weight, Tensor statistics,"
      " float scale, Tensor(d!)[] dsources, bool accumulate_dsources, bool need_total,"
      " Tensor(e!)? dqueries, bool need_weight) -> (Tensor dpartial, Tensor dnorm_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CPU, m) { flash_attn_res::torch_binding::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CUDA, m) { flash_attn_res::torch_binding::implement(m); }
