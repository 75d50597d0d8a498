// What the operators of every device share: torch's tensors as the kernels' operands. Only the
// files called bindings know torch.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "evaluate.h"

namespace guard_ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::f64;
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_TYPE(false, "guard_ops: dtype ", t.scalar_type(), " is not supported");
  }
}

// [K, B, D] with dense latents; the Python layer has checked more kindly.
inline Operand operand(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  TORCH_CHECK(t->dim() == 3 && (t->size(2) == 1 || t->stride(2) == 1),
              "guard_ops: an operand needs [K, B, D] with dense latents");
  TORCH_CHECK(t->storage().nbytes() > 0, "guard_ops: an operand's storage was freed (resize_(0))");
  return {t->data_ptr(), dtype_of(*t), t->stride(0), t->stride(1)};
}

inline Rows rows(const Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.scalar_type() == at::kDouble, "guard_ops: needs float64 [K, B]");
  return {t.const_data_ptr<double>(), t.stride(0), t.stride(1)};
}

inline Numbers numbers(const Tensor& t) {
  const bool wide = t.scalar_type() == at::kDouble;
  TORCH_CHECK(t.dim() == 2 && (wide || t.scalar_type() == at::kFloat),
              "guard_ops: needs float64 or float32 [K, B]");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), wide};
}

inline Numbers numbers(const MaybeTensor& t) { return t.has_value() ? numbers(*t) : Numbers{}; }

inline void table_of(const Tensor& coefficients, Rows table[5]) {
  TORCH_CHECK(coefficients.dim() == 3 && coefficients.scalar_type() == at::kDouble,
              "guard_ops: coefficients needs float64 [5, K, B]");
  for (int n = 0; n < 5; ++n) {
    table[n] = {coefficients.const_data_ptr<double>() + n * coefficients.stride(0),
                coefficients.stride(1), coefficients.stride(2)};
  }
}

inline Form form_of(const MaybeTensor& old_mean, const MaybeTensor& old_model_output,
                    const MaybeTensor& noise, const MaybeTensor& seed) {
  if (seed) return Form::seeded;
  if (noise) return Form::noise;
  if (old_model_output) return Form::velocity;
  return old_mean ? Form::mean : Form::log_prob;
}

#define GUARD_OPS_OPERANDS                                                                    \
  const Tensor &model_output, const MaybeTensor &model_output_uncond,                         \
      const MaybeTensor &ref_model_output, const MaybeTensor &sample,                         \
      const MaybeTensor &prev_sample, const MaybeTensor &old_mean,                            \
      const MaybeTensor &old_model_output, const MaybeTensor &noise, const MaybeTensor &seed, \
      [[maybe_unused]] const Tensor &coefficients, double guidance_scale
#define GUARD_OPS_PASS                                                                \
  model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean, \
      old_model_output, noise, seed, coefficients, guidance_scale

inline Batch batch_of(GUARD_OPS_OPERANDS) {
  Batch t{};
  t.form = form_of(old_mean, old_model_output, noise, seed);
  t.steps = model_output.size(0);
  t.batch = model_output.size(1);
  t.numel = model_output.size(2);
  t.v = operand(model_output);
  t.uncond = operand(model_output_uncond);
  t.ref = operand(ref_model_output);
  t.x = operand(sample);
  t.y = operand(prev_sample);
  t.m = operand(old_mean);
  t.v_old = operand(old_model_output);
  t.noise = operand(noise);
  for (const MaybeTensor& x : {MaybeTensor(model_output), model_output_uncond, ref_model_output,
                               sample, prev_sample, old_mean, old_model_output, noise}) {
    if (!x) continue;
    t.wide = t.wide || x->scalar_type() == at::kDouble;
    TORCH_CHECK(x->sizes() == model_output.sizes(), "guard_ops: operands differ in shape");
  }
  if (seed) {
    TORCH_CHECK(seed->scalar_type() == at::kLong && seed->dim() == 3 && seed->size(2) == 2,
                "guard_ops: seed needs int64 [K, B, 2]");
    t.seeds = {seed->const_data_ptr<int64_t>(), seed->stride(0), seed->stride(1), seed->stride(2)};
  }
  t.guidance_scale = guidance_scale;
  return t;
}

inline at::ScalarType compute_type(const Batch& t) { return t.wide ? at::kDouble : at::kFloat; }

#define GUARD_OPS_OBJECTIVE                                                                   \
  const Tensor &advantages, const MaybeTensor &old_log_prob, const MaybeTensor &step_weights, \
      const MaybeTensor &mean_std, int64_t ratio_norm, int64_t balance, bool detach_stats,    \
      bool mean_reduction, bool drop, bool gaussian, double target_std, double std_floor,     \
      double clip_low, double clip_high, double adv_clip, double weight_floor, double kl_beta
#define GUARD_OPS_PASS_LOSS                                                                     \
  t, coefficients, advantages, old_log_prob, step_weights, mean_std, ratio_norm, balance,       \
      detach_stats, mean_reduction, drop, gaussian, target_std, std_floor, clip_low, clip_high, \
      adv_clip, weight_floor, kl_beta

// The operator guard_ops::guard_loss: loss, grad, grad_uncond, per_row, metrics, sum_grads.
using GuardLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(GUARD_OPS_OPERANDS,
                                                                             GUARD_OPS_OBJECTIVE,
                                                                             bool cond,
                                                                             bool uncond);

// `stats` keeps the memory of the statistics that the problem points to.
inline Problem problem_of(const Batch& t, const Tensor& coefficients, GUARD_OPS_OBJECTIVE,
                          Tensor* stats) {
  Problem problem{};
  problem.config = {static_cast<RatioNorm>(ratio_norm),
                    static_cast<Balance>(balance),
                    detach_stats,
                    mean_reduction,
                    drop,
                    gaussian,
                    target_std,
                    std_floor,
                    clip_low,
                    clip_high,
                    adv_clip,
                    weight_floor,
                    kl_beta};
  problem.steps = t.steps;
  problem.batch = t.batch;
  problem.numel = t.numel;
  table_of(coefficients, problem.table);
  problem.advantages = numbers(advantages);
  problem.old_log_prob = numbers(old_log_prob);
  problem.step_weights = numbers(step_weights);
  if (mean_std) {
    *stats = mean_std->contiguous();
    problem.mean = stats->const_data_ptr<double>();
    problem.std = problem.mean + t.steps;
  }
  return problem;
}

#define GUARD_OPS_SCHEMA                                                                           \
  "Tensor model_output, Tensor? model_output_uncond, Tensor? ref_model_output, Tensor? sample, "   \
  "Tensor? prev_sample, Tensor? old_mean, Tensor? old_model_output, Tensor? noise, Tensor? seed, " \
  "Tensor coefficients, float guidance_scale"

}  // namespace guard_ops
