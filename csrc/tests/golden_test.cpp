// The float64 kernels of every instruction set against the specification's numbers in
// tests/data/objective_f64.npz: loss, diagnostics and gradient of every case and variant.
#include <set>

#include "../cpu/driver.h"
#include "check.h"
#include "npz.h"

namespace guard_ops::test {
namespace {

using cpu::Batch;
using cpu::DType;
using cpu::Evaluation;
using cpu::Operand;
using cpu::Problem;

struct Variant {
  const char* name;
  Config config;
};

std::vector<Variant> variants(bool gaussian) {
  Config plain{};  // the defaults of docs/math.md
  plain.detach_stats = true;
  plain.gaussian = gaussian;
  plain.target_std = 1;
  plain.std_floor = 1e-8;
  plain.clip_low = plain.clip_high = 1e-4;
  plain.adv_clip = 5;
  plain.weight_floor = 0.1;

  Config sum = plain;
  sum.clip_low = 0.1;
  sum.clip_high = 0.3;
  sum.adv_clip = 1;
  sum.reduction = Reduction::sum;

  Config article = plain;
  article.ratio_norm = RatioNorm::standardize;
  article.balance = Balance::inverse_ratio;
  article.clip_low = article.clip_high = 0.2;
  Config through = article, target = article, kl = article;
  through.detach_stats = false;
  target.balance = Balance::none;
  target.target_std = 0.05;
  target.clip_low = 0.02;
  target.clip_high = 0.04;
  kl.kl_beta = 0.04;

  Config paper = plain;
  paper.ratio_norm = RatioNorm::closed_form;
  paper.balance = Balance::inverse_dt;
  paper.clip_low = paper.clip_high = 2e-6;
  Config paper_wide = paper;
  paper_wide.clip_low = 0.01;
  paper_wide.clip_high = 0.02;

  std::vector<Variant> out = {{"plain", plain},           {"plain_asym_sum", sum},
                              {"article", article},       {"article_through_stats", through},
                              {"article_target", target}, {"article_kl", kl}};
  if (gaussian) {
    out.push_back({"paper", paper});
    out.push_back({"paper_wide", paper_wide});
  }
  return out;
}

double largest(const double* x, int64_t n) {
  double out = 0;
  for (int64_t i = 0; i < n; ++i) out = std::max(out, std::fabs(x[i]));
  return out;
}

// One golden case: its inputs and coefficients, and the operands of the mean and noise forms, which
// are computed from them.
struct Case {
  const Npz& file;
  std::string name;
  int64_t steps, batch, numel;
  Array v, v_old, ref, x, y, advantages, table[5];
  std::vector<double> m, noise;

  Case(const Npz& file, const std::string& name)
      : file(file),
        name(name),
        v(at("model_output")),
        v_old(at("old_model_output")),
        ref(at("ref_model_output")),
        x(at("sample")),
        y(at("prev_sample")),
        advantages(at("advantages")),
        table{at("a"), at("b"), at("s"), at("kappa"), at("dt")} {
    steps = v.shape[0];
    batch = v.shape[1];
    numel = int64_t(v.data.size()) / (steps * batch);
    for (size_t n = 0; n < v.data.size(); ++n) {
      const int64_t k = int64_t(n) / (batch * numel);
      const double a = table[0].data[k], b = table[1].data[k], s = table[2].data[k];
      m.push_back(std::fma(b, v_old.data[n], a * x.data[n]));
      noise.push_back((y.data[n] - m.back()) / s);
    }
  }

  Array at(const std::string& key) const { return file[name + "/" + key]; }

  Operand operand(const std::vector<double>& data) const {
    return {const_cast<double*>(data.data()), DType::f64, batch * numel, numel};
  }

  Batch of(Form form, bool with_ref) const {
    Batch t{};
    t.form = form;
    t.wide = true;
    t.steps = steps;
    t.batch = batch;
    t.numel = numel;
    t.v = operand(v.data);
    if (with_ref) t.ref = operand(ref.data);
    t.x = operand(x.data);
    t.y = operand(y.data);
    t.m = operand(m);
    t.v_old = operand(v_old.data);
    t.noise = operand(noise);
    return t;
  }

