#include "common/validate.h"

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

namespace flash_attn_res {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return "none";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kFloat8E8M0:
      return "float8_e8m0";
  }
  return "an unknown dtype";
}

namespace {

std::string shape_text(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

std::string shape_text(const ConstMatrix& view) { return shape_text(view.rows, view.cols); }

/// What an argument is called, an item of a list with its index: text is made for errors alone, so
/// that a call that is right allocates nothing.
struct Name {
  const char* argument;
  int64_t index = -1;

  Name(const char* name, int64_t item = -1) : argument(name), index(item) {}  // NOLINT: implicit
  std::string text() const {
    return index < 0 ? argument : argument + ("[" + std::to_string(index) + "]");
  }
};

std::string operator+(const Name& name, const std::string& text) { return name.text() + text; }
std::string operator+(const std::string& text, const Name& name) { return text + name.text(); }

Name item_name(const char* list, size_t index) { return {list, static_cast<int64_t>(index)}; }

enum class Presence { kRequired, kOptional };
enum class Access { kRead, kWrite };

/// Remembers the first thing that is wrong; later checks are skipped, so that each may rely on the
/// ones before it.
class Checker {
 public:
  Checker(const char* op, Precision precision) : op_(op), precision_(precision) {}

  bool ok() const { return status_.ok(); }
  Status take() { return status_; }

  void fail(const std::string& what) {
    if (ok()) {
      status_ = Status(StatusCode::kInvalidArgument, std::string(op_) + ": " + what);
    }
  }

  /// `text` is what is wrong, or a function that gives it.
  template <class Text>
  void require(bool condition, const Text& text) {
    if (condition || !ok()) {
      return;
    }
    if constexpr (std::is_invocable_v<Text>) {
      fail(text());
    } else {
      fail(text);
    }
  }

  /// A view of [rows, cols]; `axes` names the two, as in "[T, D]".
  void matrix(const Name& name, const ConstMatrix& view, int64_t rows, int64_t cols,
              const char* axes, Presence presence, Access access) {
    if (!ok()) {
      return;
    }
    if (!view.present()) {
      require(presence == Presence::kOptional, [&] {
        return name + " is missing, expected shape " + shape_text(rows, cols) + " (" + axes + ")";
      });
      return;
    }
    if (view.rows < 0 || view.cols < 0) {
      fail(name + " has shape " + shape_text(view) + ": a negative count");
    } else if (view.rows != rows || view.cols != cols) {
      fail(name + " has shape " + shape_text(view) + ", expected " + shape_text(rows, cols) + " (" +
           axes + ")");
    } else if (view.stride < 0 ||
               (access == Access::kWrite && view.rows > 1 && view.stride < view.cols)) {
      fail(name + " of shape " + shape_text(view) + " has row stride " +
           std::to_string(view.stride) +
           (access == Access::kWrite ? ", expected at least the row length" : ", expected >= 0"));
    } else if (view.data == nullptr && view.rows > 0 && view.cols > 0) {
      fail(name + " of shape " + shape_text(view) + " has a null data pointer");
    }
  }

  /// The dtype of a value tensor: storage dtypes, or float64 when the call is wide.
  void value_dtype(const Name& name, const ConstMatrix& view) {
    if (!ok() || !view.present()) {
      return;
    }
    if (precision_ == Precision::kWide) {
      require(view.dtype == DType::kFloat64, [&] {
        return name + " is " + name_of(view.dtype) + ", expected float64 like the other values";
      });
    } else {
      require(view.dtype == DType::kFloat32 || view.dtype == DType::kBFloat16 ||
                  view.dtype == DType::kFloat16,
              [&] {
                return name + " is " + name_of(view.dtype) +
                       ", expected float32, bfloat16 or float16";
              });
    }
  }

  /// The dtype of queries and statistics: float32, or float64 when the call is wide.
  void float_dtype(const Name& name, const ConstMatrix& view) {
    if (!ok() || !view.present()) {
      return;
    }
    const DType wanted = precision_ == Precision::kWide ? DType::kFloat64 : DType::kFloat32;
    require(view.dtype == wanted,
            [&] { return name + " is " + name_of(view.dtype) + ", expected " + name_of(wanted); });
  }

  void value(const Name& name, const ConstMatrix& view, int64_t rows, int64_t cols,
             const char* axes, Presence presence, Access access) {
    matrix(name, view, rows, cols, axes, presence, access);
    value_dtype(name, view);
  }

  void statistic(const Name& name, const ConstMatrix& view, int64_t rows, int64_t cols,
                 const char* axes, Presence presence, Access access) {
    matrix(name, view, rows, cols, axes, presence, access);
    float_dtype(name, view);
  }

  /// A list of [T, D] values that share one dtype.
  template <class View>
  void value_list(const char* name, std::span<const View> views, int64_t tokens, int64_t dim,
                  Access access) {
    for (int64_t i = 0; ok() && i < static_cast<int64_t>(views.size()); ++i) {
      const Name item = item_name(name, i);
      value(item, views[i], tokens, dim, "[T, D]", Presence::kRequired, access);
      require(views[i].dtype == views[0].dtype, [&] {
        return item + " is " + name_of(views[i].dtype) + " but " + item_name(name, 0) + " is " +
               name_of(views[0].dtype);
      });
    }
  }

  /// N sources [T, D] of one dtype, with a scale for each token or group, or as they stand.
  void source_list(std::span<const ConstMatrix> sources, std::span<const ConstMatrix> scales,
                   int64_t tokens, int64_t dim) {
    if (scales.empty()) {
      require(sources.empty() || sources[0].dtype != DType::kFloat8E4M3, [&] {
        return "sources[0] is float8_e4m3 but source_scales is empty, expected " +
               std::to_string(sources.size()) + " items of shape " + shape_text(tokens, 1) +
               " or " + shape_text(tokens, scale_groups(dim));
      });
      return value_list("sources", sources, tokens, dim, Access::kRead);
    }
    require(scales.size() == sources.size(), [&] {
      return "source_scales has " + std::to_string(scales.size()) + " items, expected " +
             std::to_string(sources.size()) + ", one for each source, or none";
    });
    for (size_t n = 0; ok() && n < sources.size(); ++n) {
      const Name item = item_name("sources", n);
      matrix(item, sources[n], tokens, dim, "[T, D]", Presence::kRequired, Access::kRead);
      quantized_dtype(item, sources[n]);
      require(sources[n].dtype == sources[0].dtype, [&] {
        return item + " is " + name_of(sources[n].dtype) + " but sources[0] is " +
               name_of(sources[0].dtype);
      });
      scale(item_name("source_scales", n), scales[n], tokens, dim, Access::kRead);
      require(scales[n].cols == scales[0].cols, [&] {
        return item_name("source_scales", n) + " has shape " + shape_text(scales[n]) +
               ", expected that of source_scales[0], " + shape_text(scales[0]);
      });
      require(tokens <= 1 || scales[n].stride == scales[0].stride, [&] {
        return item_name("source_scales", n) + " has row stride " +
               std::to_string(scales[n].stride) + ", expected that of source_scales[0], " +
               std::to_string(scales[0].stride);
      });
    }
  }

  /// The dtype of numbers that stand for values with their scales.
  void quantized_dtype(const Name& name, const ConstMatrix& view) {
    require(view.dtype == DType::kFloat16 || view.dtype == DType::kFloat8E4M3, [&] {
      return name + " is " + name_of(view.dtype) + " with scales, expected float16 or float8_e4m3";
    });
  }

  /// Powers of two: one for each token, or one for each group of columns.
  void scale(const Name& name, const ConstMatrix& view, int64_t tokens, int64_t dim,
             Access access) {
    matrix(name, view, tokens, view.cols == 1 ? 1 : scale_groups(dim),
           "[T, 1] or [T, ceil(D / 128)]", Presence::kRequired, access);
    require(view.dtype == DType::kFloat8E8M0,
            [&] { return name + " is " + name_of(view.dtype) + ", expected float8_e8m0"; });
  }

  static int64_t scale_groups(int64_t dim) { return (dim + kScaleGroup - 1) / kScaleGroup; }

  void positive(const char* name, double number) {
    require(std::isfinite(number) && number > 0, [&] {
      return std::string(name) + " is " + std::to_string(number) + ", expected a number > 0";
    });
  }

  void finite(const char* name, double number) {
    require(std::isfinite(number), [&] {
      return std::string(name) + " is " + std::to_string(number) + ", expected a finite number";
    });
  }

  void count(const char* name, int64_t number, int64_t low, int64_t high) {
    require(number >= low && number <= high, [&] {
      return std::string(name) + " has " + std::to_string(number) + " items, expected " +
             std::to_string(low) + " to " + std::to_string(high);
    });
  }

 private:
  const char* op_;
  Precision precision_;
  Status status_;
};

/// S, T, N, D, R of an `attend`, read off sources and queries.
struct AttendShape {
  int64_t num_queries, tokens, num_sources, dim, key_dim;
};

template <class Args>
AttendShape check_attend_inputs(Checker& check, const Args& args) {
  check.count("sources", static_cast<int64_t>(args.sources.size()), 1, kMaxSources);
  if (!check.ok()) {
    return {};
  }
  const AttendShape shape = {args.queries.rows, args.sources[0].rows,
                             static_cast<int64_t>(args.sources.size()), args.sources[0].cols,
                             args.queries.cols};
  check.require(shape.dim >= 1, [&] {
    return "sources[0] has shape " + shape_text(args.sources[0]) +
           ", expected a width D of at least 1";
  });
  check.source_list(args.sources, args.source_scales, shape.tokens, shape.dim);
  check.require(args.queries.present(), "queries is missing, expected shape [S, R]");
  check.require(shape.num_queries >= 1 && shape.num_queries <= kMaxQueries, [&] {
    return "queries has shape " + shape_text(args.queries) + ", expected 1 to " +
           std::to_string(kMaxQueries) + " queries";
  });
  check.require(shape.key_dim >= 1 && shape.key_dim <= shape.dim, [&] {
    return "queries has shape " + shape_text(args.queries) + ", expected a width R from 1 to " +
           std::to_string(shape.dim) + ", the width of sources[0] " + shape_text(args.sources[0]);
  });
  check.statistic("queries", args.queries, shape.num_queries, shape.key_dim, "[S, R]",
                  Presence::kRequired, Access::kRead);
  check.finite("scale", args.scale);
  return shape;
}

/// T, N, D, R, K of a `read`, read off whichever value comes first.
struct ReadShape {
  int64_t tokens, dim, key_dim, terms;
};

/// The first value given to a read; absent if there is none.
struct NamedValue {
  Name name;
  ConstMatrix view;
};

NamedValue first_value(const ReadArgs& args) {
  if (args.phase1_out.present()) {
    return {"phase1_out", args.phase1_out};
  }
  if (!args.sources.empty()) {
    return {{"sources", 0}, args.sources[0]};
  }
  if (args.partial.present()) {
    return {"partial", args.partial};
  }
  if (!args.updates.empty()) {
    return {{"updates", 0}, args.updates[0]};
  }
  return {"", {}};
}

NamedValue first_value(const ReadBackwardArgs& args) {
  if (args.phase1_out.present()) {
    return {"phase1_out", args.phase1_out};
  }
  if (!args.sources.empty()) {
    return {{"sources", 0}, args.sources[0]};
  }
  if (args.partial.present()) {
    return {"partial", args.partial};
  }
  return {"", {}};
}

/// Checks what forward and backward of `read` share: terms, query, norm.
template <class Args>
ReadShape check_read_inputs(Checker& check, const Args& args, bool has_partial) {
  const NamedValue first = first_value(args);
  if (!first.view.present()) {
    check.fail("no value was given: expected at least one of phase1_out, sources and partial");
    return {};
  }
  check.count("sources", static_cast<int64_t>(args.sources.size()), 0, kMaxSources);
  const int64_t terms = (args.phase1_out.present() ? 1 : 0) +
                        static_cast<int64_t>(args.sources.size()) + (has_partial ? 1 : 0);
  const ReadShape shape = {first.view.rows, first.view.cols,
                           args.query.present() ? args.query.cols : first.view.cols, terms};
  check.require(shape.dim >= 1, [&] {
    return first.name + " has shape " + shape_text(first.view) +
           ", expected a width D of at least 1";
  });
  check.value("phase1_out", args.phase1_out, shape.tokens, shape.dim, "[T, D]", Presence::kOptional,
              Access::kRead);
  check.source_list(args.sources, args.source_scales, shape.tokens, shape.dim);
  check.value("partial", args.partial, shape.tokens, shape.dim, "[T, D]", Presence::kOptional,
              Access::kRead);
  check.require(args.query.present() || terms == 1, [&] {
    return "query is missing, expected shape [1, R]: there are " + std::to_string(terms) +
           " terms to choose from";
  });
  check.require(shape.key_dim >= 1 && shape.key_dim <= shape.dim, [&] {
    return "query has shape " + shape_text(args.query) + ", expected a width R from 1 to " +
           std::to_string(shape.dim) + ", the width of " + first.name + " " +
           shape_text(first.view);
  });
  check.statistic("query", args.query, 1, shape.key_dim, "[1, R]", Presence::kOptional,
                  Access::kRead);
  check.finite("scale", args.scale);
  check.require(args.norm == OutputNorm::kNone || args.norm == OutputNorm::kRms, [&] {
    return "norm is " + std::to_string(static_cast<int>(args.norm)) +
           ", expected kNone (0) or kRms (1)";
  });
  check.require(
      args.mix_rounding == MixRounding::kFloat32 || args.mix_rounding == MixRounding::kStorage,
      [&] {
        return "mix_rounding is " + std::to_string(static_cast<int>(args.mix_rounding)) +
               ", expected kFloat32 (0) or kStorage (1)";
      });
  check.require(args.norm == OutputNorm::kRms || !args.norm_weight.present(),
                "norm_weight was given but norm is kNone");
  check.value("norm_weight", args.norm_weight, 1, shape.dim, "[1, D]", Presence::kOptional,
              Access::kRead);
  return shape;
}

/// x of a `read`, in a storage dtype or quantised with its scales.
void check_x(Checker& check, const ReadArgs& args, int64_t tokens, int64_t dim) {
  const bool quantized = args.x.dtype == DType::kFloat8E4M3;
  check.matrix("x", args.x, tokens, dim, "[T, D]", Presence::kRequired, Access::kWrite);
  if (!quantized) {
    check.value_dtype("x", args.x);
    check.require(!args.x_scale.present(), [&] {
      return std::string("x_scale was given but x is ") + name_of(args.x.dtype) +
             ", expected float8_e4m3";
    });
  } else {
    const int64_t groups = Checker::scale_groups(dim);
    check.require(args.x_scale.present(), [&] {
      return "x is float8_e4m3 but x_scale is missing, expected shape " + shape_text(tokens, 1) +
             " or " + shape_text(tokens, groups);
    });
    const int64_t columns = args.x_scale.cols == 1 ? 1 : groups;
    check.matrix("x_scale", args.x_scale, tokens, columns, "[T, 1] or [T, ceil(D / 128)]",
                 Presence::kRequired, Access::kWrite);
    check.require(args.x_scale.dtype == DType::kFloat32, [&] {
      return std::string("x_scale is ") + name_of(args.x_scale.dtype) + ", expected float32";
    });
  }
  check.require(args.scale_rounding == ScaleRounding::kNone ||
                    args.scale_rounding == ScaleRounding::kPowerOfTwo,
                [&] {
                  return "scale_rounding is " +
                         std::to_string(static_cast<int>(args.scale_rounding)) +
                         ", expected kNone (0) or kPowerOfTwo (1)";
                });
}

void check_snapshot(Checker& check, const ReadArgs& args, int64_t tokens, int64_t dim,
                    bool has_partial) {
  check.value("snapshot", args.snapshot, tokens, dim, "[T, D]", Presence::kOptional,
              Access::kWrite);
  if (!args.snapshot.present()) {
    return;
  }
  check.require(has_partial, "snapshot was given without partial or updates");
  const DType sum = args.partial_out.present() ? args.partial_out.dtype : args.partial.dtype;
  check.require(!has_partial || args.snapshot.dtype == sum, [&] {
    return std::string("snapshot is ") + name_of(args.snapshot.dtype) +
           ", expected the dtype of the sum, " + name_of(sum);
  });
}

/// Whether two views share a byte. Views whose rows interleave with different strides are taken for
/// disjoint: telling is not worth the time of a call.
bool overlap(const ConstMatrix& a, const ConstMatrix& b) {
  if (!a.present() || !b.present() || a.rows * a.cols == 0 || b.rows * b.cols == 0) {
    return false;
  }
  const auto begin_of = [](const ConstMatrix& m) { return reinterpret_cast<uintptr_t>(m.data); };
  const auto row_bytes = [](const ConstMatrix& m) {
    return static_cast<uintptr_t>(m.cols * size_of(m.dtype));
  };
  const auto stride_bytes = [](const ConstMatrix& m) {
    return static_cast<uintptr_t>(m.stride * size_of(m.dtype));
  };
  const auto end_of = [&](const ConstMatrix& m) {
    return begin_of(m) + static_cast<uintptr_t>(m.rows - 1) * stride_bytes(m) + row_bytes(m);
  };
  if (end_of(a) <= begin_of(b) || end_of(b) <= begin_of(a)) {
    return false;
  }
  // Rows of one stride: do they meet somewhere along it? A single row goes with any stride.
  const uintptr_t stride = a.rows > 1 ? stride_bytes(a) : stride_bytes(b);
  if (a.rows > 1 && b.rows > 1 && stride_bytes(a) != stride_bytes(b)) {
    return false;
  }
  if ((a.rows == 1 && b.rows == 1) || stride <= row_bytes(a) || stride <= row_bytes(b)) {
    return true;
  }
  const bool a_first = begin_of(a) <= begin_of(b);
  const ConstMatrix& first = a_first ? a : b;
  const ConstMatrix& second = a_first ? b : a;
  const uintptr_t distance = (begin_of(second) - begin_of(first)) % stride;
  return distance < row_bytes(first) || stride - distance < row_bytes(second);
}

std::string overlap_text(const Name& result_name, const ConstMatrix& result, const Name& name,
                         const ConstMatrix& view) {
  return result_name + " of shape " + shape_text(result) + " overlaps the memory of " + name +
         " of shape " + shape_text(view);
}

/// What `read` writes may not lie over what it reads or writes elsewhere; partial_out alone may be
/// the memory of partial or of an update.
void check_aliasing(Checker& check, const ReadArgs& args) {
  if (!check.ok()) {
    return;
  }
  struct Named {
    const char* name;
    const Matrix& view;
  };
  const Named written[] = {{"x", args.x},
                           {"mix", args.mix},
                           {"snapshot", args.snapshot},
                           {"partial_out", args.partial_out}};
  const auto disjoint = [&](const Named& result, const Name& name, const ConstMatrix& view) {
    if (check.ok() && overlap(result.view, view)) {
      check.fail(overlap_text(result.name, result.view, name, view));
    }
  };
  for (const Named& result : written) {
    if (!result.view.present()) {
      continue;
    }
    disjoint(result, "phase1_out", args.phase1_out);
    for (size_t n = 0; n < args.sources.size(); ++n) {
      if (overlap(result.view, args.sources[n])) {
        disjoint(result, item_name("sources", n), args.sources[n]);
      }
    }
    const bool is_sum = &result.view == &args.partial_out;
    for (size_t i = 0; i < args.updates.size() && !is_sum; ++i) {
      disjoint(result, item_name("updates", i), args.updates[i]);
    }
    if (!is_sum) {
      disjoint(result, "partial", args.partial);
    }
    for (const Named& other : written) {
      if (&other < &result) {
        disjoint(result, other.name, other.view);
      }
    }
  }
}

Precision precision_of_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? Precision::kWide : Precision::kStorage;
}

}  // namespace

