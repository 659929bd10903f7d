// From public arguments to kernels: chunks of tokens, scratch, threads, reduction.
//
// Workspace of a call, for C chunks:
//
//   chunk 0 scratch | chunk 1 scratch | ... | chunk C-1 scratch
//
// Every array of a chunk's scratch starts on a cache line; the layouts below are the only place
// that knows their order. Parts of parameter gradients lie in the chunks' scratch, one fixed
// distance apart, where the reduction finds them.

#include "cpu/backend.h"

#include <cstddef>

#include "common/validate.h"
#include "cpu/isa.h"
#include "cpu/kernels/params.h"
#include "cpu/parallel.h"
#include "cpu/policy.h"

namespace flash_attn_res::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

/// Hands out arrays one after the other. Without memory (base null) it just counts the bytes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<std::byte*>(base)) {}

  float* floats(int64_t count) {
    return static_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float))));
  }

  void* bytes(int64_t size) {
    void* const array = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (size + kCacheLine - 1) / kCacheLine * kCacheLine;
    return array;
  }

  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

/// A call's tokens in chunks, and the scratch of each.
struct Chunks {
  int64_t tokens;
  int64_t chunk;  // tokens of a chunk; the last one may have fewer
  int64_t count;
  int64_t scratch_bytes;  // of one chunk
  void* workspace;

  Chunks(const ChunkPolicy& policy, int64_t num_tokens, int64_t bytes, void* memory)
      : tokens(num_tokens),
        chunk(chunk_tokens(policy, num_tokens)),
        count(num_chunks(policy, num_tokens)),
        scratch_bytes(bytes),
        workspace(memory) {}

  void* scratch(int64_t i) const { return static_cast<std::byte*>(workspace) + i * scratch_bytes; }
  int64_t begin(int64_t i) const { return i * chunk; }
  int64_t end(int64_t i) const { return std::min(tokens, (i + 1) * chunk); }
  int64_t total_bytes() const { return count * scratch_bytes; }
};

/// Bytes of the elements of a view, for the choice between ordinary and streaming stores.
int64_t bytes_of(const ConstMatrix& view) { return view.rows * view.cols * size_of(view.dtype); }

template <class Views>
int64_t bytes_of_all(const Views& views) {
  return views.empty() ? 0 : static_cast<int64_t>(views.size()) * bytes_of(views[0]);
}

/// Floats of `rows` rows of `cols` columns in whole pieces.
int64_t packed_floats(int64_t rows, int64_t cols) {
  return rows * ((cols + kPiece - 1) / kPiece * kPiece);
}

/// result [rows, cols] = the chunks' parts, summed. `first_part` is that of chunk 0.
void reduce_parts(const Context& context, const Chunks& chunks, const float* first_part,
                  const Matrix& result, bool accumulate) {
  ReduceParams params = {};
  params.parts = first_part;
  params.num_parts = chunks.count;
  params.part_stride = chunks.scratch_bytes / static_cast<int64_t>(sizeof(float));
  params.result = result;
  params.accumulate = accumulate;
  const KernelTable& table = kernels();
  const int64_t pieces = (result.cols + kPiece - 1) / kPiece;
  for_each_task(context.executor, pieces, [&](int64_t piece) {
    for (int64_t row = 0; row < result.rows; ++row) {
      table.reduce(params, row, piece);
    }
  });
}

// ------------------------------------------------------------------------------------- attend

AttendScratch carve(const AttendArgs& args, Carver& carver) {
  const int64_t S = args.queries.rows;
  const int64_t N = static_cast<int64_t>(args.sources.size());
  AttendScratch scratch = {};
  scratch.logits = carver.floats(S * N);
  scratch.probs = carver.floats(S * N);
  scratch.inv_rms = carver.floats(N);
  scratch.lse = carver.floats(S);
  const int64_t R = args.queries.cols;
  scratch.queries = carver.floats(packed_floats(S, R));
  scratch.v_plain = carver.floats(packed_floats(N, args.sources[0].cols - R));
  scratch.v_key = carver.floats(packed_floats(N, R));
  return scratch;
}

Chunks chunks_of(const AttendArgs& args, void* workspace) {
  Carver carver(nullptr);
  carve(args, carver);
  return {kForwardChunks, args.sources[0].rows, carver.used(), workspace};
}

// ---------------------------------------------------------------------------- attend_backward

