// The C functions: copy the C structs into the C++ ones, call, keep the message. No arithmetic, and
// no check that the C++ side makes as well.

#include "flash_attn_res/c_api.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "flash_attn_res/attend.h"
#include "flash_attn_res/fold.h"
#include "flash_attn_res/quantize.h"
#include "flash_attn_res/read.h"
#include "flash_attn_res/stochastic.h"

namespace flash_attn_res {
namespace {

// The C enumerations carry the values of the C++ ones.
static_assert(FLASH_ATTN_RES_OK == static_cast<int32_t>(StatusCode::kOk));
static_assert(FLASH_ATTN_RES_INVALID_ARGUMENT ==
              static_cast<int32_t>(StatusCode::kInvalidArgument));
static_assert(FLASH_ATTN_RES_WORKSPACE_TOO_SMALL ==
              static_cast<int32_t>(StatusCode::kWorkspaceTooSmall));
static_assert(FLASH_ATTN_RES_UNSUPPORTED_DEVICE ==
              static_cast<int32_t>(StatusCode::kUnsupportedDevice));
static_assert(FLASH_ATTN_RES_CUDA_ERROR == static_cast<int32_t>(StatusCode::kCudaError));
static_assert(FLASH_ATTN_RES_DTYPE_NONE == static_cast<int32_t>(DType::kNone));
static_assert(FLASH_ATTN_RES_FLOAT32 == static_cast<int32_t>(DType::kFloat32));
static_assert(FLASH_ATTN_RES_BFLOAT16 == static_cast<int32_t>(DType::kBFloat16));
static_assert(FLASH_ATTN_RES_FLOAT16 == static_cast<int32_t>(DType::kFloat16));
static_assert(FLASH_ATTN_RES_FLOAT64 == static_cast<int32_t>(DType::kFloat64));
static_assert(FLASH_ATTN_RES_CPU == static_cast<int32_t>(DeviceType::kCpu));
static_assert(FLASH_ATTN_RES_CUDA == static_cast<int32_t>(DeviceType::kCuda));
static_assert(FLASH_ATTN_RES_NORM_NONE == static_cast<int32_t>(OutputNorm::kNone));
static_assert(FLASH_ATTN_RES_NORM_RMS == static_cast<int32_t>(OutputNorm::kRms));
static_assert(FLASH_ATTN_RES_MIX_FLOAT32 == static_cast<int32_t>(MixRounding::kFloat32));
static_assert(FLASH_ATTN_RES_MIX_STORAGE == static_cast<int32_t>(MixRounding::kStorage));
static_assert(FLASH_ATTN_RES_SCALE_NONE == static_cast<int32_t>(ScaleRounding::kNone));
static_assert(FLASH_ATTN_RES_SCALE_POWER_OF_TWO ==
              static_cast<int32_t>(ScaleRounding::kPowerOfTwo));
static_assert(FLASH_ATTN_RES_FLOAT8_E4M3 == static_cast<int32_t>(DType::kFloat8E4M3));
static_assert(FLASH_ATTN_RES_FLOAT8_E8M0 == static_cast<int32_t>(DType::kFloat8E8M0));

// Structs grow at the end and by whole members: trailing padding would let a new member hide in the
// struct_size of an old caller.
static_assert(offsetof(flash_attn_res_context, executor) + sizeof(void*) ==
              sizeof(flash_attn_res_context));
static_assert(offsetof(flash_attn_res_attend_args, num_source_scales) + sizeof(int64_t) ==
              sizeof(flash_attn_res_attend_args));
static_assert(offsetof(flash_attn_res_attend_backward_args, num_source_scales) + sizeof(int64_t) ==
              sizeof(flash_attn_res_attend_backward_args));
static_assert(offsetof(flash_attn_res_read_args, num_source_scales) + sizeof(int64_t) ==
              sizeof(flash_attn_res_read_args));
static_assert(offsetof(flash_attn_res_read_backward_args, num_source_scales) + sizeof(int64_t) ==
              sizeof(flash_attn_res_read_backward_args));
static_assert(offsetof(flash_attn_res_quantize_args, scale) + sizeof(flash_attn_res_matrix) ==
              sizeof(flash_attn_res_quantize_args));

static_assert(offsetof(flash_attn_res_stochastic_add_args, out) + sizeof(flash_attn_res_matrix) ==
              sizeof(flash_attn_res_stochastic_add_args));

std::string& last_error() {
  thread_local std::string message;
  return message;
}

/// Keeps the message for flash_attn_res_last_error and returns the code.
flash_attn_res_status report(const Status& status) {
  if (!status.ok()) {
    last_error() = status.message();
  }
  return static_cast<flash_attn_res_status>(status.code());
}

/// No exception may cross into C. The only one there is comes from building a message.
template <class Function>
flash_attn_res_status guarded(Function&& function) {
  try {
    return report(function());
  } catch (const std::bad_alloc&) {
    return FLASH_ATTN_RES_OUT_OF_MEMORY;
  }
}

Status invalid(const char* op, const std::string& what) {
  return {StatusCode::kInvalidArgument, std::string(op) + ": " + what};
}

// ------------------------------------------------------------------------------------ C to C++

ConstMatrix to_cpp(const flash_attn_res_const_matrix& view) {
  return {view.data, view.rows, view.cols, view.stride, static_cast<DType>(view.dtype)};
}

Matrix to_cpp(const flash_attn_res_matrix& view) {
  return {view.data, view.rows, view.cols, view.stride, static_cast<DType>(view.dtype)};
}

Device to_cpp(const flash_attn_res_device& device) {
  return {static_cast<DeviceType>(device.type), device.index};
}

/// A list of views on the stack: the library does not allocate. Elements beyond the count are never
/// constructed, so that short lists cost little.
template <class View, int64_t kCapacity>
class ViewList {
 public:
  /// Copies `count` views. On failure nothing is kept and the status names the list.
  template <class CView>
  Status assign(const char* op, const char* name, const CView* views, int64_t count) {
    if (count < 0) {
      return invalid(
          op, "num_" + std::string(name) + " is " + std::to_string(count) + ", expected 0 or more");
    }
    if (count > kCapacity) {
      return invalid(op, "num_" + std::string(name) + " is " + std::to_string(count) +
                             ", expected at most " + std::to_string(kCapacity));
    }
    if (count > 0 && views == nullptr) {
      return invalid(
          op, std::string(name) + " is null, but num_" + name + " is " + std::to_string(count));
    }
    for (int64_t i = 0; i < count; ++i) {
      std::construct_at(data() + i, to_cpp(views[i]));
    }
    count_ = static_cast<size_t>(count);
    return {};
  }

