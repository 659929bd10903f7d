// Two sublayers of one block, forward and backward, on a few tokens.
//
// The block reads two completed sources. Phase 1 (`attend`) serves both sublayers in one pass; the
// second sublayer then merges in what the first one has produced (`read`). The sublayers themselves
// are stand-ins: the first one's output is a given tensor.

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "flash_attn_res/flash_attn_res.h"

namespace {

namespace far = flash_attn_res;

constexpr int64_t kTokens = 4;   // T
constexpr int64_t kWidth = 8;    // D
constexpr int64_t kSources = 2;  // N
constexpr int64_t kQueries = 2;  // S

/// A float32 matrix that owns its memory.
class Tensor {
 public:
  Tensor(int64_t rows, int64_t cols)
      : data_(static_cast<size_t>(rows * cols)), rows_(rows), cols_(cols) {}

  /// Fills in numbers that look random and are the same everywhere.
  Tensor& fill(int seed) {
    for (size_t i = 0; i < data_.size(); ++i) {
      data_[i] = std::sin(1.7f * static_cast<float>(i) + static_cast<float>(seed));
    }
    return *this;
  }

  far::Matrix view() { return {data_.data(), rows_, cols_, cols_, far::DType::kFloat32}; }

  far::Matrix row(int64_t r) {
    return {&data_[static_cast<size_t>(r * cols_)], 1, cols_, cols_, far::DType::kFloat32};
  }

  void print(const char* name) const {
    std::printf("%s [%lld, %lld]\n", name, static_cast<long long>(rows_),
                static_cast<long long>(cols_));
    for (size_t i = 0; i < data_.size(); ++i) {
      std::printf(" %8.4f%s", data_[i], (i + 1) % static_cast<size_t>(cols_) == 0 ? "\n" : "");
    }
  }

 private:
  std::vector<float> data_;
  int64_t rows_;
  int64_t cols_;
};

/// Scratch memory, aligned as the library asks for.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : bytes_(bytes), memory_(std::aligned_alloc(64, static_cast<size_t>(bytes / 64 + 1) * 64)) {}
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  far::Context context() const { return {.workspace = memory_, .workspace_bytes = bytes_}; }

 private:
  int64_t bytes_;
  void* memory_;
};

/// Ends the program with the library's own words when a call has failed.
void check(const far::Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    std::exit(EXIT_FAILURE);
  }
}

}  // namespace

