// The PyTorch operators flash_attn_res::{attend, attend_backward, read, read_backward}, and the
// same four as `..._into`, which write (or add) to tensors that are given.
//
// The first four have functional schemas: every result is a fresh tensor. Fake (meta)
// implementations and autograd formulas are Python, in python/flash_attn_res/ops.py, since the
// stable ABI has no C++ autograd. The `_into` operators have no autograd: the training stream is
// made of them. Their values are [..., D], tokens in any number of dimensions, none packed. They
// also take quantised sources: float16 or float8_e4m3fn with source_scales [..., 1] or
// [..., ceil(D / 128)], one for each source, or none: uint8, the bits of float8_e8m0fnu.
//
// Shapes: a value is [T, D]; items of `sources` may also be packed [n, T, D], with any strides but
// in the last dimension. Statistics: lse [S, T], logits [T, S, N] or [T, K], inv_rms [T, N] or
// [T, K], mix_inv_rms [T]. Results that were not asked for come back as empty tensors.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch/context.h"
#include "bindings/torch/convert.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::torch_binding {
namespace {

/// Item `index` of a list of values, or null.
const Tensor* first_of(const std::vector<Tensor>& list) {
  return list.empty() ? nullptr : &list.front();
}

const Tensor* pointer_to(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

/// The value that a read takes its device and default dtype from.
const Tensor& leading_value(std::initializer_list<const Tensor*> candidates) {
  for (const Tensor* candidate : candidates) {
    if (candidate != nullptr) {
      return *candidate;
    }
  }
  STD_TORCH_CHECK(false,
                  "flash_attn_res: read: no value was given: expected at least one of phase1_out, "
                  "sources, partial and updates");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_op(std::vector<Tensor> sources, Tensor queries,
                                                     double scale, double eps,
                                                     std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(!sources.empty(), "flash_attn_res: attend: sources has 0 items");
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_list(sources);
  STD_TORCH_CHECK(!source_views.empty(), "flash_attn_res: attend: sources has 0 items");
  const Tensor& like = sources[0];
  const ScalarType statistics = statistics_type(like);

  AttendArgs args;
  args.sources = source_views;
  args.queries = views.read(queries);
  args.scale = scale;
  args.eps = eps;
  const int64_t S = args.queries.rows;
  const int64_t N = static_cast<int64_t>(source_views.size());
  const int64_t T = source_views[0].rows;
  const int64_t D = source_views[0].cols;

  Tensor out = empty(like, {S, T, D}, dtype.value_or(like.scalar_type()));
  Tensor lse = empty(like, {S, T}, statistics);
  Tensor logits = empty(like, {T, S, N}, statistics);
  Tensor inv_rms = empty(like, {T, N}, statistics);
  const std::vector<Matrix> out_views = write_list({out});
  args.out = out_views;
  args.lse = write_view(lse);
  args.logits = write_view(logits, T, S * N);
  args.inv_rms = write_view(inv_rms);

  const CallContext context(like, attend_workspace_bytes(args, device_of(like)));
  check(attend(args, context.get()));
  return {out, lse, logits, inv_rms};
}

std::tuple<std::vector<Tensor>, Tensor> attend_backward_op(
    std::optional<Tensor> dout, std::optional<Tensor> dlse, std::optional<Tensor> gate,
    std::vector<Tensor> sources, Tensor queries, Tensor lse, Tensor logits, Tensor inv_rms,
    double scale, bool need_sources, bool need_queries) {
  STD_TORCH_CHECK(!sources.empty(), "flash_attn_res: attend_backward: sources has 0 items");
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_list(sources);
  const std::vector<ConstMatrix> dout_views = views.read_stack(dout);
  const Tensor& like = sources[0];

  AttendBackwardArgs args;
  args.sources = source_views;
  args.queries = views.read(queries);
  args.scale = scale;
  args.lse = views.read(lse);
  const Tensor dense_logits = torch::stable::contiguous(logits);
  args.logits = read_view(dense_logits, logits.size(0), logits.size(1) * logits.size(2));
  args.inv_rms = views.read(inv_rms);
  args.dout = dout_views;
  args.gate = views.read(gate);
  args.dlse = views.read(dlse);

  const std::vector<Tensor> dsources =
      need_sources ? empty_like_list(sources) : std::vector<Tensor>{};
  const std::vector<Matrix> dsource_views = write_list(dsources);
  args.dsources = dsource_views;
  Tensor dqueries = nothing(like, statistics_type(like));
  if (need_queries) {
    dqueries = empty(like, {args.queries.rows, args.queries.cols}, statistics_type(like));
    args.dqueries = write_view(dqueries);
  }

  const CallContext context(like, attend_backward_workspace_bytes(args, device_of(like)));
  check(attend_backward(args, context.get()));
  return {dsources, dqueries};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> read_op(
    std::optional<Tensor> phase1_out, std::optional<Tensor> phase1_lse, std::vector<Tensor> sources,
    std::optional<Tensor> partial, std::vector<Tensor> updates, std::optional<Tensor> query,
    std::optional<Tensor> norm_weight, double scale, double eps, bool norm, double norm_eps,
    bool round_mix, bool return_mix, std::optional<ScalarType> dtype) {
  const Tensor& like = leading_value(
      {pointer_to(phase1_out), first_of(sources), pointer_to(partial), first_of(updates)});
  const ScalarType statistics = statistics_type(like);
  const ScalarType x_type = dtype.value_or(like.scalar_type());
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_list(sources);
  const std::vector<ConstMatrix> update_views = views.read_list(updates);

  ReadArgs args;
  args.phase1_out = views.read(phase1_out);
  args.phase1_lse = views.read(phase1_lse);
  args.sources = source_views;
  args.partial = views.read(partial);
  args.updates = update_views;
  args.query = views.read(query);
  args.scale = scale;
  args.eps = eps;
  args.norm = norm ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.norm_eps = norm_eps;
  args.mix_rounding = round_mix ? MixRounding::kStorage : MixRounding::kFloat32;

  const int64_t T = like.size(like.dim() - 2);
  const int64_t D = like.size(like.dim() - 1);
  const int64_t K = read_terms(args);
  Tensor x = empty(like, {T, D}, x_type);
  Tensor logits = empty(like, {T, K}, statistics);
  Tensor inv_rms = empty(like, {T, K}, statistics);
  args.x = write_view(x);
  args.logits = write_view(logits);
  args.inv_rms = write_view(inv_rms);

  const ScalarType sum_type = partial.has_value()
                                  ? partial->scalar_type()
                                  : (updates.empty() ? x_type : updates.front().scalar_type());
  Tensor partial_out = nothing(like, sum_type);
  if (!updates.empty()) {
    partial_out = empty(like, {T, D}, sum_type);
    args.partial_out = write_view(partial_out);
  }
  Tensor mix = nothing(like, x_type);
  if (return_mix) {
    mix = empty(like, {T, D}, x_type);
    args.mix = write_view(mix);
  }
  Tensor mix_inv_rms = nothing(like, statistics);
  if (norm) {
    mix_inv_rms = empty(like, {T}, statistics);
    args.mix_inv_rms = write_view(mix_inv_rms);
  }

  const CallContext context(like, read_workspace_bytes(args, device_of(like)));
  check(read(args, context.get()));
  return {x, partial_out, mix, logits, inv_rms, mix_inv_rms};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor> read_backward_op(
    std::optional<Tensor> dx, std::optional<Tensor> dpartial_out, std::optional<Tensor> dmix,
    std::optional<Tensor> phase1_out, std::vector<Tensor> sources, std::optional<Tensor> partial,
    std::optional<Tensor> query, std::optional<Tensor> norm_weight, Tensor logits, Tensor inv_rms,
    Tensor mix_inv_rms, double scale, bool norm, bool round_mix, bool need_phase1,
    bool need_sources, bool need_partial, bool need_query, bool need_norm_weight) {
  const Tensor& like =
      leading_value({pointer_to(phase1_out), first_of(sources), pointer_to(partial)});
  const ScalarType statistics = statistics_type(like);
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_list(sources);

  ReadBackwardArgs args;
  args.phase1_out = views.read(phase1_out);
  args.sources = source_views;
  args.partial = views.read(partial);
  args.query = views.read(query);
  args.scale = scale;
  args.norm = norm ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.mix_rounding = round_mix ? MixRounding::kStorage : MixRounding::kFloat32;
  args.logits = views.read(logits);
  args.inv_rms = views.read(inv_rms);
  if (norm) {
    args.mix_inv_rms = views.read(mix_inv_rms);
  }
  args.dx = views.read(dx);
  args.dmix = views.read(dmix);
  args.dpartial_out = views.read(dpartial_out);

  const int64_t T = like.size(like.dim() - 2);
  const int64_t D = like.size(like.dim() - 1);
  Tensor dphase1_out = nothing(like, like.scalar_type());
  Tensor dphase1_lse = nothing(like, statistics);
  if (need_phase1 && phase1_out.has_value()) {
    dphase1_out = empty(like, {T, D}, phase1_out->scalar_type());
    dphase1_lse = empty(like, {T}, statistics);
    args.dphase1_out = write_view(dphase1_out);
    args.dphase1_lse = write_view(dphase1_lse);
  }
  const std::vector<Tensor> dsources =
      need_sources ? empty_like_list(sources) : std::vector<Tensor>{};
  const std::vector<Matrix> dsource_views = write_list(dsources);
  args.dsources = dsource_views;
  Tensor dpartial = nothing(like, like.scalar_type());
  if (need_partial && partial.has_value()) {
    dpartial = empty(like, {T, D}, partial->scalar_type());
    args.dpartial = write_view(dpartial);
  }
  Tensor dquery = nothing(like, statistics);
  if (need_query && query.has_value()) {
    dquery = empty(like, {args.query.cols}, statistics);
    args.dquery = write_view(dquery);
  }
  Tensor dnorm_weight = nothing(like, like.scalar_type());
  if (need_norm_weight && norm_weight.has_value()) {
    dnorm_weight = empty(like, {D}, norm_weight->scalar_type());
    args.dnorm_weight = write_view(dnorm_weight);
  }

  const CallContext context(like, read_backward_workspace_bytes(args, device_of(like)));
  check(read_backward(args, context.get()));
  return {dphase1_out, dphase1_lse, dsources, dpartial, dquery, dnorm_weight};
}

// ---------------------------------------------------------------------- into what is given

void attend_into_op(std::vector<Tensor> sources, Tensor queries, double scale, double eps,
                    Tensor out, Tensor lse, Tensor logits, Tensor inv_rms,
                    std::vector<Tensor> source_scales) {
  STD_TORCH_CHECK(!sources.empty(), "flash_attn_res: attend_into: sources has 0 items");
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  const std::vector<Matrix> out_views = write_slots(out);

  AttendArgs args;
  args.sources = source_views;
  args.source_scales = scale_views;
  args.queries = views.read(queries);
  args.scale = scale;
  args.eps = eps;
  args.out = out_views;
  args.lse = strided_view("lse", lse);
  args.logits = write_rows(logits);
  args.inv_rms = strided_view("inv_rms", inv_rms);

  const CallContext context(sources[0], attend_workspace_bytes(args, device_of(sources[0])));
  check(attend(args, context.get()));
}

void attend_backward_into_op(Tensor dout, std::optional<Tensor> dlse, std::optional<Tensor> gate,
                             std::vector<Tensor> sources, Tensor queries, Tensor lse, Tensor logits,
                             Tensor inv_rms, double scale, std::vector<Tensor> dsources,
                             bool accumulate_dsources, std::optional<Tensor> dqueries,
                             bool accumulate_dqueries, std::vector<Tensor> source_scales) {
  STD_TORCH_CHECK(!sources.empty(), "flash_attn_res: attend_backward_into: sources has 0 items");
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  const std::vector<ConstMatrix> dout_views = views.read_slots(dout);
  const std::vector<Matrix> dsource_views = write_values(dsources);

  AttendBackwardArgs args;
  args.sources = source_views;
  args.source_scales = scale_views;
  args.queries = views.read(queries);
  args.scale = scale;
  args.lse = views.read(lse);
  args.logits = views.read_rows(logits);
  args.inv_rms = views.read(inv_rms);
  args.dout = dout_views;
  args.gate = views.read(gate);
  args.dlse = views.read(dlse);
  args.dsources = dsource_views;
  args.accumulate_dsources = accumulate_dsources;
  args.dqueries = strided_view("dqueries", dqueries);
  args.accumulate_dqueries = accumulate_dqueries;

  const CallContext context(sources[0],
                            attend_backward_workspace_bytes(args, device_of(sources[0])));
  check(attend_backward(args, context.get()));
}

void read_into_op(std::optional<Tensor> phase1_out, std::optional<Tensor> phase1_lse,
                  std::vector<Tensor> sources, std::optional<Tensor> partial,
                  std::optional<Tensor> update, std::optional<Tensor> query,
                  std::optional<Tensor> norm_weight, double scale, double eps, bool norm,
                  double norm_eps, Tensor x, std::optional<Tensor> partial_out, Tensor logits,
                  Tensor inv_rms, std::optional<Tensor> mix_inv_rms,
                  std::vector<Tensor> source_scales) {
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  std::vector<ConstMatrix> update_views;
  if (update.has_value()) {
    update_views.push_back(views.read_value(*update));
  }

  ReadArgs args;
  args.phase1_out = views.read_value(phase1_out);
  args.phase1_lse = views.read(phase1_lse);
  args.sources = source_views;
  args.source_scales = scale_views;
  args.partial = views.read_value(partial);
  args.updates = update_views;
  args.query = views.read(query);
  args.scale = scale;
  args.eps = eps;
  args.norm = norm ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.norm_eps = norm_eps;
  args.x = write_value(x);
  args.partial_out = write_value(partial_out);
  args.logits = strided_view("logits", logits);
  args.inv_rms = strided_view("inv_rms", inv_rms);
  args.mix_inv_rms = strided_view("mix_inv_rms", mix_inv_rms);

  const CallContext context(x, read_workspace_bytes(args, device_of(x)));
  check(read(args, context.get()));
}

void read_backward_into_op(std::optional<Tensor> dx, std::optional<Tensor> dpartial_out,
                           std::optional<Tensor> phase1_out, std::vector<Tensor> sources,
                           std::optional<Tensor> partial, std::optional<Tensor> query,
                           std::optional<Tensor> norm_weight, Tensor logits, Tensor inv_rms,
                           std::optional<Tensor> mix_inv_rms, double scale, bool norm,
                           std::optional<Tensor> dh, std::optional<Tensor> gate,
                           std::optional<Tensor> dphase1_lse, std::vector<Tensor> dsources,
                           bool accumulate_dsources, std::optional<Tensor> dpartial,
                           std::optional<Tensor> dquery, bool accumulate_dquery,
                           std::optional<Tensor> dnorm_weight, std::vector<Tensor> source_scales) {
  Views views;
  const std::vector<ConstMatrix> source_views = views.read_values(sources);
  const std::vector<ConstMatrix> scale_views = views.read_values(source_scales);
  const std::vector<Matrix> dsource_views = write_values(dsources);

  ReadBackwardArgs args;
  args.phase1_out = views.read_value(phase1_out);
  args.sources = source_views;
  args.source_scales = scale_views;
  args.partial = views.read_value(partial);
  args.query = views.read(query);
  args.scale = scale;
  args.norm = norm ? OutputNorm::kRms : OutputNorm::kNone;
  args.norm_weight = views.read(norm_weight);
  args.logits = views.read(logits);
  args.inv_rms = views.read(inv_rms);
  args.mix_inv_rms = views.read(mix_inv_rms);
  args.dx = views.read_value(dx);
  args.dpartial_out = views.read_value(dpartial_out);
  args.dh = write_value(dh);
  args.gate = strided_view("gate", gate);
  args.dphase1_lse = strided_view("dphase1_lse", dphase1_lse);
  args.dsources = dsource_views;
  args.accumulate_dsources = accumulate_dsources;
  args.dpartial = write_value(dpartial);
  args.dquery = strided_view("dquery", dquery);
  args.accumulate_dquery = accumulate_dquery;
  args.dnorm_weight = strided_view("dnorm_weight", dnorm_weight);

  const CallContext context(logits, read_backward_workspace_bytes(args, device_of(logits)));
  check(read_backward(args, context.get()));
}

/// One implementation serves both devices: the library chooses the backend by Context::device.
void implement(auto& library) {
  library.impl("attend", TORCH_BOX(&attend_op));
  library.impl("attend_backward", TORCH_BOX(&attend_backward_op));
  library.impl("read", TORCH_BOX(&read_op));
  library.impl("read_backward", TORCH_BOX(&read_backward_op));
  library.impl("attend_into", TORCH_BOX(&attend_into_op));
  library.impl("attend_backward_into", TORCH_BOX(&attend_backward_into_op));
  library.impl("read_into", TORCH_BOX(&read_into_op));
  library.impl("read_backward_into", TORCH_BOX(&read_backward_into_op));
}

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY(flash_attn_res, m) {
  m.def(
      "attend(Tensor[] sources, Tensor queries, float scale, float eps, ScalarType? dtype)"
      " -> (Tensor out, Tensor lse, Tensor logits, Tensor inv_rms)");
  m.def(
      "attend_backward(Tensor? dout, Tensor? dlse, Tensor? gate, Tensor[] sources, Tensor queries,"
      " Tensor lse, Tensor logits, Tensor inv_rms, float scale, bool need_sources,"
      " bool need_queries) -> (Tensor[] dsources, Tensor dqueries)");
  m.def(
      "read(Tensor? phase1_out, Tensor? phase1_lse, Tensor[] sources, Tensor? partial,"
      " Tensor[] updates, Tensor? query, Tensor? norm_weight, float scale, float eps, bool norm,"
      " float norm_eps, bool round_mix, bool return_mix, ScalarType? dtype)"
      " -> (Tensor x, Tensor partial_out, Tensor mix, Tensor logits, Tensor inv_rms,"
      " Tensor mix_inv_rms)");
  m.def(
      "read_backward(Tensor? dx, Tensor? dpartial_out, Tensor? dmix, Tensor? phase1_out,"
      " Tensor[] sources, Tensor? partial, Tensor? query, Tensor? norm_weight, Tensor logits,"
      " Tensor inv_rms, Tensor mix_inv_rms, float scale, bool norm, bool round_mix,"
      " bool need_phase1, bool need_sources, bool need_partial, bool need_query,"
      " bool need_norm_weight) -> (Tensor dphase1_out, Tensor dphase1_lse, Tensor[] dsources,"
      " Tensor dpartial, Tensor dquery, Tensor dnorm_weight)");

  m.def(
      "attend_into(Tensor[] sources, Tensor queries, float scale, float eps, Tensor(a!) out,"
      " Tensor(b!) lse, Tensor(c!) logits, Tensor(d!) inv_rms, Tensor[] source_scales) -> ()");
  m.def(
      "attend_backward_into(Tensor dout, Tensor? dlse, Tensor? gate, Tensor[] sources,"
      " Tensor queries, Tensor lse, Tensor logits, Tensor inv_rms, float scale,"
      " Tensor(a!)[] dsources, bool accumulate_dsources, Tensor(b!)? dqueries,"
      " bool accumulate_dqueries, Tensor[] source_scales) -> ()");
  m.def(
      "read_into(Tensor? phase1_out, Tensor? phase1_lse, Tensor[] sources, Tensor? partial,"
      " Tensor? update, Tensor? query, Tensor? norm_weight, float scale, float eps, bool norm,"
      " float norm_eps, Tensor(a!) x, Tensor(b!)? partial_out, Tensor(c!) logits,"
      " Tensor(d!) inv_rms, Tensor(e!)? mix_inv_rms, Tensor[] source_scales) -> ()");
  m.def(
      "read_backward_into(Tensor? dx, Tensor? dpartial_out, Tensor? phase1_out,"
      " Tensor[] sources, Tensor? partial, Tensor? query, Tensor? norm_weight, Tensor logits,"
      " Tensor inv_rms, Tensor? mix_inv_rms, float scale, bool norm, Tensor(a!)? dh,"
      " Tensor(b!)? gate, Tensor(c!)? dphase1_lse, Tensor(d!)[] dsources,"
      " bool accumulate_dsources, Tensor(e!)? dpartial, Tensor(f!)? dquery,"
      " bool accumulate_dquery, Tensor(g!)? dnorm_weight, Tensor[] source_scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CPU, m) { flash_attn_res::torch_binding::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CUDA, m) { flash_attn_res::torch_binding::implement(m); }