  std::span<const View> span() { return {data(), count_}; }

 private:
  View* data() { return reinterpret_cast<View*>(storage_); }

  alignas(View) std::byte storage_[sizeof(View) * kCapacity];
  size_t count_ = 0;
};

/// Copies as much of a caller's struct as the caller has, over the defaults. `T` has struct_size
/// as its first member; `minimum` is the struct's size in version 0.1, the first one.
template <class T>
Status copy_struct(const char* op, const char* name, const T* from, size_t minimum, T& to) {
  if (from == nullptr) {
    return invalid(op, std::string(name) + " is null");
  }
  const size_t size = from->struct_size;
  if (size < minimum) {
    return invalid(op, std::string(name) + "->struct_size is " + std::to_string(size) +
                           ", expected at least " + std::to_string(minimum) +
                           "; start from the struct that flash_attn_res_default_... returns");
  }
  // A program built with a newer header may run on this library as long as it uses nothing new.
  const auto* bytes = reinterpret_cast<const std::byte*>(from);
  if (size > sizeof(T) && !std::all_of(bytes + sizeof(T), bytes + size,
                                       [](std::byte b) { return b == std::byte{0}; })) {
    return invalid(op, std::string(name) + " sets a member that this library, version " +
                           FLASH_ATTN_RES_VERSION_STRING + ", does not have");
  }
  std::memcpy(&to, from, std::min(size, sizeof(T)));
  return {};
}

/// A context with its executor, which has to live as long as the call.
struct CallContext {
  Context context;
  Executor executor;
};

Status read_context(const char* op, const flash_attn_res_context* from, CallContext& to) {
  if (from == nullptr) {
    return {};
  }
  flash_attn_res_context given = flash_attn_res_default_context();
  if (Status status = copy_struct(op, "context", from, sizeof(given), given); !status.ok()) {
    return status;
  }
  to.context = {to_cpp(given.device), given.stream, given.workspace, given.workspace_bytes,
                nullptr};
  if (given.executor != nullptr) {
    to.executor = {given.executor->run, given.executor->pool};
    to.context.executor = &to.executor;
  }
  return {};
}

/// The first status that is not ok.
Status first_error(std::initializer_list<Status> statuses) {
  for (const Status& status : statuses) {
    if (!status.ok()) {
      return status;
    }
  }
  return {};
}

// Each of the following holds the C++ arguments of one operation and the lists that they point to.

struct Attend {
  using CArgs = flash_attn_res_attend_args;
  static constexpr const char* kName = "attend";
  static constexpr auto kWorkspaceBytes = &attend_workspace_bytes;
  static constexpr auto kRun = &attend;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_attend_args();
    constexpr size_t kFirstSize = offsetof(CArgs, source_scales);  // what came later is optional
    if (Status status = copy_struct(kName, "args", from, kFirstSize, c); !status.ok()) {
      return status;
    }
    Status status = first_error({
        sources.assign(kName, "sources", c.sources, c.num_sources),
        source_scales.assign(kName, "source_scales", c.source_scales, c.num_source_scales),
        out.assign(kName, "out", c.out, c.num_out),
    });
    args = {
        .sources = sources.span(),
        .source_scales = source_scales.span(),
        .queries = to_cpp(c.queries),
        .scale = c.scale,
        .eps = c.eps,
        .out = out.span(),
        .lse = to_cpp(c.lse),
        .logits = to_cpp(c.logits),
        .inv_rms = to_cpp(c.inv_rms),
        .probs = to_cpp(c.probs),
    };
    return status;
  }