Precision precision_of(const AttendArgs& args) {
  return precision_of_dtype(args.sources.empty() ? DType::kNone : args.sources[0].dtype);
}

Precision precision_of(const AttendBackwardArgs& args) {
  return precision_of_dtype(args.sources.empty() ? DType::kNone : args.sources[0].dtype);
}

Precision precision_of(const ReadArgs& args) {
  return precision_of_dtype(first_value(args).view.dtype);
}

Precision precision_of(const ReadBackwardArgs& args) {
  return precision_of_dtype(first_value(args).view.dtype);
}

Status validate(const AttendArgs& args) {
  Checker check("attend", precision_of(args));
  const auto [S, T, N, D, R] = check_attend_inputs(check, args);
  check.positive("eps", args.eps);
  check.require(static_cast<int64_t>(args.out.size()) == S, [&] {
    return "out has " + std::to_string(args.out.size()) + " items, expected " +
           std::to_string(args.queries.rows) + ", one for each row of queries";
  });
  check.value_list("out", args.out, T, D, Access::kWrite);
  check.statistic("lse", args.lse, S, T, "[S, T]", Presence::kRequired, Access::kWrite);
  check.statistic("logits", args.logits, T, S * N, "[T, S * N]", Presence::kOptional,
                  Access::kWrite);
  check.statistic("inv_rms", args.inv_rms, T, N, "[T, N]", Presence::kOptional, Access::kWrite);
  check.statistic("probs", args.probs, T, S * N, "[T, S * N]", Presence::kOptional, Access::kWrite);
  for (size_t s = 0; check.ok() && s < args.out.size(); ++s) {
    for (size_t n = 0; check.ok() && n < args.sources.size(); ++n) {
      if (overlap(args.out[s], args.sources[n])) {
        check.fail(overlap_text(item_name("out", s), args.out[s], item_name("sources", n),
                                args.sources[n]));
      }
    }
  }
  return check.take();
}

