#include "residual_stream.h"

#include <algorithm>
#include <utility>

#include "weights_file.h"

namespace decoder {

void check(const far::Status& status) {
  if (!status.ok()) {
    throw Error(status.message());
  }
}

ResidualStream::ResidualStream(Device& device, Sites sites, int64_t max_tokens, far::DType dtype)
    : device_(device), sites_(std::move(sites)), max_tokens_(max_tokens) {
  const int64_t D = sites_.norms.cols;
  const int64_t S = sites_.block_size;
  sum_ = device.tensor(max_tokens, D, dtype);
  x_ = device.tensor(max_tokens, D, dtype);
  if (S > 0) {
    const int64_t blocks = (sites_.sublayers + S - 1) / S;
    bank_ = device.tensor(blocks * max_tokens, D, dtype);
    out_ = device.tensor(S * max_tokens, D, dtype);
    lse_ = device.tensor(S, max_tokens, far::DType::kFloat32);
  }
}

far::Matrix ResidualStream::start(int64_t tokens) {
  tokens_ = tokens;
  site_ = 0;
  pending_.clear();
  return sites_.block_size > 0 ? row(0) : sum_.first(tokens);
}

far::Matrix ResidualStream::read() {
  const int64_t S = sites_.block_size;
  const int64_t site = site_++;
  const bool boundary = S > 0 && site % S == 0 && site < sites_.sublayers;
  const int64_t block = S > 0 ? std::min(site, sites_.sublayers - 1) / S : 0;
  // Behind a boundary the sum begins with the one output that is pending.
  const bool begins = S > 0 && site > 0 && (site - 1) % S == 0;

  std::vector<far::ConstMatrix> sources;
  far::ReadArgs args;
  args.eps = args.norm_eps = sites_.eps;
  args.norm = far::OutputNorm::kRms;
  args.norm_weight = sites_.norms.slice(site, 1);
  args.x = x_.first(tokens_);
  args.updates = pending_;
  if (S > 0) {
    args.query = sites_.queries.slice(site, 1);
  }
  if (S > 0 && site == 0) {
    sources = rows(1);
  } else if (boundary) {
    sources = rows(block);
  } else if (S > 0) {
    const int64_t position = site - block * S - 1;  // among the sites behind the boundary
    args.phase1_out = out_.slice(position * max_tokens_, tokens_);
    args.phase1_lse = {static_cast<float*>(lse_.data.get()) + position * max_tokens_, 1, tokens_,
                       tokens_, far::DType::kFloat32};
  }
  args.sources = sources;
  if (S == 0 || site > 0) {
    args.partial = begins ? far::ConstMatrix{} : sum_.first(tokens_);
  }
  if (!pending_.empty()) {
    args.partial_out = boundary ? row(block) : sum_.first(tokens_);
  }
  check(far::read(args, context(far::read_workspace_bytes(args, device_.library_device()))));
  pending_.clear();
  if (boundary) {
    read_sources_later(block);
  }
  return x_.first(tokens_);
}

/// Phase 1: the bank's rows 0..block, for all sites that read exactly those.
void ResidualStream::read_sources_later(int64_t block) {
  const int64_t first = block * sites_.block_size + 1;
  const int64_t count = std::min(sites_.block_size, sites_.sublayers - first + 1);
  const std::vector<far::ConstMatrix> sources = rows(block + 1);
  std::vector<far::Matrix> outs;
  for (int64_t s = 0; s < count; ++s) {
    outs.push_back(out_.slice(s * max_tokens_, tokens_));
  }
  far::AttendArgs args;
  args.sources = sources;
  args.queries = sites_.queries.slice(first, count);
  args.eps = sites_.eps;
  args.out = outs;
  args.lse = {lse_.data.get(), count, tokens_, max_tokens_, far::DType::kFloat32};
  check(far::attend(args, context(far::attend_workspace_bytes(args, device_.library_device()))));
}

std::vector<far::ConstMatrix> ResidualStream::rows(int64_t count) const {
  std::vector<far::ConstMatrix> views;
  for (int64_t n = 0; n < count; ++n) {
    views.push_back(row(n));
  }
  return views;
}

far::Context ResidualStream::context(int64_t workspace_bytes) {
  if (workspace_.cols < workspace_bytes) {
    workspace_ = {device_.allocate(workspace_bytes), 1, workspace_bytes, far::DType::kNone};
  }
  return {.device = device_.library_device(),
          .stream = device_.library_stream(),
          .workspace = workspace_.data.get(),
          .workspace_bytes = workspace_.cols};
}

}  // namespace decoder