  AttendArgs args;
  ViewList<ConstMatrix, kMaxSources> sources;
  ViewList<ConstMatrix, kMaxSources> source_scales;
  ViewList<Matrix, kMaxQueries> out;
};

struct AttendBackward {
  using CArgs = flash_attn_res_attend_backward_args;
  static constexpr const char* kName = "attend_backward";
  static constexpr auto kWorkspaceBytes = &attend_backward_workspace_bytes;
  static constexpr auto kRun = &attend_backward;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_attend_backward_args();
    constexpr size_t kFirstSize = offsetof(CArgs, source_scales);  // what came later is optional
    if (Status status = copy_struct(kName, "args", from, kFirstSize, c); !status.ok()) {
      return status;
    }
    Status status = first_error({
        sources.assign(kName, "sources", c.sources, c.num_sources),
        source_scales.assign(kName, "source_scales", c.source_scales, c.num_source_scales),
        dout.assign(kName, "dout", c.dout, c.num_dout),
        dsources.assign(kName, "dsources", c.dsources, c.num_dsources),
    });
    args = {
        .sources = sources.span(),
        .source_scales = source_scales.span(),
        .queries = to_cpp(c.queries),
        .scale = c.scale,
        .lse = to_cpp(c.lse),
        .logits = to_cpp(c.logits),
        .inv_rms = to_cpp(c.inv_rms),
        .dout = dout.span(),
        .gate = to_cpp(c.gate),
        .dlse = to_cpp(c.dlse),
        .dsources = dsources.span(),
        .accumulate_dsources = c.accumulate_dsources != 0,
        .dqueries = to_cpp(c.dqueries),
        .accumulate_dqueries = c.accumulate_dqueries != 0,
    };
    return status;
  }

  AttendBackwardArgs args;
  ViewList<ConstMatrix, kMaxSources> sources;
  ViewList<ConstMatrix, kMaxSources> source_scales;
  ViewList<ConstMatrix, kMaxQueries> dout;
  ViewList<Matrix, kMaxSources> dsources;
};

struct Read {
  using CArgs = flash_attn_res_read_args;
  static constexpr const char* kName = "read";
  static constexpr auto kWorkspaceBytes = &read_workspace_bytes;
  static constexpr auto kRun = &read;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_read_args();
    constexpr size_t kFirstSize = offsetof(CArgs, x_scale);  // what came later is optional
    if (Status status = copy_struct(kName, "args", from, kFirstSize, c); !status.ok()) {
      return status;
    }
    if (c.reserved != 0) {
      return invalid(kName, "reserved is " + std::to_string(c.reserved) + ", expected 0");
    }
    Status status = first_error({
        sources.assign(kName, "sources", c.sources, c.num_sources),
        source_scales.assign(kName, "source_scales", c.source_scales, c.num_source_scales),
        updates.assign(kName, "updates", c.updates, c.num_updates),
    });
    args = {
        .phase1_out = to_cpp(c.phase1_out),
        .phase1_lse = to_cpp(c.phase1_lse),
        .sources = sources.span(),
        .source_scales = source_scales.span(),
        .partial = to_cpp(c.partial),
        .updates = updates.span(),
        .query = to_cpp(c.query),
        .scale = c.scale,
        .eps = c.eps,
        .norm = static_cast<OutputNorm>(c.norm),
        .norm_weight = to_cpp(c.norm_weight),
        .norm_eps = c.norm_eps,
        .mix_rounding = static_cast<MixRounding>(c.mix_rounding),
        .x = to_cpp(c.x),
        .partial_out = to_cpp(c.partial_out),
        .mix = to_cpp(c.mix),
        .logits = to_cpp(c.logits),
        .inv_rms = to_cpp(c.inv_rms),
        .mix_inv_rms = to_cpp(c.mix_inv_rms),
        .probs = to_cpp(c.probs),
        .x_scale = to_cpp(c.x_scale),
        .scale_rounding = static_cast<ScaleRounding>(c.scale_rounding),
        .snapshot = to_cpp(c.snapshot),
    };
    return status;
  }

  ReadArgs args;
  ViewList<ConstMatrix, kMaxSources> sources;
  ViewList<ConstMatrix, kMaxSources> source_scales;
  ViewList<ConstMatrix, kMaxUpdates> updates;
};