Status validate(const AttendBackwardArgs& args) {
  Checker check("attend_backward", precision_of(args));
  const auto [S, T, N, D, R] = check_attend_inputs(check, args);
  check.statistic("lse", args.lse, S, T, "[S, T]", Presence::kRequired, Access::kRead);
  check.statistic("logits", args.logits, T, S * N, "[T, S * N]", Presence::kRequired,
                  Access::kRead);
  check.statistic("inv_rms", args.inv_rms, T, N, "[T, N]", Presence::kRequired, Access::kRead);
  check.require(args.dout.empty() || static_cast<int64_t>(args.dout.size()) == S, [&] {
    return "dout has " + std::to_string(args.dout.size()) + " items, expected " +
           std::to_string(args.queries.rows) + ", one for each row of queries, or none";
  });
  check.value_list("dout", args.dout, T, D, Access::kRead);
  check.statistic("gate", args.gate, S, T, "[S, T]", Presence::kOptional, Access::kRead);
  check.statistic("dlse", args.dlse, S, T, "[S, T]", Presence::kOptional, Access::kRead);
  check.require(args.dsources.empty() || static_cast<int64_t>(args.dsources.size()) == N, [&] {
    return "dsources has " + std::to_string(args.dsources.size()) + " items, expected " +
           std::to_string(args.sources.size()) + ", one for each source, or none";
  });
  check.value_list("dsources", args.dsources, T, D, Access::kWrite);
  check.statistic("dqueries", args.dqueries, S, R, "[S, R]", Presence::kOptional, Access::kWrite);
  return check.take();
}

