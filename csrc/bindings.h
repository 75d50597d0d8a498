// What the operators of every device share: torch's tensors as the kernels' operands. Only the
// files called bindings know torch. They include its operators one by one: the header of all of
// them takes as long to compile as the rest of a file.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "objective.h"

namespace guard_ops {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using TensorList = c10::List<MaybeTensor>;

// Every operator over latents takes these: Transitions, in guard_ops/transitions.py.
#define GUARD_OPS_SCHEMA \
  "Tensor?[] latents, Tensor? seed, Tensor coefficients, float guidance_scale"
#define GUARD_OPS_OPERANDS                                                        \
  const TensorList &latents, const MaybeTensor &seed, const Tensor &coefficients, \
      double guidance_scale
#define GUARD_OPS_PASS latents, seed, coefficients, guidance_scale

// The latents that a rollout's step may have, in the order of guard_ops.transitions.STEP_LATENTS.
#define GUARD_OPS_STEP_LATENTS(X) \
  X(v, model_output)              \
  X(uncond, model_output_uncond)  \
  X(x, sample)                    \
  X(noise, noise)

// And a loss takes these besides them: Rows of guard_ops/transitions.py, [K, B] each but the
// last, which is [3, K], and Objective of guard_ops/config.py.
#define GUARD_OPS_ROWS(X) X(advantages) X(old_log_prob) X(step_weights) X(elements) X(statistics)
#define GUARD_OPS_LOSS_SCHEMA "Tensor?[] rows, int[] choices, float[] numbers"
#define GUARD_OPS_LOSS_OPERANDS \
  const TensorList &rows, at::IntArrayRef choices, at::ArrayRef<double> numbers

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

// The mask, whose rows may be one and the same.
inline Mask mask_of(const MaybeTensor& t, const Tensor& model_output) {
  if (!t.has_value()) return {};
  TORCH_CHECK(t->scalar_type() == at::kBool && t->sizes() == model_output.sizes() &&
                  (t->size(2) == 1 || t->stride(2) == 1),
              "guard_ops: mask needs bool [K, B, D] with dense latents");
  return {static_cast<const uint8_t*>(t->const_data_ptr()), t->stride(0), t->stride(1)};
}

// A gradient, which is empty where nobody wants it.
inline Operand gradient_operand(const Tensor& t) { return t.numel() ? operand(t) : Operand{}; }

inline Doubles doubles_of(const Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && t.scalar_type() == at::kDouble, "guard_ops: needs float64 [K, B]");
  return {t.const_data_ptr<double>(), t.stride(0), t.stride(1)};
}

inline Reals reals_of(const MaybeTensor& t) {
  if (!t.has_value()) return {};
  const bool wide = t->scalar_type() == at::kDouble;
  TORCH_CHECK(t->dim() == 2 && (wide || t->scalar_type() == at::kFloat),
              "guard_ops: needs float64 or float32 [K, B]");
  return {t->const_data_ptr(), t->stride(0), t->stride(1), wide};
}

// Three numbers of each transition, [3, K, B]: its sums, or d loss / d sums.
inline std::array<Doubles, 3> triple_of(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 3 && t.size(0) == 3, "guard_ops: ", name, " needs [3, K, B]");
  return {doubles_of(t.select(0, 0)), doubles_of(t.select(0, 1)), doubles_of(t.select(0, 2))};
}

// The tensors of a call, by name.
struct LatentTensors {
#define GUARD_OPS_FIELD(field, name) MaybeTensor name;
  GUARD_OPS_LATENTS(GUARD_OPS_FIELD)
#undef GUARD_OPS_FIELD
  MaybeTensor mask;

  LatentTensors() = default;
  explicit LatentTensors(const TensorList& list) {
    size_t n = 0;
#define GUARD_OPS_TAKE(field, name) name = list.get(n++);
    GUARD_OPS_LATENTS(GUARD_OPS_TAKE)
#undef GUARD_OPS_TAKE
    mask = list.get(n++);
    TORCH_CHECK(n == list.size() && model_output, "guard_ops: latents needs ", n,
                ", of which the first is there");
  }
};