  Problem problem(const Config& config) const {
    Problem out{};
    out.config = config;
    out.steps = steps;
    out.batch = batch;
    out.numel = numel;
    for (int n = 0; n < 5; ++n) out.table[n] = {table[n].data.data(), 1, 0};
    out.advantages = {advantages.data.data(), 0, 1};
    return out;
  }

  // Checks that numbers are within 1e-9 of the expected ones, relative to the largest of the same
  // block (a step, a row) or to `least`.
  void check(const char* what, const double* got, const std::vector<double>& expected,
             int64_t block, double offset = 0, double least = 0) const {
    const int64_t count = int64_t(expected.size());
    for (int64_t n = 0; n < count; ++n) {
      CONTEXT("%s %s[%ld]", name.c_str(), what, long(n));
      const double size = largest(&expected[n / block * block], std::min(block, count));
      CHECK_CLOSE(got[n], expected[n] - offset, 1e-9 * std::max(size, least));
    }
  }
};

void test_variant(const cpu::Kernels& kernels, const Case& in, Form form, const Variant& variant) {
  const auto serial = [](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    body(0, n);
  };
  const cpu::Machine machine{kernels, serial, 1, 0};
  std::vector<double> grad(in.v.data.size(), NAN);
  const Evaluation got = cpu::guard_loss(machine, in.of(form, variant.config.kl_beta != 0),
                                         in.problem(variant.config), in.operand(grad), {});
  const auto golden = [&](const char* key) {
    return in.at(std::string(variant.name) + "/" + key).data;
  };
  in.check("loss", &got.loss, golden("loss"), 1, 0, 1);
  in.check("log_ratio", got.log_ratio.data(), golden("log_ratio"), in.batch);
  in.check("excess", got.excess.data(), golden("ratio_hat_minus_one"), in.batch);
  in.check("weights", got.weights.data(), golden("weights"), 1);
  const auto metric = [&](int n) { return got.metrics.data() + n * in.steps; };
  in.check("ratio_mean", metric(0), golden("ratio_mean"), 1, 1);
  in.check("ratio_std", metric(1), golden("ratio_std"), 1);
  in.check("ratio_hat_mean", metric(2), golden("ratio_hat_mean"), 1, 1);
  in.check("ratio_hat_std", metric(3), golden("ratio_hat_std"), 1);
  in.check("clip_fraction", metric(4), golden("clip_fraction"), 1);
  if (variant.config.kl_beta != 0) {
    double kl = 0;
    for (const double x : got.kl) kl += x / double(got.kl.size());
    in.check("kl", &kl, golden("kl"), 1);
  }
  // With two samples the statistics take the whole gradient away, and what is left is rounding.
  const bool vanishes = !variant.config.detach_stats && in.batch == 2;
  const Array article = in.at("article/grad");
  const double least = vanishes ? largest(article.data.data(), int64_t(article.data.size())) : 0;
  in.check("grad", grad.data(), golden("grad"), in.numel, 0, least);
}

}  // namespace
}  // namespace guard_ops::test

int main() {
  using namespace guard_ops;
  const test::Npz file(GUARD_OPS_TEST_DATA "/objective_f64.npz");
  std::set<std::string> names;
  for (const std::string& key : file.names()) names.insert(key.substr(0, key.find('/')));
  CHECK(names.size() == 24);
  for (const std::string& name : names) {
    const test::Case in(file, name);
    for (const auto& variant : test::variants(name.substr(0, 3) != "cps")) {
      for (const char* isa : cpu::isa_names) {
        const cpu::Kernels* kernels = cpu::kernels(isa);
        if (kernels == nullptr) continue;
        for (const Form form : {Form::mean, Form::velocity, Form::noise}) {
          test::test_variant(*kernels, in, form, variant);
        }
      }
    }
  }
  return test::finish();
}
