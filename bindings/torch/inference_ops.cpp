// The PyTorch operators flash_attn_res::{attend_out, read_out}: attend and read into memory of the
// caller's, without gradients, for inference. With a workspace nothing is allocated, so that a call
// can be captured into a CUDA graph and replayed.
//
// flash_attn_res::{attend_out_workspace, read_out_workspace} take the same tensors and say how many
// bytes of workspace such a call needs.
//
// Shapes as in ops.cpp. Results may have any row stride, for example rows of a bank [T, N, D]; x
// may be float8_e4m3fn, with x_scale [T, 1] or [T, ceil(D / 128)] float32; so may be sources, or
// float16, with source_scales [T, 1] or [T, ceil(D / 128)] uint8 (the bits of float8_e8m0fnu),
// packed like the sources.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bindings/torch/context.h"
#include "bindings/torch/convert.h"
#include "flash_attn_res/attend.h"
#include "flash_attn_res/read.h"

namespace flash_attn_res::torch_binding {
namespace {

/// Scratch memory of one call: the caller's, or a tensor of the size asked for.
CallContext context_of(const Tensor& like, const std::optional<Tensor>& workspace, int64_t bytes) {
  if (!workspace.has_value()) {
    return {like, bytes};
  }
  STD_TORCH_CHECK(workspace->scalar_type() == ScalarType::Byte && workspace->is_contiguous(),
                  "flash_attn_res: workspace must be a contiguous uint8 tensor");
  return {like, *workspace};
}

/// Arguments of one attend, with the views that they point to.
class AttendCall {
 public:
  AttendCall(const std::vector<Tensor>& sources, const std::vector<Tensor>& source_scales,
             const Tensor& queries, double scale, double eps, const Tensor& out, const Tensor& lse)
      : sources_(views_.read_list(sources)), source_scales_(views_.read_list(source_scales)) {
    STD_TORCH_CHECK(!sources_.empty(), "flash_attn_res: attend_out: sources has 0 items");
    STD_TORCH_CHECK(out.dim() == 3, "flash_attn_res: attend_out: out has ", out.dim(),
                    " dimensions, expected [S, T, D]");
    STD_TORCH_CHECK(out.size(2) <= 1 || out.stride(2) == 1,
                    "flash_attn_res: attend_out: out has rows that are not dense");
    const int64_t cols = out.size(2);
    const DType dtype = dtype_of(out.scalar_type());
    auto* base = static_cast<char*>(out.mutable_data_ptr());
    for (int64_t s = 0; s < out.size(0); ++s) {
      out_.push_back({base + s * out.stride(0) * size_of(dtype), out.size(1), cols,
                      row_stride(out, 1, cols), dtype});
    }
    args_.sources = sources_;
    args_.source_scales = source_scales_;
    args_.queries = views_.read(queries);
    args_.scale = scale;
    args_.eps = eps;
    args_.out = out_;
    args_.lse = strided_view("lse", lse);
  }
  AttendCall(const AttendCall&) = delete;
  AttendCall& operator=(const AttendCall&) = delete;

  const AttendArgs& args() const { return args_; }

 private:
  Views views_;
  std::vector<ConstMatrix> sources_;
  std::vector<ConstMatrix> source_scales_;
  std::vector<Matrix> out_;
  AttendArgs args_;
};

void attend_out_op(std::vector<Tensor> sources, std::vector<Tensor> source_scales, Tensor queries,
                   double scale, double eps, Tensor out, Tensor lse,
                   std::optional<Tensor> workspace) {
  const AttendCall call(sources, source_scales, queries, scale, eps, out, lse);
  const int64_t bytes =
      workspace.has_value() ? 0 : attend_workspace_bytes(call.args(), device_of(out));
  check(attend(call.args(), context_of(out, workspace, bytes).get()));
}

int64_t attend_out_workspace_op(std::vector<Tensor> sources, std::vector<Tensor> source_scales,
                                Tensor queries, double scale, double eps, Tensor out, Tensor lse) {
  const AttendCall call(sources, source_scales, queries, scale, eps, out, lse);
  return attend_workspace_bytes(call.args(), device_of(out));
}

/// Arguments of one read, with the views that they point to.
class ReadCall {
 public:
  ReadCall(const std::optional<Tensor>& phase1_out, const std::optional<Tensor>& phase1_lse,
           const std::vector<Tensor>& sources, const std::vector<Tensor>& source_scales,
           const std::optional<Tensor>& partial, const std::vector<Tensor>& updates,
           const std::optional<Tensor>& query, const std::optional<Tensor>& norm_weight,
           double scale, double eps, bool norm, double norm_eps, bool round_mix,
           bool power_of_two_scale, const Tensor& x, const std::optional<Tensor>& x_scale,
           const std::optional<Tensor>& partial_out, const std::optional<Tensor>& snapshot,
           const std::optional<Tensor>& mix, const std::optional<Tensor>& probs)
      : sources_(views_.read_list(sources)),
        source_scales_(views_.read_list(source_scales)),
        updates_(views_.read_list(updates)) {
    args_.phase1_out = views_.read(phase1_out);
    args_.phase1_lse = views_.read(phase1_lse);
    args_.sources = sources_;
    args_.source_scales = source_scales_;
    args_.partial = views_.read(partial);
    args_.updates = updates_;
    args_.query = views_.read(query);
    args_.scale = scale;
    args_.eps = eps;
    args_.norm = norm ? OutputNorm::kRms : OutputNorm::kNone;
    args_.norm_weight = views_.read(norm_weight);
    args_.norm_eps = norm_eps;
    args_.mix_rounding = round_mix ? MixRounding::kStorage : MixRounding::kFloat32;
    args_.scale_rounding = power_of_two_scale ? ScaleRounding::kPowerOfTwo : ScaleRounding::kNone;
    args_.x = strided_view("x", x);
    args_.x_scale = strided_view("x_scale", x_scale);
    args_.partial_out = strided_view("partial_out", partial_out);
    args_.snapshot = strided_view("snapshot", snapshot);
    args_.mix = strided_view("mix", mix);
    args_.probs = strided_view("probs", probs);
  }
  ReadCall(const ReadCall&) = delete;
  ReadCall& operator=(const ReadCall&) = delete;