// A call's operands: as torch's tensors, and as the kernels take them.
struct Call {
  LatentTensors tensors;
  Batch batch{};
  Doubles table[5];

  Call(GUARD_OPS_OPERANDS) : Call(LatentTensors(latents), seed, coefficients, guidance_scale) {}
  Call(LatentTensors given, const MaybeTensor& seed, const Tensor& coefficients,
       double guidance_scale)
      : tensors(std::move(given)) {
    const Tensor& v = *tensors.model_output;
#define GUARD_OPS_PUT(field, name)                                                          \
  batch.field = operand(tensors.name);                                                      \
  if (tensors.name) {                                                                       \
    batch.wide = batch.wide || tensors.name->scalar_type() == at::kDouble;                  \
    TORCH_CHECK(tensors.name->sizes() == v.sizes(), "guard_ops: operands differ in shape"); \
  }
    GUARD_OPS_LATENTS(GUARD_OPS_PUT)
#undef GUARD_OPS_PUT
    batch.mask = mask_of(tensors.mask, v);
    batch.form = seed                       ? Form::seeded
                 : tensors.noise            ? Form::noise
                 : tensors.old_model_output ? Form::velocity
                 : tensors.old_mean         ? Form::mean
                                            : Form::log_prob;
    batch.steps = v.size(0);
    batch.batch = v.size(1);
    batch.numel = v.size(2);
    batch.guidance_scale = guidance_scale;
    if (seed) {
      TORCH_CHECK(seed->scalar_type() == at::kLong && seed->dim() == 3 &&
                      (seed->size(2) == 2 || seed->size(2) == 3),
                  "guard_ops: seed needs int64 [K, B, 2], or of a shard [K, B, 3]");
      batch.seeds = {seed->const_data_ptr<int64_t>(), seed->stride(0), seed->stride(1),
                     seed->stride(2), seed->size(2) == 3};
    }
    TORCH_CHECK(coefficients.dim() == 3 && coefficients.scalar_type() == at::kDouble,
                "guard_ops: coefficients needs float64 [5, K, B]");
    for (int n = 0; n < 5; ++n) {
      table[n] = {coefficients.const_data_ptr<double>() + n * coefficients.stride(0),
                  coefficients.stride(1), coefficients.stride(2)};
    }
  }

  const Tensor& model_output() const { return *tensors.model_output; }
  at::ScalarType compute_type() const { return batch.wide ? at::kDouble : at::kFloat; }
};

// The operands of a rollout's step: a call whose latents are none but those that a step may have.
inline Call step_call(GUARD_OPS_OPERANDS) {
  Call call(GUARD_OPS_PASS);
  size_t given = 0, of_step = 0;
#define GUARD_OPS_COUNT(field, name) given += bool(call.batch.field);
  GUARD_OPS_LATENTS(GUARD_OPS_COUNT)
#undef GUARD_OPS_COUNT
#define GUARD_OPS_COUNT(field, name) of_step += bool(call.batch.field);
  GUARD_OPS_STEP_LATENTS(GUARD_OPS_COUNT)
#undef GUARD_OPS_COUNT
  TORCH_CHECK(call.batch.x && given == of_step,
              "guard_ops: sde_step needs sample and no operand "
              "of the behaviour policy");
  TORCH_CHECK(bool(call.batch.noise) != seed.has_value(),
              "guard_ops: sde_step needs noise or seed");
  return call;
}