DType mix_dtype(const ReadArgs& args) {
  if (args.x.dtype != DType::kFloat8E4M3) {
    return args.x.dtype;
  }
  const DType first = first_value(args).view.dtype;
  return first == DType::kFloat8E4M3 ? DType::kFloat32 : first;
}

int64_t read_terms(const ReadArgs& args) {
  return (args.phase1_out.present() ? 1 : 0) + static_cast<int64_t>(args.sources.size()) +
         (args.partial.present() || !args.updates.empty() ? 1 : 0);
}

Status validate(const ReadArgs& args) {
  Checker check("read", precision_of(args));
  const bool has_partial = args.partial.present() || !args.updates.empty();
  const auto [T, D, R, K] = check_read_inputs(check, args, has_partial);
  check.statistic("phase1_lse", args.phase1_lse, 1, T, "[1, T]",
                  args.phase1_out.present() ? Presence::kRequired : Presence::kOptional,
                  Access::kRead);
  check.require(args.phase1_out.present() || !args.phase1_lse.present(),
                "phase1_lse was given without phase1_out");
  check.count("updates", static_cast<int64_t>(args.updates.size()), 0, kMaxUpdates);
  for (int64_t i = 0; check.ok() && i < static_cast<int64_t>(args.updates.size()); ++i) {
    check.value(item_name("updates", i), args.updates[i], T, D, "[T, D]", Presence::kRequired,
                Access::kRead);
  }
  check.positive("eps", args.eps);
  if (args.norm == OutputNorm::kRms) {
    check.positive("norm_eps", args.norm_eps);
  }
  check_x(check, args, T, D);
  check.value("partial_out", args.partial_out, T, D, "[T, D]",
              args.updates.empty() ? Presence::kOptional : Presence::kRequired, Access::kWrite);
  check.require(has_partial || !args.partial_out.present(),
                "partial_out was given without partial or updates");
  check.value("mix", args.mix, T, D, "[T, D]", Presence::kOptional, Access::kWrite);
  check.statistic("logits", args.logits, T, K, "[T, K]", Presence::kOptional, Access::kWrite);
  check.statistic("inv_rms", args.inv_rms, T, K, "[T, K]", Presence::kOptional, Access::kWrite);
  check.statistic("mix_inv_rms", args.mix_inv_rms, 1, T, "[1, T]", Presence::kOptional,
                  Access::kWrite);
  check.require(args.norm == OutputNorm::kRms || !args.mix_inv_rms.present(),
                "mix_inv_rms was given but norm is kNone");
  check.statistic("probs", args.probs, T, K, "[T, K]", Presence::kOptional, Access::kWrite);
  check_snapshot(check, args, T, D, has_partial);
  check_aliasing(check, args);
  return check.take();
}

