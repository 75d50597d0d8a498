// The objective on [K, B] numbers, following guard_ops/objective.py line by line: from the sums of
// each transition to the loss, its diagnostics, and the coefficients d loss / d sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "transition.h"

namespace guard_ops {

enum class RatioNorm : int { none, standardize, closed_form };
enum class Balance : int { none, inverse_ratio, inverse_dt };

struct Config {
  RatioNorm ratio_norm;
  Balance balance;
  bool detach_stats, mean_reduction, drop, gaussian;
  double target_std, std_floor, clip_low, clip_high, adv_clip, weight_floor, kl_beta;

  // Of every finite transition's coefficients (those that are 0 are of any).
  GUARD_OPS_HD GradientKind gradient_kind() const {
    return ratio_norm == RatioNorm::closed_form ? GradientKind::residual : GradientKind::departure;
  }
};

struct Sums {  // S1 = sum(delta e), S2 = sum(delta^2), ref = sum((b (v - v_ref))^2)
  double s1, s2, ref;
};

GUARD_OPS_HD Sums operator+(const Sums& p, const Sums& q) {
  return {p.s1 + q.s1, p.s2 + q.s2, p.ref + q.ref};
}

struct Coefficients {  // d loss / d Sums
  double c1, c2, c3;
};

GUARD_OPS_HD bool operator==(const Coefficients& p, const Coefficients& q) {
  return p.c1 == q.c1 && p.c2 == q.c2 && p.c3 == q.c3;
}

// The gradient's factors of a transition whose velocity enters the mean by b.
GUARD_OPS_HD Factors<double> factors_of(double b, const Coefficients& c) {
  return {b * c.c1, 2 * b * c.c2, 2 * b * b * c.c3};
}

// Numbers of one step or transition that the objective needs, and D.
struct StepScalars {
  double s, kappa, dt, numel;
};

struct Ratio {
  double log_ratio, kl_old, kl, u;  // u = expm1(log r)
  bool finite;
};

struct Maybe {  // a number that a call may do without
  bool given;
  double value;
};

struct Statistics {
  double mean, std;
};

constexpr double log_sqrt_2pi = 0.91893853320467274178;

GUARD_OPS_HD double scale_of(const Config& c, const StepScalars& p) {
  return c.mean_reduction ? p.kappa / p.numel : p.kappa;
}

// old_log_prob: only in the log-prob form.
GUARD_OPS_HD Ratio ratio_of(const Config& c, const StepScalars& p, const Sums& sums,
                            double advantage, const Maybe& old_log_prob) {
  Ratio r;
  const double scale = scale_of(c, p);
  r.kl = sums.ref / (2 * p.s * p.s * p.numel);
  if (!old_log_prob.given) {
    r.log_ratio = scale * (2 * sums.s1 - sums.s2);
    r.kl_old = scale * sums.s2;
  } else {
    double log_prob = -scale * sums.s2;
    if (c.gaussian) {
      log_prob -= (c.mean_reduction ? 1.0 : p.numel) * (std::log(p.s) + log_sqrt_2pi);
    }
    r.log_ratio = log_prob - old_log_prob.value;
    r.kl_old = NAN;
  }
  r.u = std::expm1(r.log_ratio);
  r.finite = std::isfinite(r.log_ratio) && std::isfinite(advantage) && std::isfinite(r.u);
  if (c.kl_beta != 0) r.finite = r.finite && std::isfinite(r.kl);
  if (c.ratio_norm == RatioNorm::closed_form) {
    r.finite = r.finite && std::isfinite(std::expm1(p.s * (r.log_ratio + r.kl_old)));
  }
  return r;
}

GUARD_OPS_HD bool degenerate(const Config& c, const Statistics& stats) {
  return !(stats.std > c.std_floor);
}

GUARD_OPS_HD double denominator(const Config& c, const Statistics& stats) {
  return degenerate(c, stats) ? c.target_std : stats.std;
}

// r_hat - 1 of a finite transition.
GUARD_OPS_HD double excess_of(const Config& c, const StepScalars& p, const Ratio& r,
                              const Statistics& stats) {
  if (c.ratio_norm == RatioNorm::closed_form) return std::expm1(p.s * (r.log_ratio + r.kl_old));
  if (c.ratio_norm == RatioNorm::none) return r.u;
  return c.target_std * ((r.u - stats.mean) / denominator(c, stats));
}

struct Surrogate {
  double loss, slope;  // d loss / d r_hat
  bool clipped, high, low;
};

GUARD_OPS_HD Surrogate surrogate_of(const Config& c, double excess, double advantage) {
  const double a =
      advantage < -c.adv_clip ? -c.adv_clip : (advantage > c.adv_clip ? c.adv_clip : advantage);
  Surrogate out;
  out.high = excess > c.clip_high;
  out.low = excess < -c.clip_low;
  out.clipped = (a > 0 && out.high) || (a < 0 && out.low);
  const double bounded = out.high ? c.clip_high : -c.clip_low;
  out.loss = -a * (1.0 + (out.clipped ? bounded : excess));
  out.slope = out.clipped ? 0.0 : -a;
  return out;
}

// 1 / max(r_hat, floor): what inverse_ratio normalizes over a sample's steps.
GUARD_OPS_HD double inverse_rho(const Config& c, double excess) {
  const double rho = 1.0 + excess;
  return 1.0 / (rho < c.weight_floor ? c.weight_floor : rho);
}

// The balances that need no other step's ratio; `steps` counts the sample's finite ones.
GUARD_OPS_HD double own_weight(const Config& c, const StepScalars& p, double steps) {
  return c.balance == Balance::inverse_dt ? 1.0 / (steps * std::fabs(p.dt)) : 1.0 / steps;
}

// From d loss / d (the u or log-ratio that feeds r_hat) to d loss / d sums.
GUARD_OPS_HD Coefficients coefficients_of(const Config& c, const StepScalars& p, const Ratio& r,
                                          double excess, double d_excess, double d_u,
                                          double transitions) {
  Coefficients out{0.0, 0.0, 0.0};
  const double scale = scale_of(c, p);
  if (c.ratio_norm == RatioNorm::closed_form) {
    out.c1 = d_excess * (1.0 + excess) * p.s * 2 * scale;
  } else {
    const double d_log_ratio = d_u * (1.0 + r.u);
    out.c1 = d_log_ratio * 2 * scale;
    out.c2 = -d_log_ratio * scale;
  }
  if (c.kl_beta != 0) out.c3 = c.kl_beta / transitions / (2 * p.s * p.s * p.numel);
  return out;
}

GUARD_OPS_HD Coefficients nonfinite_coefficients(const Config& c) {
  return c.drop ? Coefficients{0.0, 0.0, 0.0} : Coefficients{NAN, NAN, NAN};
}

// A row's coefficients when no other row's ratio enters them: statistics known or not needed, and
// every transition of the batch finite.
GUARD_OPS_HD Coefficients own_coefficients(const Config& c, const StepScalars& p, const Ratio& r,
                                           const Statistics& stats, double advantage,
                                           const Maybe& step_weight, double steps, double samples) {
  const double excess = excess_of(c, p, r, stats);
  double weight = step_weight.given ? step_weight.value : own_weight(c, p, steps);
  if (!step_weight.given && c.balance == Balance::inverse_ratio) weight = 1.0;  // one step
  const double d_excess = weight * surrogate_of(c, excess, advantage).slope / samples;
  const double d_u = c.ratio_norm == RatioNorm::standardize
                         ? d_excess * (c.target_std / denominator(c, stats))
                         : d_excess;
  return coefficients_of(c, p, r, excess, d_excess, d_u, steps * samples);
}

}  // namespace guard_ops