inline Config config_of(at::IntArrayRef choices, at::ArrayRef<double> numbers) {
  Config config{};
  size_t choice = 0, number = 0;
#define GUARD_OPS_COUNT(...) +1
  TORCH_CHECK(choices.size() == 0 GUARD_OPS_CHOICES(GUARD_OPS_COUNT) &&
                  numbers.size() == 0 GUARD_OPS_NUMBERS(GUARD_OPS_COUNT),
              "guard_ops: an objective of ", choices.size(), " choices and ", numbers.size(),
              " numbers is none of this build");
#undef GUARD_OPS_COUNT
#define GUARD_OPS_PUT(type, name) config.name = static_cast<type>(choices[choice++]);
  GUARD_OPS_CHOICES(GUARD_OPS_PUT)
#undef GUARD_OPS_PUT
#define GUARD_OPS_PUT(name) config.name = numbers[number++];
  GUARD_OPS_NUMBERS(GUARD_OPS_PUT)
#undef GUARD_OPS_PUT
  return config;
}

// A loss's [K, B] side, and the tensors whose memory it points to.
struct LossProblem {
#define GUARD_OPS_FIELD(name) MaybeTensor name;
  GUARD_OPS_ROWS(GUARD_OPS_FIELD)
#undef GUARD_OPS_FIELD
  Problem problem{};

  LossProblem(const Call& call, GUARD_OPS_LOSS_OPERANDS) {
    size_t n = 0;
#define GUARD_OPS_TAKE(name) name = rows.get(n++);
    GUARD_OPS_ROWS(GUARD_OPS_TAKE)
#undef GUARD_OPS_TAKE
    TORCH_CHECK(n == rows.size() && advantages, "guard_ops: rows needs ", n,
                ", of which the first is there");
    problem.config = config_of(choices, numbers);
    problem.steps = call.batch.steps;
    problem.batch = call.batch.batch;
    problem.numel = call.batch.numel;
    for (int c = 0; c < 5; ++c) problem.table[c] = call.table[c];
    problem.advantages = reals_of(advantages);
    problem.old_log_prob = reals_of(old_log_prob);
    problem.step_weights = reals_of(step_weights);
    problem.elements = reals_of(elements);
    problem.largest = call.compute_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                         : std::numeric_limits<float>::max();
    if (!statistics) return;
    TORCH_CHECK(
        statistics->dim() == 2 && statistics->size(0) == 3 && statistics->size(1) == problem.steps,
        "guard_ops: statistics needs shape [3, K]: mean, std, std_floor");
    statistics = statistics->contiguous();
    problem.mean = statistics->const_data_ptr<double>();
    problem.std = problem.mean + problem.steps;
    problem.floor = problem.std + problem.steps;
  }
};

// What guard_ops::guard_loss returns.
struct LossTensors {
  Tensor loss, grad, grad_uncond, per_row, metrics, sum_grads;

  LossTensors(const Call& call, Tensor grad, Tensor grad_uncond)
      : grad(std::move(grad)), grad_uncond(std::move(grad_uncond)) {
    const int64_t steps = call.batch.steps, batch = call.batch.batch;
    const auto options = call.model_output().options().dtype(call.compute_type());
    loss = at::empty({}, options);
    per_row = at::empty({4, steps, batch}, options);
    metrics = at::empty({metric_count, steps}, options);
    sum_grads = at::empty({3, steps, batch}, options.dtype(at::kDouble));
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {loss, grad, grad_uncond, per_row, metrics, sum_grads};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> without_gradients() const {
    return {loss, per_row, metrics, sum_grads};
  }
};

// The sums of a call's transitions, which it is given instead of forming them.
inline std::array<Doubles, 3> given_sums(const Tensor& sums, const Call& call) {
  const int64_t steps = call.batch.steps, batch = call.batch.batch;
  TORCH_CHECK(sums.dim() == 3 && sums.size(1) == steps && sums.size(2) == batch &&
                  sums.device() == call.model_output().device(),
              "guard_ops: sums needs [3, K, B] on the device of the latents");
  return triple_of(sums, "sums");
}

}  // namespace guard_ops