int main() {
  // Pseudo-queries and key weights are what a model learns; kernels see only their product.
  Tensor queries(kQueries, kWidth);
  Tensor key_weight(kQueries, kWidth);
  Tensor folded(kQueries, kWidth);
  check(far::fold_queries(queries.fill(1).view(), key_weight.fill(2).view(), folded.view()));

  Tensor embedding(kTokens, kWidth);
  Tensor block1(kTokens, kWidth);
  const std::array<far::ConstMatrix, kSources> sources = {embedding.fill(3).view(),
                                                          block1.fill(4).view()};

  // Phase 1: both sublayers of the block read the completed sources.
  Tensor out1(kTokens, kWidth);
  Tensor out2(kTokens, kWidth);
  Tensor lse(kQueries, kTokens);
  Tensor logits(kTokens, kQueries * kSources);
  Tensor inv_rms(kTokens, kSources);
  const std::array<far::Matrix, kQueries> outs = {out1.view(), out2.view()};
  const far::AttendArgs attend = {
      .sources = sources,
      .queries = folded.view(),
      .out = outs,
      .lse = lse.view(),
      .logits = logits.view(),
      .inv_rms = inv_rms.view(),
  };
  {
    const Workspace workspace(far::attend_workspace_bytes(attend));
    check(far::attend(attend, workspace.context()));
  }
  out1.print("input of sublayer 1, before its norm");

  // Phase 2 of the second sublayer: add what the first one produced to the block's sum, merge the
  // sum with the phase-1 result, and apply the sublayer's pre-norm, all in one call.
  Tensor partial(kTokens, kWidth);  // the sum so far: nothing
  Tensor update(kTokens, kWidth);   // output of sublayer 1
  Tensor x(kTokens, kWidth);
  Tensor read_logits(kTokens, 2);
  Tensor read_inv_rms(kTokens, 2);
  Tensor mix_inv_rms(1, kTokens);
  Tensor probs(kTokens, 2);
  const std::array<far::ConstMatrix, 1> updates = {update.fill(5).view()};
  const far::ReadArgs read = {
      .phase1_out = out2.view(),
      .phase1_lse = lse.row(1),
      .partial = partial.view(),
      .updates = updates,
      .query = folded.row(1),
      .norm = far::OutputNorm::kRms,
      .x = x.view(),
      .partial_out = partial.view(),  // in place
      .logits = read_logits.view(),
      .inv_rms = read_inv_rms.view(),
      .mix_inv_rms = mix_inv_rms.view(),
      .probs = probs.view(),
  };
  {
    const Workspace workspace(far::read_workspace_bytes(read));
    check(far::read(read, workspace.context()));
  }
  x.print("input of sublayer 2, normalised");
  probs.print("weight of the completed sources and of the block's own sum");

  // Backward of the read, for the loss sum(x * x_weight).
  Tensor dx(kTokens, kWidth);
  Tensor dh(kTokens, kWidth);
  Tensor gate(1, kTokens);
  Tensor dlse(kQueries, kTokens);  // row 0 stays zero: sublayer 1 uses its phase-1 result as it is
  Tensor dpartial(kTokens, kWidth);
  Tensor dquery(1, kWidth);
  const far::ReadBackwardArgs read_backward = {
      .phase1_out = out2.view(),
      .partial = partial.view(),
      .query = folded.row(1),
      .norm = far::OutputNorm::kRms,
      .logits = read_logits.view(),
      .inv_rms = read_inv_rms.view(),
      .mix_inv_rms = mix_inv_rms.view(),
      .dx = dx.fill(6).view(),
      .dphase1_lse = dlse.row(1),
      .dh = dh.view(),
      .gate = gate.view(),
      .dpartial = dpartial.view(),
      .dquery = dquery.view(),
  };
  {
    const Workspace workspace(far::read_backward_workspace_bytes(read_backward));
    check(far::read_backward(read_backward, workspace.context()));
  }
  dpartial.print("gradient of the output of sublayer 1");

  // Backward of phase 1. It takes dh with the scalar gate in place of a gradient tensor of its own.
  Tensor no_gradient(kTokens, kWidth);
  Tensor gates(kQueries, kTokens);
  for (int64_t t = 0; t < kTokens; ++t) {
    static_cast<float*>(gates.row(1).data)[t] = static_cast<const float*>(gate.view().data)[t];
  }
  Tensor dembedding(kTokens, kWidth);
  Tensor dblock1(kTokens, kWidth);
  Tensor dfolded(kQueries, kWidth);
  const std::array<far::ConstMatrix, kQueries> douts = {no_gradient.view(), dh.view()};
  const std::array<far::Matrix, kSources> dsources = {dembedding.view(), dblock1.view()};
  const far::AttendBackwardArgs attend_backward = {
      .sources = sources,
      .queries = folded.view(),
      .lse = lse.view(),
      .logits = logits.view(),
      .inv_rms = inv_rms.view(),
      .dout = douts,
      .gate = gates.view(),
      .dlse = dlse.view(),
      .dsources = dsources,
      .dqueries = dfolded.view(),
  };
  {
    const Workspace workspace(far::attend_backward_workspace_bytes(attend_backward));
    check(far::attend_backward(attend_backward, workspace.context()));
  }
  dembedding.print("gradient of the embedding");

  // Both parts of the gradient of query 2 (phase 1 and read), unfolded.
  float* dfolded2 = static_cast<float*>(dfolded.row(1).data);
  const float* from_read = static_cast<const float*>(dquery.view().data);
  for (int64_t i = 0; i < kWidth; ++i) {
    dfolded2[i] += from_read[i];
  }
  Tensor dqueries(kQueries, kWidth);
  Tensor dkey_weight(kQueries, kWidth);
  check(far::fold_queries_backward(queries.view(), key_weight.view(), dfolded.view(),
                                   dqueries.view(), dkey_weight.view()));
  dqueries.print("gradient of the pseudo-queries");
  return EXIT_SUCCESS;
}