AttendBackwardScratch carve(const AttendBackwardArgs& args, Carver& carver) {
  const int64_t S = args.queries.rows;
  const int64_t N = static_cast<int64_t>(args.sources.size());
  AttendBackwardScratch scratch = {};
  const int64_t R = args.queries.cols;
  const int64_t plain = args.sources[0].cols - R;  // columns before the key slice
  scratch.dqueries = args.dqueries.present() ? carver.floats(packed_floats(S, R)) : nullptr;
  scratch.recent = args.dqueries.present() ? carver.floats(packed_floats(S, R)) : nullptr;
  scratch.queries = carver.floats(packed_floats(S, R));
  scratch.dh_plain = carver.floats(args.dout.empty() ? 0 : packed_floats(S, plain));
  scratch.dh_key = carver.floats(args.dout.empty() ? 0 : packed_floats(S, R));
  scratch.v_plain = carver.floats(args.dout.empty() ? 0 : packed_floats(N, plain));
  scratch.v_key = carver.floats(packed_floats(N, R));
  scratch.probs = carver.floats(S * N);
  scratch.dp = carver.floats(S * N);
  scratch.dp_plain = carver.floats(S * N);
  scratch.key_factor = carver.floats(N);
  return scratch;
}

Chunks chunks_of(const AttendBackwardArgs& args, void* workspace) {
  Carver carver(nullptr);
  carve(args, carver);
  return {kBackwardChunks, args.sources[0].rows, carver.used(), workspace};
}

// --------------------------------------------------------------------------------------- read

ReadScratch carve(const ReadArgs& args, Carver& carver) {
  const int64_t K = read_terms(args);
  const bool normed = args.norm == OutputNorm::kRms;
  ReadScratch scratch = {};
  scratch.logits = carver.floats(K);
  scratch.probs = carver.floats(K);
  scratch.inv_rms = carver.floats(K);
  scratch.query = carver.floats(args.query.present() ? packed_floats(1, args.query.cols) : 0);
  scratch.mix = carver.floats(normed ? packed_floats(1, args.x.cols) : 0);
  scratch.norm_weight = carver.floats(normed ? packed_floats(1, args.x.cols) : 0);
  scratch.x = carver.floats(args.x_scale.present() ? args.x.cols : 0);
  const Matrix& sum = args.partial_out.present() ? args.partial_out : args.snapshot;
  scratch.total = static_cast<unsigned char*>(carver.bytes(args.x.cols * size_of(sum.dtype)));
  return scratch;
}

Chunks chunks_of(const ReadArgs& args, void* workspace) {
  Carver carver(nullptr);
  carve(args, carver);
  return {kForwardChunks, args.x.rows, carver.used(), workspace};
}

// ------------------------------------------------------------------------------ read_backward

/// Any of the terms: they all are [T, D].
const ConstMatrix& any_term(const ReadBackwardArgs& args) {
  if (args.phase1_out.present()) {
    return args.phase1_out;
  }
  return args.sources.empty() ? args.partial : args.sources[0];
}

int64_t num_terms(const ReadBackwardArgs& args) {
  return (args.phase1_out.present() ? 1 : 0) + static_cast<int64_t>(args.sources.size()) +
         (args.partial.present() ? 1 : 0);
}

int64_t key_dim(const ConstMatrix& query, int64_t D) { return query.present() ? query.cols : D; }

ReadBackwardScratch carve(const ReadBackwardArgs& args, Carver& carver) {
  const int64_t K = num_terms(args);
  const int64_t D = any_term(args).cols;
  const bool normed = args.norm == OutputNorm::kRms;
  ReadBackwardScratch scratch = {};
  const int64_t query_floats = packed_floats(1, key_dim(args.query, D));
  scratch.dquery = args.dquery.present() ? carver.floats(query_floats) : nullptr;
  scratch.recent_query = args.dquery.present() ? carver.floats(query_floats) : nullptr;
  scratch.dnorm_weight = args.dnorm_weight.present() ? carver.floats(packed_floats(1, D)) : nullptr;
  scratch.recent_norm = args.dnorm_weight.present() ? carver.floats(packed_floats(1, D)) : nullptr;
  scratch.logits = carver.floats(K);
  scratch.probs = carver.floats(K);
  scratch.dp = carver.floats(K);
  scratch.key_factor = carver.floats(K);
  scratch.query = carver.floats(args.query.present() ? packed_floats(1, args.query.cols) : 0);
  scratch.mix = carver.floats(normed ? packed_floats(1, D) : 0);
  scratch.norm_weight = carver.floats(normed ? packed_floats(1, D) : 0);
  // One more piece: the last step that begins in the key slice may end after the row.
  scratch.dh = carver.floats(packed_floats(1, D) + kPiece);
  return scratch;
}

