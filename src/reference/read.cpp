// read and read_backward by their formulas (include/flash_attn_res/read.h).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "common/element.h"
#include "common/validate.h"
#include "reference/formulas.h"
#include "reference/reference.h"

namespace flash_attn_res::reference {
namespace {

/// The terms z_0..z_{K-1} of a read: phase 1, sources, partial sum, those that were given.
class Terms {
 public:
  Terms(const ConstMatrix& phase1_out, std::span<const ConstMatrix> sources,
        std::span<const ConstMatrix> source_scales, const ConstMatrix& partial)
      : phase1_out_(phase1_out),
        sources_(sources),
        source_scales_(source_scales),
        partial_(partial) {}

  int64_t size() const { return num_phase1() + num_sources() + (partial_.present() ? 1 : 0); }
  int64_t num_phase1() const { return phase1_out_.present() ? 1 : 0; }
  int64_t num_sources() const { return static_cast<int64_t>(sources_.size()); }

  /// The term whose logit is given rather than computed.
  bool is_phase1(int64_t j) const { return j < num_phase1(); }

  ScaledView operator[](int64_t j) const {
    if (is_phase1(j)) {
      return {phase1_out_};
    }
    const int64_t n = j - num_phase1();
    return n < num_sources() ? source_at(sources_, source_scales_, n) : ScaledView{partial_};
  }

 private:
  const ConstMatrix& phase1_out_;               // [T, D]
  std::span<const ConstMatrix> sources_;        // N x [T, D]
  std::span<const ConstMatrix> source_scales_;  // N x [T, 1] or [T, groups], or empty
  const ConstMatrix& partial_;                  // [T, D]
};

/// h[d] = sum_j p_j z_j[d]
double mixture_at(const Terms& terms, const double* prob, int64_t t, int64_t d) {
  double h = 0;
  for (int64_t j = 0; j < terms.size(); ++j) {
    h += prob[j] * load(terms[j], t, d);
  }
  return h;
}

/// The mixture as the output norm sees it.
double normed_mixture_at(const Terms& terms, const double* prob, int64_t t, int64_t d,
                         MixRounding rounding, DType storage) {
  const double h = mixture_at(terms, prob, t, d);
  return rounding == MixRounding::kStorage ? round_to(storage, h) : h;
}

/// Row t of x, given as a function of the column, stored as float8 with its scales.
template <class Row>
void store_quantized(const ReadArgs& args, int64_t t, const Row& x) {
  constexpr double kLargest = 448;        // of e4m3
  constexpr double kSmallest = 0x1p-126;  // scale: its reciprocal is a float32 still
  const int64_t D = args.x.cols;
  const int64_t width = args.x_scale.cols == 1 ? D : kScaleGroup;
  for (int64_t group = 0; group < args.x_scale.cols; ++group) {
    const int64_t begin = group * width;
    const int64_t end = std::min(D, begin + width);
    double amax = 0;
    for (int64_t d = begin; d < end; ++d) {
      const double magnitude = std::abs(x(d));
      amax = magnitude > amax || std::isnan(magnitude) ? magnitude : amax;
      if (std::isnan(amax)) {
        break;
      }
    }
    // The scale is a float32 and divides as one: the values go with it, not with its ideal.
    double scale = static_cast<float>(amax) / static_cast<float>(kLargest);
    if (scale < kSmallest) {
      scale = kSmallest;
    }
    if (args.scale_rounding == ScaleRounding::kPowerOfTwo && std::isfinite(scale)) {
      int exponent = 0;
      const double fraction = std::frexp(scale, &exponent);  // in [0.5, 1)
      scale = std::ldexp(1, fraction == 0.5 ? exponent - 1 : exponent);
    }
    store(args.x_scale, t, group, scale);
    for (int64_t d = begin; d < end; ++d) {
      store(args.x, t, d, x(d) / scale);
    }
  }
}

/// g[d], or 1 where there is no norm weight.
double norm_weight_at(const ConstMatrix& weight, int64_t d) {
  return weight.present() ? load(weight, 0, d) : 1;
}

}  // namespace

int64_t read_workspace_bytes(const ReadArgs&) { return 0; }

Status read(const ReadArgs& args, const Context&) {
  const int64_t T = args.x.rows;
  const int64_t D = args.x.cols;
  const int64_t R = args.query.present() ? args.query.cols : D;

  // partial' = partial + updates, rounded to its storage dtype.
  const Matrix& sum_out = args.partial_out.present() ? args.partial_out : args.snapshot;
  if (sum_out.present()) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        double sum = args.partial.present() ? load(args.partial, t, d) : 0;
        for (const ConstMatrix& update : args.updates) {
          sum += load(update, t, d);
        }
        store(sum_out, t, d, sum);
        if (args.snapshot.present()) {
          store(args.snapshot, t, d, sum);
        }
      }
    }
  }
  const ConstMatrix partial = sum_out.present() ? ConstMatrix(sum_out) : args.partial;
  const Terms terms(args.phase1_out, args.sources, args.source_scales, partial);
  const int64_t K = terms.size();

  double logit[kMaxTerms];  // (K)
  double prob[kMaxTerms];   // (K)
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t j = 0; j < K; ++j) {
      const double r_j = terms.is_phase1(j) ? 0 : inverse_rms(terms[j], t, R, args.eps);
      if (terms.is_phase1(j)) {
        logit[j] = load(args.phase1_lse, 0, t);
      } else if (args.query.present()) {
        logit[j] = args.scale * r_j * query_dot_key(args.query, 0, terms[j], t);
      } else {
        logit[j] = 0;  // a single term: its probability is 1 whatever the query
      }
      if (args.logits.present()) {
        store(args.logits, t, j, logit[j]);
      }
      if (args.inv_rms.present()) {
        store(args.inv_rms, t, j, r_j);
      }
    }
    const double lse = log_sum_exp(logit, K);
    for (int64_t j = 0; j < K; ++j) {
      prob[j] = std::exp(logit[j] - lse);
      if (args.probs.present()) {
        store(args.probs, t, j, prob[j]);
      }
    }
    if (args.mix.present()) {
      for (int64_t d = 0; d < D; ++d) {
        store(args.mix, t, d, mixture_at(terms, prob, t, d));
      }
    }
    // x, given as a function of the column, in its dtype
    const auto store_x = [&](const auto& x) {
      if (args.x_scale.present()) {
        return store_quantized(args, t, x);
      }
      for (int64_t d = 0; d < D; ++d) {
        store(args.x, t, d, x(d));
      }
    };
    if (args.norm == OutputNorm::kNone) {
      store_x([&](int64_t d) { return mixture_at(terms, prob, t, d); });
      continue;
    }
    const auto h = [&](int64_t d) {
      return normed_mixture_at(terms, prob, t, d, args.mix_rounding, mix_dtype(args));
    };
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) {
      sum += h(d) * h(d);
    }
    const double rh = 1 / std::sqrt(sum / static_cast<double>(D) + args.norm_eps);
    if (args.mix_inv_rms.present()) {
      store(args.mix_inv_rms, 0, t, rh);
    }
    store_x([&](int64_t d) { return h(d) * rh * norm_weight_at(args.norm_weight, d); });
  }
  return {};
}