struct ReadBackward {
  using CArgs = flash_attn_res_read_backward_args;
  static constexpr const char* kName = "read_backward";
  static constexpr auto kWorkspaceBytes = &read_backward_workspace_bytes;
  static constexpr auto kRun = &read_backward;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_read_backward_args();
    constexpr size_t kFirstSize = offsetof(CArgs, source_scales);  // what came later is optional
    if (Status status = copy_struct(kName, "args", from, kFirstSize, c); !status.ok()) {
      return status;
    }
    if (c.reserved != 0) {
      return invalid(kName, "reserved is " + std::to_string(c.reserved) + ", expected 0");
    }
    Status status = first_error({
        sources.assign(kName, "sources", c.sources, c.num_sources),
        source_scales.assign(kName, "source_scales", c.source_scales, c.num_source_scales),
        dsources.assign(kName, "dsources", c.dsources, c.num_dsources),
    });
    args = {
        .phase1_out = to_cpp(c.phase1_out),
        .sources = sources.span(),
        .source_scales = source_scales.span(),
        .partial = to_cpp(c.partial),
        .query = to_cpp(c.query),
        .scale = c.scale,
        .norm = static_cast<OutputNorm>(c.norm),
        .norm_weight = to_cpp(c.norm_weight),
        .mix_rounding = static_cast<MixRounding>(c.mix_rounding),
        .logits = to_cpp(c.logits),
        .inv_rms = to_cpp(c.inv_rms),
        .mix_inv_rms = to_cpp(c.mix_inv_rms),
        .dx = to_cpp(c.dx),
        .dmix = to_cpp(c.dmix),
        .dpartial_out = to_cpp(c.dpartial_out),
        .dphase1_out = to_cpp(c.dphase1_out),
        .dphase1_lse = to_cpp(c.dphase1_lse),
        .dh = to_cpp(c.dh),
        .gate = to_cpp(c.gate),
        .dsources = dsources.span(),
        .accumulate_dsources = c.accumulate_dsources != 0,
        .dpartial = to_cpp(c.dpartial),
        .dquery = to_cpp(c.dquery),
        .accumulate_dquery = c.accumulate_dquery != 0,
        .dnorm_weight = to_cpp(c.dnorm_weight),
        .accumulate_dnorm_weight = c.accumulate_dnorm_weight != 0,
    };
    return status;
  }

  ReadBackwardArgs args;
  ViewList<ConstMatrix, kMaxSources> sources;
  ViewList<ConstMatrix, kMaxSources> source_scales;
  ViewList<Matrix, kMaxSources> dsources;
};

struct StochasticAdd {
  using CArgs = flash_attn_res_stochastic_add_args;
  static constexpr const char* kName = "stochastic_add";
  static constexpr auto kRun = &stochastic_add;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_stochastic_add_args();
    if (Status status = copy_struct(kName, "args", from, sizeof(c), c); !status.ok()) {
      return status;
    }
    Status status = terms.assign(kName, "terms", c.terms, c.num_terms);
    args = {
        .terms = terms.span(),
        .seed = c.seed,
        .site = c.site,
        .out = to_cpp(c.out),
    };
    return status;
  }

  StochasticAddArgs args;
  ViewList<ConstMatrix, kMaxStochasticTerms> terms;
};

struct Quantize {
  using CArgs = flash_attn_res_quantize_args;
  static constexpr const char* kName = "quantize";
  static constexpr auto kRun = &quantize;

  Status assign(const CArgs* from) {
    CArgs c = flash_attn_res_default_quantize_args();
    if (Status status = copy_struct(kName, "args", from, sizeof(c), c); !status.ok()) {
      return status;
    }
    Status status = terms.assign(kName, "terms", c.terms, c.num_terms);
    args = {.terms = terms.span(), .out = to_cpp(c.out), .scale = to_cpp(c.scale)};
    return status;
  }