Chunks chunks_of(const ReadBackwardArgs& args, void* workspace) {
  Carver carver(nullptr);
  carve(args, carver);
  return {kBackwardChunks, any_term(args).rows, carver.used(), workspace};
}

}  // namespace

int64_t attend_workspace_bytes(const AttendArgs& args) {
  return chunks_of(args, nullptr).total_bytes();
}

Status attend(const AttendArgs& args, const Context& context) {
  AttendParams params = {};
  params.T = args.sources[0].rows;
  params.D = args.sources[0].cols;
  params.R = args.queries.cols;
  params.N = static_cast<int64_t>(args.sources.size());
  params.S = args.queries.rows;
  params.sources = args.sources.data();
  params.source_scales = args.source_scales.empty() ? nullptr : args.source_scales.data();
  params.queries = args.queries;
  params.scale = static_cast<float>(args.scale);
  params.eps = static_cast<float>(args.eps);
  params.out = args.out.data();
  params.lse = args.lse;
  params.logits = args.logits;
  params.inv_rms = args.inv_rms;
  params.probs = args.probs;
  params.stream = bytes_of_all(args.sources) + bytes_of_all(args.out) > kStreamBytes;

  const Chunks chunks = chunks_of(args, context.workspace);
  const KernelTable& table = kernels();
  for_each_task(context.executor, chunks.count, [&](int64_t i) {
    Carver carver(chunks.scratch(i));
    table.attend(params, carve(args, carver), chunks.begin(i), chunks.end(i));
  });
  return {};
}

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args) {
  return chunks_of(args, nullptr).total_bytes();
}

Status attend_backward(const AttendBackwardArgs& args, const Context& context) {
  AttendBackwardParams params = {};
  params.T = args.sources[0].rows;
  params.D = args.sources[0].cols;
  params.R = args.queries.cols;
  params.N = static_cast<int64_t>(args.sources.size());
  params.S = args.queries.rows;
  params.sources = args.sources.data();
  params.source_scales = args.source_scales.empty() ? nullptr : args.source_scales.data();
  params.queries = args.queries;
  params.scale = static_cast<float>(args.scale);
  params.lse = args.lse;
  params.logits = args.logits;
  params.inv_rms = args.inv_rms;
  params.dout = args.dout.empty() ? nullptr : args.dout.data();
  params.gate = args.gate;
  params.dlse = args.dlse;
  params.dsources = args.dsources.empty() ? nullptr : args.dsources.data();
  params.accumulate_dsources = args.accumulate_dsources;
  params.stream = bytes_of_all(args.sources) + bytes_of_all(args.dout) +
                      bytes_of_all(args.dsources) * (args.accumulate_dsources ? 2 : 1) >
                  kStreamBytes;

  const Chunks chunks = chunks_of(args, context.workspace);
  const KernelTable& table = kernels();
  for_each_task(context.executor, chunks.count, [&](int64_t i) {
    Carver carver(chunks.scratch(i));
    table.attend_backward(params, carve(args, carver), chunks.begin(i), chunks.end(i));
  });
  if (args.dqueries.present()) {
    Carver carver(context.workspace);
    reduce_parts(context, chunks, carve(args, carver).dqueries, args.dqueries,
                 args.accumulate_dqueries);
  }
  return {};
}

int64_t read_workspace_bytes(const ReadArgs& args) {
  return chunks_of(args, nullptr).total_bytes();
}