int64_t read_backward_workspace_bytes(const ReadBackwardArgs& args) {
  // prob [T, K], dlogit [T, K], <y, h> [T]
  return args.logits.rows * (2 * args.logits.cols + 1) * static_cast<int64_t>(sizeof(double));
}

Status read_backward(const ReadBackwardArgs& args, const Context& context) {
  const Terms terms(args.phase1_out, args.sources, args.source_scales, args.partial);
  const int64_t K = terms.size();
  const int64_t T = terms[0].values.rows;
  const int64_t D = terms[0].values.cols;
  const int64_t R = args.query.present() ? args.query.cols : D;
  const bool normed = args.norm == OutputNorm::kRms && args.dx.present();

  double* const probs = static_cast<double*>(context.workspace);  // (T,K)
  double* const dlogits = probs + T * K;                          // (T,K)
  double* const y_dot_h = dlogits + T * K;                        // (T)

  const auto h = [&](int64_t t, int64_t d) {
    return normed_mixture_at(terms, probs + t * K, t, d, args.mix_rounding, args.dx.dtype);
  };
  // dh = dmix + (kNone: dx;  kRms: rh y - h (rh^3 / D) <y, h>),  y = g dx
  const auto dh = [&](int64_t t, int64_t d) {
    double sum = args.dmix.present() ? load(args.dmix, t, d) : 0;
    if (normed) {
      const double rh = load(args.mix_inv_rms, 0, t);
      const double y = norm_weight_at(args.norm_weight, d) * load(args.dx, t, d);
      sum += rh * y - h(t, d) * rh * rh * rh / static_cast<double>(D) * y_dot_h[t];
    } else if (args.dx.present()) {
      sum += load(args.dx, t, d);
    }
    return sum;
  };

  double logit[kMaxTerms];  // (K)
  double dp[kMaxTerms];     // (K)
  for (int64_t t = 0; t < T; ++t) {
    double* const prob = probs + t * K;
    for (int64_t j = 0; j < K; ++j) {
      logit[j] = load(args.logits, t, j);
    }
    const double lse = log_sum_exp(logit, K);
    for (int64_t j = 0; j < K; ++j) {
      prob[j] = std::exp(logit[j] - lse);
    }
    y_dot_h[t] = 0;
    if (normed) {
      for (int64_t d = 0; d < D; ++d) {
        y_dot_h[t] += norm_weight_at(args.norm_weight, d) * load(args.dx, t, d) * h(t, d);
      }
    }

    // dp_j = <dh, z_j>, delta = sum_j p_j dp_j, dlogit_j = p_j (dp_j - delta)
    double delta = 0;
    for (int64_t j = 0; j < K; ++j) {
      dp[j] = 0;
      for (int64_t d = 0; d < D; ++d) {
        dp[j] += dh(t, d) * load(terms[j], t, d);
      }
      delta += prob[j] * dp[j];
    }
    for (int64_t j = 0; j < K; ++j) {
      // With one term p is 1 and the difference is zero by identity, not just by rounding.
      dlogits[t * K + j] = K == 1 ? dp[0] * 0 : prob[j] * (dp[j] - delta);
    }

    if (terms.num_phase1() == 1) {
      if (args.gate.present()) {
        store(args.gate, 0, t, prob[0]);
      }
      if (args.dphase1_lse.present()) {
        store(args.dphase1_lse, 0, t, dlogits[t * K]);
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      if (args.dphase1_out.present()) {
        store(args.dphase1_out, t, d, prob[0] * dh(t, d));
      }
    }
  }

  // dz_j = p_j dh + [last R] scale dlogit_j r_j u - dlogit_j logit_j (r_j^2 / R) k_j
  const auto dz = [&](int64_t j, int64_t t, int64_t d) {
    double sum = probs[t * K + j] * dh(t, d);
    if (const int64_t r = d - (D - R); r >= 0 && args.query.present()) {
      const double r_j = load(args.inv_rms, t, j);
      const double dlogit = dlogits[t * K + j];
      sum += args.scale * dlogit * r_j * load(args.query, 0, r) -
             dlogit * load(args.logits, t, j) * r_j * r_j / static_cast<double>(R) *
                 load(terms[j], t, d);
    }
    return sum;
  };
  for (int64_t n = 0; n < static_cast<int64_t>(args.dsources.size()); ++n) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        const double held = args.accumulate_dsources ? load(args.dsources[n], t, d) : 0;
        store(args.dsources[n], t, d, held + dz(terms.num_phase1() + n, t, d));
      }
    }
  }
  if (args.dpartial.present()) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        const double later = args.dpartial_out.present() ? load(args.dpartial_out, t, d) : 0;
        store(args.dpartial, t, d, later + dz(K - 1, t, d));
      }
    }
  }

  // du = sum over t and all but the phase-1 term of scale dlogit_j r_j k_j
  if (args.dquery.present()) {
    for (int64_t r = 0; r < R; ++r) {
      double sum = args.accumulate_dquery ? load(args.dquery, 0, r) : 0;
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t j = terms.num_phase1(); j < K; ++j) {
          sum += args.scale * dlogits[t * K + j] * load(args.inv_rms, t, j) *
                 key_at(terms[j], t, r, R);
        }
      }
      store(args.dquery, 0, r, sum);
    }
  }

  // dg = sum_t dx h rh
  if (args.dnorm_weight.present()) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = args.accumulate_dnorm_weight ? load(args.dnorm_weight, 0, d) : 0;
      for (int64_t t = 0; t < T && normed; ++t) {
        sum += load(args.dx, t, d) * h(t, d) * load(args.mix_inv_rms, 0, t);
      }
      store(args.dnorm_weight, 0, d, sum);
    }
  }

  // Last, since it may be the memory of phase1_out, which all of the above reads.
  if (args.dh.present()) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t d = 0; d < D; ++d) {
        store(args.dh, t, d, dh(t, d));
      }
    }
  }
  return {};
}

}  // namespace flash_attn_res::reference