Status validate(const ReadBackwardArgs& args) {
  Checker check("read_backward", precision_of(args));
  const auto [T, D, R, K] = check_read_inputs(check, args, args.partial.present());
  check.statistic("logits", args.logits, T, K, "[T, K]", Presence::kRequired, Access::kRead);
  check.statistic("inv_rms", args.inv_rms, T, K, "[T, K]", Presence::kRequired, Access::kRead);
  check.statistic("mix_inv_rms", args.mix_inv_rms, 1, T, "[1, T]",
                  args.norm == OutputNorm::kRms ? Presence::kRequired : Presence::kOptional,
                  Access::kRead);
  check.value("dx", args.dx, T, D, "[T, D]", Presence::kOptional, Access::kRead);
  check.value("dmix", args.dmix, T, D, "[T, D]", Presence::kOptional, Access::kRead);
  check.value("dpartial_out", args.dpartial_out, T, D, "[T, D]", Presence::kOptional,
              Access::kRead);

  const bool has_phase1 = args.phase1_out.present();
  check.require(has_phase1 || (!args.dphase1_out.present() && !args.dphase1_lse.present() &&
                               !args.gate.present()),
                "dphase1_out, dphase1_lse or gate was given without phase1_out");
  check.value("dphase1_out", args.dphase1_out, T, D, "[T, D]", Presence::kOptional, Access::kWrite);
  check.statistic("dphase1_lse", args.dphase1_lse, 1, T, "[1, T]", Presence::kOptional,
                  Access::kWrite);
  check.value("dh", args.dh, T, D, "[T, D]", Presence::kOptional, Access::kWrite);
  check.require(!has_phase1 || !args.dh.present() || args.dh.data != args.phase1_out.data ||
                    (args.dh.dtype == args.phase1_out.dtype &&
                     (T <= 1 || args.dh.stride == args.phase1_out.stride)),
                "dh is the memory of phase1_out, expected the same dtype and row stride");
  check.statistic("gate", args.gate, 1, T, "[1, T]", Presence::kOptional, Access::kWrite);
  check.require(args.dsources.empty() || args.dsources.size() == args.sources.size(), [&] {
    return "dsources has " + std::to_string(args.dsources.size()) + " items, expected " +
           std::to_string(args.sources.size()) + ", one for each source, or none";
  });
  check.value_list("dsources", args.dsources, T, D, Access::kWrite);
  check.require(args.partial.present() || !args.dpartial.present(),
                "dpartial was given without partial");
  check.require(args.partial.present() || !args.dpartial_out.present(),
                "dpartial_out was given without partial");
  check.value("dpartial", args.dpartial, T, D, "[T, D]", Presence::kOptional, Access::kWrite);
  check.statistic("dquery", args.dquery, 1, R, "[1, R]", Presence::kOptional, Access::kWrite);
  check.require(args.norm == OutputNorm::kRms || !args.dnorm_weight.present(),
                "dnorm_weight was given but norm is kNone");
  check.value("dnorm_weight", args.dnorm_weight, 1, D, "[1, D]", Presence::kOptional,
              Access::kWrite);
  return check.take();
}