  const ReadArgs& args() const { return args_; }

 private:
  Views views_;
  std::vector<ConstMatrix> sources_;
  std::vector<ConstMatrix> source_scales_;
  std::vector<ConstMatrix> updates_;
  ReadArgs args_;
};

void read_out_op(std::optional<Tensor> phase1_out, std::optional<Tensor> phase1_lse,
                 std::vector<Tensor> sources, std::vector<Tensor> source_scales,
                 std::optional<Tensor> partial, std::vector<Tensor> updates,
                 std::optional<Tensor> query, std::optional<Tensor> norm_weight, double scale,
                 double eps, bool norm, double norm_eps, bool round_mix, bool power_of_two_scale,
                 Tensor x, std::optional<Tensor> x_scale, std::optional<Tensor> partial_out,
                 std::optional<Tensor> snapshot, std::optional<Tensor> mix,
                 std::optional<Tensor> probs, std::optional<Tensor> workspace) {
  const ReadCall call(phase1_out, phase1_lse, sources, source_scales, partial, updates, query,
                      norm_weight, scale, eps, norm, norm_eps, round_mix, power_of_two_scale, x,
                      x_scale, partial_out, snapshot, mix, probs);
  const int64_t bytes = workspace.has_value() ? 0 : read_workspace_bytes(call.args(), device_of(x));
  check(read(call.args(), context_of(x, workspace, bytes).get()));
}

int64_t read_out_workspace_op(std::optional<Tensor> phase1_out, std::optional<Tensor> phase1_lse,
                              std::vector<Tensor> sources, std::vector<Tensor> source_scales,
                              std::optional<Tensor> partial, std::vector<Tensor> updates,
                              std::optional<Tensor> query, std::optional<Tensor> norm_weight,
                              double scale, double eps, bool norm, double norm_eps, bool round_mix,
                              bool power_of_two_scale, Tensor x, std::optional<Tensor> x_scale,
                              std::optional<Tensor> partial_out, std::optional<Tensor> snapshot,
                              std::optional<Tensor> mix, std::optional<Tensor> probs) {
  const ReadCall call(phase1_out, phase1_lse, sources, source_scales, partial, updates, query,
                      norm_weight, scale, eps, norm, norm_eps, round_mix, power_of_two_scale, x,
                      x_scale, partial_out, snapshot, mix, probs);
  return read_workspace_bytes(call.args(), device_of(x));
}

void implement(auto& library) {
  library.impl("attend_out", TORCH_BOX(&attend_out_op));
  library.impl("attend_out_workspace", TORCH_BOX(&attend_out_workspace_op));
  library.impl("read_out", TORCH_BOX(&read_out_op));
  library.impl("read_out_workspace", TORCH_BOX(&read_out_workspace_op));
}

}  // namespace
}  // namespace flash_attn_res::torch_binding

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_res, m) {
  m.def(
      "attend_out(Tensor[] sources, Tensor[] source_scales, Tensor queries, float scale, float "
      "eps, Tensor(a!) out,"
      " Tensor(b!) lse, Tensor(c!)? workspace) -> ()");
  m.def(
      "attend_out_workspace(Tensor[] sources, Tensor[] source_scales, Tensor queries, float scale, "
      "float eps, Tensor out,"
      " Tensor lse) -> int");
  m.def(
      "read_out(Tensor? phase1_out, Tensor? phase1_lse, Tensor[] sources, Tensor[] source_scales,"
      " Tensor? partial,"
      " Tensor[] updates, Tensor? query, Tensor? norm_weight, float scale, float eps, bool norm,"
      " float norm_eps, bool round_mix, bool power_of_two_scale, Tensor(a!) x,"
      " Tensor(b!)? x_scale, Tensor(c!)? partial_out, Tensor(d!)? snapshot, Tensor(e!)? mix,"
      " Tensor(f!)? probs, Tensor(g!)? workspace) -> ()");
  m.def(
      "read_out_workspace(Tensor? phase1_out, Tensor? phase1_lse, Tensor[] sources,"
      " Tensor[] source_scales, Tensor? partial, Tensor[] updates, Tensor? query, Tensor? "
      "norm_weight, float scale,"
      " float eps, bool norm, float norm_eps, bool round_mix, bool power_of_two_scale, Tensor x,"
      " Tensor? x_scale, Tensor? partial_out, Tensor? snapshot, Tensor? mix, Tensor? probs)"
      " -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CPU, m) { flash_attn_res::torch_binding::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(flash_attn_res, CUDA, m) { flash_attn_res::torch_binding::implement(m); }
