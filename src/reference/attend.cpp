// attend and attend_backward by their formulas (include/flash_attn_res/attend.h).

#include <cmath>
#include <cstdint>

#include "common/element.h"
#include "reference/formulas.h"
#include "reference/reference.h"

namespace flash_attn_res::reference {

int64_t attend_workspace_bytes(const AttendArgs&) { return 0; }

Status attend(const AttendArgs& args, const Context&) {
  const int64_t S = args.queries.rows;
  const int64_t R = args.queries.cols;
  const int64_t N = static_cast<int64_t>(args.sources.size());
  const int64_t T = args.sources[0].rows;
  const int64_t D = args.sources[0].cols;
  const auto source = [&](int64_t n) { return source_at(args.sources, args.source_scales, n); };

  double logit[kMaxTerms];    // (N)
  double inv_rms[kMaxTerms];  // (N)
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t n = 0; n < N; ++n) {
      inv_rms[n] = inverse_rms(source(n), t, R, args.eps);
      if (args.inv_rms.present()) {
        store(args.inv_rms, t, n, inv_rms[n]);
      }
    }
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t n = 0; n < N; ++n) {
        logit[n] = args.scale * inv_rms[n] * query_dot_key(args.queries, s, source(n), t);
      }
      const double lse = log_sum_exp(logit, N);
      store(args.lse, s, t, lse);
      for (int64_t n = 0; n < N; ++n) {
        if (args.logits.present()) {
          store(args.logits, t, s * N + n, logit[n]);
        }
        if (args.probs.present()) {
          store(args.probs, t, s * N + n, std::exp(logit[n] - lse));
        }
      }
      for (int64_t d = 0; d < D; ++d) {
        double out = 0;
        for (int64_t n = 0; n < N; ++n) {
          out += std::exp(logit[n] - lse) * load(source(n), t, d);
        }
        store(args.out[s], t, d, out);
      }
    }
  }
  return {};
}

int64_t attend_backward_workspace_bytes(const AttendBackwardArgs& args) {
  // dlogit [S, T, N]
  return args.queries.rows * args.sources[0].rows * static_cast<int64_t>(args.sources.size()) *
         static_cast<int64_t>(sizeof(double));
}

Status attend_backward(const AttendBackwardArgs& args, const Context& context) {
  const int64_t S = args.queries.rows;
  const int64_t R = args.queries.cols;
  const int64_t N = static_cast<int64_t>(args.sources.size());
  const int64_t T = args.sources[0].rows;
  const int64_t D = args.sources[0].cols;

  const auto source = [&](int64_t n) { return source_at(args.sources, args.source_scales, n); };
  const auto gate = [&](int64_t s, int64_t t) {
    return args.gate.present() ? load(args.gate, s, t) : 1.0;
  };
  const auto logit = [&](int64_t s, int64_t t, int64_t n) {
    return load(args.logits, t, s * N + n);
  };
  const auto prob = [&](int64_t s, int64_t t, int64_t n) {
    return std::exp(logit(s, t, n) - load(args.lse, s, t));
  };

  double* const dlogits = static_cast<double*>(context.workspace);  // (S,T,N)
  const auto dlogit = [&](int64_t s, int64_t t, int64_t n) -> double& {
    return dlogits[(s * T + t) * N + n];
  };

  // dp_sn = <dh_s, v_n>, delta_s = sum_n p_sn dp_sn, dlogit_sn = p_sn (dp_sn - delta_s + dlse_s)
  double dp[kMaxTerms];  // (N)
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t t = 0; t < T; ++t) {
      double delta = 0;
      for (int64_t n = 0; n < N; ++n) {
        dp[n] = args.dout.empty() ? 0 : gate(s, t) * row_dot(args.dout[s], source(n), t);
        delta += prob(s, t, n) * dp[n];
      }
      const double dlse = args.dlse.present() ? load(args.dlse, s, t) : 0;
      for (int64_t n = 0; n < N; ++n) {
        // With one source p is 1 and the difference is zero by identity, not just by rounding.
        const double difference = N == 1 ? dp[0] * 0 : dp[n] - delta;
        dlogit(s, t, n) = prob(s, t, n) * (difference + dlse);
      }
    }
  }

  // dv_n = sum_s p_sn dh_s + [last R] scale dlogit_sn r_n u_s - dlogit_sn logit_sn (r_n^2 / R) k_n
  for (int64_t n = 0; n < static_cast<int64_t>(args.dsources.size()); ++n) {
    for (int64_t t = 0; t < T; ++t) {
      const double r_n = load(args.inv_rms, t, n);
      for (int64_t d = 0; d < D; ++d) {
        double sum = args.accumulate_dsources ? load(args.dsources[n], t, d) : 0;
        for (int64_t s = 0; s < S; ++s) {
          if (!args.dout.empty()) {
            sum += prob(s, t, n) * gate(s, t) * load(args.dout[s], t, d);
          }
          if (const int64_t r = d - (D - R); r >= 0) {
            sum += args.scale * dlogit(s, t, n) * r_n * load(args.queries, s, r) -
                   dlogit(s, t, n) * logit(s, t, n) * r_n * r_n / static_cast<double>(R) *
                       load(source(n), t, d);
          }
        }
        store(args.dsources[n], t, d, sum);
      }
    }
  }

  // du_s = sum_{t,n} scale dlogit_sn r_n k_n
  if (args.dqueries.present()) {
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t r = 0; r < R; ++r) {
        double sum = args.accumulate_dqueries ? load(args.dqueries, s, r) : 0;
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t n = 0; n < N; ++n) {
            sum += args.scale * dlogit(s, t, n) * load(args.inv_rms, t, n) *
                   key_at(source(n), t, r, R);
          }
        }
        store(args.dqueries, s, r, sum);
      }
    }
  }
  return {};
}

}  // namespace flash_attn_res::reference