Status read(const ReadArgs& args, const Context& context) {
  ReadParams params = {};
  params.T = args.x.rows;
  params.D = args.x.cols;
  params.R = key_dim(args.query, args.x.cols);
  params.N = static_cast<int64_t>(args.sources.size());
  params.K = read_terms(args);
  params.phase1_out = args.phase1_out;
  params.phase1_lse = args.phase1_lse;
  params.sources = args.sources.data();
  params.source_scales = args.source_scales.empty() ? nullptr : args.source_scales.data();
  params.partial = args.partial;
  params.updates = args.updates.data();
  params.num_updates = static_cast<int64_t>(args.updates.size());
  params.query = args.query;
  params.scale = static_cast<float>(args.scale);
  params.eps = static_cast<float>(args.eps);
  params.normed = args.norm == OutputNorm::kRms;
  params.norm_weight = args.norm_weight;
  params.norm_eps = static_cast<float>(args.norm_eps);
  params.round_mix = args.mix_rounding == MixRounding::kStorage;
  params.mix_dtype = mix_dtype(args);
  params.x = args.x;
  params.x_scale = args.x_scale;
  params.power_of_two = args.scale_rounding == ScaleRounding::kPowerOfTwo;
  params.partial_out = args.partial_out;
  params.snapshot = args.snapshot;
  params.mix = args.mix;
  params.logits = args.logits;
  params.inv_rms = args.inv_rms;
  params.mix_inv_rms = args.mix_inv_rms;
  params.probs = args.probs;
  params.stream = bytes_of(args.phase1_out) + bytes_of_all(args.sources) + bytes_of(args.partial) +
                      bytes_of_all(args.updates) + bytes_of(args.x) + bytes_of(args.partial_out) +
                      bytes_of(args.snapshot) + bytes_of(args.mix) >
                  kStreamBytes;

  const Chunks chunks = chunks_of(args, context.workspace);
  const KernelTable& table = kernels();
  for_each_task(context.executor, chunks.count, [&](int64_t i) {
    Carver carver(chunks.scratch(i));
    table.read(params, carve(args, carver), chunks.begin(i), chunks.end(i));
  });
  return {};
}

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args) {
  return chunks_of(args, nullptr).total_bytes();
}

Status read_backward(const ReadBackwardArgs& args, const Context& context) {
  const ConstMatrix& term = any_term(args);
  ReadBackwardParams params = {};
  params.T = term.rows;
  params.D = term.cols;
  params.R = key_dim(args.query, term.cols);
  params.N = static_cast<int64_t>(args.sources.size());
  params.K = num_terms(args);
  params.phase1_out = args.phase1_out;
  params.sources = args.sources.data();
  params.source_scales = args.source_scales.empty() ? nullptr : args.source_scales.data();
  params.partial = args.partial;
  params.query = args.query;
  params.scale = static_cast<float>(args.scale);
  params.normed = args.norm == OutputNorm::kRms;
  params.norm_weight = args.norm_weight;
  params.round_mix = args.mix_rounding == MixRounding::kStorage;
  params.logits = args.logits;
  params.inv_rms = args.inv_rms;
  params.mix_inv_rms = args.mix_inv_rms;
  params.dx = args.dx;
  params.dmix = args.dmix;
  params.dpartial_out = args.dpartial_out;
  params.dphase1_out = args.dphase1_out;
  params.dphase1_lse = args.dphase1_lse;
  params.dh = args.dh;
  params.gate = args.gate;
  params.dsources = args.dsources.empty() ? nullptr : args.dsources.data();
  params.accumulate_dsources = args.accumulate_dsources;
  params.dpartial = args.dpartial;
  params.stream = bytes_of(args.phase1_out) + bytes_of_all(args.sources) + bytes_of(args.partial) +
                      bytes_of(args.dx) + bytes_of(args.dmix) + bytes_of(args.dpartial_out) +
                      bytes_of(args.dphase1_out) + bytes_of(args.dh) + bytes_of(args.dpartial) +
                      bytes_of_all(args.dsources) * (args.accumulate_dsources ? 2 : 1) >
                  kStreamBytes;

  const Chunks chunks = chunks_of(args, context.workspace);
  const KernelTable& table = kernels();
  for_each_task(context.executor, chunks.count, [&](int64_t i) {
    Carver carver(chunks.scratch(i));
    table.read_backward(params, carve(args, carver), chunks.begin(i), chunks.end(i));
  });
  Carver carver(context.workspace);
  const ReadBackwardScratch first = carve(args, carver);
  if (args.dquery.present()) {
    reduce_parts(context, chunks, first.dquery, args.dquery, args.accumulate_dquery);
  }
  if (args.dnorm_weight.present()) {
    reduce_parts(context, chunks, first.dnorm_weight, args.dnorm_weight,
                 args.accumulate_dnorm_weight);
  }
  return {};
}

Status quantize(const QuantizeArgs& args, const Context& context) {
  constexpr int64_t kTaskElements = 32768;  // enough to pay for handing out a task
  const QuantizeParams params = {args.out.rows,     args.out.cols,
                                 args.terms.data(), static_cast<int>(args.terms.size()),
                                 args.out,          args.scale};
  const KernelTable& table = kernels();
  const int64_t rows = std::max<int64_t>(1, kTaskElements / params.D);
  for_each_task(context.executor, (params.T + rows - 1) / rows, [&](int64_t i) {
    table.quantize(params, i * rows, std::min(params.T, (i + 1) * rows));
  });
  return {};
}

}  // namespace flash_attn_res::cpu