namespace {

void check_fold_inputs(Checker& check, const ConstMatrix& queries, const ConstMatrix& key_weight) {
  check.value("queries", queries, queries.rows, queries.cols, "[S, R]", Presence::kRequired,
              Access::kRead);
  check.require(!key_weight.present() || key_weight.rows == 1 || key_weight.rows == queries.rows,
                [&] {
                  return "key_weight has shape " + shape_text(key_weight) + ", expected " +
                         shape_text(queries) + " like queries, or one row";
                });
  check.value("key_weight", key_weight, key_weight.rows, queries.cols, "[S or 1, R]",
              Presence::kOptional, Access::kRead);
}

}  // namespace

Status validate_fold(const ConstMatrix& queries, const ConstMatrix& key_weight,
                     const ConstMatrix& folded) {
  Checker check("fold_queries", Precision::kStorage);
  check_fold_inputs(check, queries, key_weight);
  check.statistic("folded", folded, queries.rows, queries.cols, "[S, R]", Presence::kRequired,
                  Access::kWrite);
  return check.take();
}

Status validate_fold_backward(const ConstMatrix& queries, const ConstMatrix& key_weight,
                              const ConstMatrix& dfolded, const ConstMatrix& dqueries,
                              const ConstMatrix& dkey_weight) {
  Checker check("fold_queries_backward", Precision::kStorage);
  check_fold_inputs(check, queries, key_weight);
  check.statistic("dfolded", dfolded, queries.rows, queries.cols, "[S, R]", Presence::kRequired,
                  Access::kRead);
  check.value("dqueries", dqueries, queries.rows, queries.cols, "[S, R]", Presence::kOptional,
              Access::kWrite);
  check.require(key_weight.present() || !dkey_weight.present(),
                "dkey_weight was given without key_weight");
  check.value("dkey_weight", dkey_weight, key_weight.rows, queries.cols, "[S or 1, R]",
              Presence::kOptional, Access::kWrite);
  return check.take();
}