  QuantizeArgs args;
  ViewList<ConstMatrix, kMaxQuantizeTerms> terms;
};

template <class Operation>
int64_t workspace_bytes(const typename Operation::CArgs* args, flash_attn_res_device device) {
  Operation operation;
  const flash_attn_res_status status = guarded([&] { return operation.assign(args); });
  return status == FLASH_ATTN_RES_OK ? Operation::kWorkspaceBytes(operation.args, to_cpp(device))
                                     : -1;
}

template <class Operation>
flash_attn_res_status run(const typename Operation::CArgs* args,
                          const flash_attn_res_context* context) {
  return guarded([&]() -> Status {
    Operation operation;
    if (Status status = operation.assign(args); !status.ok()) {
      return status;
    }
    CallContext call;
    if (Status status = read_context(Operation::kName, context, call); !status.ok()) {
      return status;
    }
    return Operation::kRun(operation.args, call.context);
  });
}

/// A view that C passes by pointer; null is an absent one.
template <class CView>
auto view_or_absent(const CView* view) {
  return view == nullptr ? decltype(to_cpp(*view)){} : to_cpp(*view);
}

}  // namespace
}  // namespace flash_attn_res

namespace far = flash_attn_res;

extern "C" {

int32_t flash_attn_res_version(void) { return FLASH_ATTN_RES_VERSION; }

const char* flash_attn_res_version_string(void) { return FLASH_ATTN_RES_VERSION_STRING; }

const char* flash_attn_res_last_error(void) { return far::last_error().c_str(); }

int64_t flash_attn_res_attend_workspace_bytes(const flash_attn_res_attend_args* args,
                                              flash_attn_res_device device) {
  return far::workspace_bytes<far::Attend>(args, device);
}

flash_attn_res_status flash_attn_res_attend(const flash_attn_res_attend_args* args,
                                            const flash_attn_res_context* context) {
  return far::run<far::Attend>(args, context);
}

int64_t flash_attn_res_attend_backward_workspace_bytes(
    const flash_attn_res_attend_backward_args* args, flash_attn_res_device device) {
  return far::workspace_bytes<far::AttendBackward>(args, device);
}

flash_attn_res_status flash_attn_res_attend_backward(
    const flash_attn_res_attend_backward_args* args, const flash_attn_res_context* context) {
  return far::run<far::AttendBackward>(args, context);
}

int64_t flash_attn_res_read_workspace_bytes(const flash_attn_res_read_args* args,
                                            flash_attn_res_device device) {
  return far::workspace_bytes<far::Read>(args, device);
}

flash_attn_res_status flash_attn_res_read(const flash_attn_res_read_args* args,
                                          const flash_attn_res_context* context) {
  return far::run<far::Read>(args, context);
}

int64_t flash_attn_res_read_backward_workspace_bytes(const flash_attn_res_read_backward_args* args,
                                                     flash_attn_res_device device) {
  return far::workspace_bytes<far::ReadBackward>(args, device);
}

flash_attn_res_status flash_attn_res_read_backward(const flash_attn_res_read_backward_args* args,
                                                   const flash_attn_res_context* context) {
  return far::run<far::ReadBackward>(args, context);
}

flash_attn_res_status flash_attn_res_stochastic_add(const flash_attn_res_stochastic_add_args* args,
                                                    const flash_attn_res_context* context) {
  return far::run<far::StochasticAdd>(args, context);
}

flash_attn_res_status flash_attn_res_quantize(const flash_attn_res_quantize_args* args,
                                              const flash_attn_res_context* context) {
  return far::run<far::Quantize>(args, context);
}

flash_attn_res_status flash_attn_res_fold_queries(const flash_attn_res_const_matrix* queries,
                                                  const flash_attn_res_const_matrix* key_weight,
                                                  const flash_attn_res_matrix* folded) {
  return far::guarded([&] {
    return far::fold_queries(far::view_or_absent(queries), far::view_or_absent(key_weight),
                             far::view_or_absent(folded));
  });
}

flash_attn_res_status flash_attn_res_fold_queries_backward(
    const flash_attn_res_const_matrix* queries, const flash_attn_res_const_matrix* key_weight,
    const flash_attn_res_const_matrix* dfolded, const flash_attn_res_matrix* dqueries,
    const flash_attn_res_matrix* dkey_weight) {
  return far::guarded([&] {
    return far::fold_queries_backward(far::view_or_absent(queries), far::view_or_absent(key_weight),
                                      far::view_or_absent(dfolded), far::view_or_absent(dqueries),
                                      far::view_or_absent(dkey_weight));
  });
}

}  // extern "C"