namespace {

/// Addends of a sum [T, D], of any storage dtypes.
bool check_terms(Checker& check, std::span<const ConstMatrix> terms, int64_t most) {
  const auto count = static_cast<int64_t>(terms.size());
  check.require(count >= 1 && count <= most, [&] {
    return "terms has " + std::to_string(count) + " items, expected 1 to " + std::to_string(most);
  });
  for (int64_t i = 0; check.ok() && i < count; ++i) {
    check.value(item_name("terms", i), terms[static_cast<size_t>(i)], terms[0].rows, terms[0].cols,
                "[T, D]", Presence::kRequired, Access::kRead);
  }
  if (check.ok()) {
    check.require(terms[0].cols >= 1, [&] {
      return "terms[0] has shape " + shape_text(terms[0]) + ", expected D >= 1";
    });
  }
  return check.ok();
}

}  // namespace

Status validate(const StochasticAddArgs& args) {
  Checker check("stochastic_add", Precision::kStorage);
  if (!check_terms(check, args.terms, kMaxStochasticTerms)) {
    return check.take();
  }
  const int64_t tokens = args.terms[0].rows;
  const int64_t dim = args.terms[0].cols;
  check.matrix("out", args.out, tokens, dim, "[T, D]", Presence::kRequired, Access::kWrite);
  check.require(args.out.dtype == DType::kBFloat16, [&] {
    return std::string("out is ") + name_of(args.out.dtype) + ", expected bfloat16";
  });
  check.require(args.site >= 0 && args.site <= int64_t{0xffffffff}, [&] {
    return "site is " + std::to_string(args.site) + ", expected 0 to 2^32 - 1";
  });
  check.require(args.seed != nullptr || tokens == 0,
                "seed is a null pointer, expected two int64 numbers: seed and step");
  return check.take();
}

Status validate(const QuantizeArgs& args) {
  Checker check("quantize", Precision::kStorage);
  if (!check_terms(check, args.terms, kMaxQuantizeTerms)) {
    return check.take();
  }
  const int64_t tokens = args.terms[0].rows;
  const int64_t dim = args.terms[0].cols;
  check.matrix("out", args.out, tokens, dim, "[T, D]", Presence::kRequired, Access::kWrite);
  check.require(args.out.dtype == DType::kFloat16 || args.out.dtype == DType::kFloat8E4M3, [&] {
    return std::string("out is ") + name_of(args.out.dtype) + ", expected float16 or float8_e4m3";
  });
  check.scale("scale", args.scale, tokens, dim, Access::kWrite);
  for (size_t i = 0; check.ok() && i < args.terms.size(); ++i) {
    if (overlap(args.out, args.terms[i])) {
      check.fail(overlap_text("out", args.out, item_name("terms", i), args.terms[i]));
    }
  }
  return check.take();
}

Status validate_workspace(const char* op, const Context& context, int64_t bytes_needed) {
  constexpr uintptr_t kAlignment = 64;
  if (bytes_needed == 0) {
    return {};
  }
  if (context.workspace == nullptr || context.workspace_bytes < bytes_needed) {
    return {StatusCode::kWorkspaceTooSmall,
            std::string(op) + ": workspace has " +
                std::to_string(context.workspace == nullptr ? 0 : context.workspace_bytes) +
                " bytes, expected at least " + std::to_string(bytes_needed)};
  }
  if (reinterpret_cast<uintptr_t>(context.workspace) % kAlignment != 0) {
    return {StatusCode::kInvalidArgument,
            std::string(op) + ": workspace is not aligned to 64 bytes"};
  }
  return {};
}

}  // namespace flash_attn_res
