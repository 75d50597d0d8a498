"""The one-call tails: the loss, the gradient and what is logged are those of the script's block."""

from __future__ import annotations

import pytest
import restated
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import guard_ops as go
from benchmarks import measure, scripts
from guard_ops.integrations import dance_grpo, flow_factory, flow_grpo, steps, verl_omni

SHAPE = (6, 4, 8, 8)
VARIANTS = {
    "flow_grpo, KL": scripts.Contender(
        scripts._given(scripts.flow_grpo_original, rationorm=False, beta=0.04),
        scripts._given(scripts.flow_grpo_tail, rationorm=False, beta=0.04),
    ),
    "flow_grpo, GRPO-Guard, KL": scripts.Contender(
        scripts._given(scripts.flow_grpo_original, rationorm=True, beta=0.04),
        scripts._given(scripts.flow_grpo_tail, rationorm=True, beta=0.04),
    ),
    "flow_grpo, Wan2.1, KL": scripts.Contender(
        scripts._given(scripts.wan_original, beta=0.04),
        scripts._given(scripts.wan_tail, beta=0.04),
    ),
    **{
        f"Flow-Factory, {name}, {kl_type} KL": scripts.Contender(
            scripts._given(
                scripts.flow_factory_original, guarded=guarded, kl_beta=0.04, kl_type=kl_type
            ),
            scripts._given(
                scripts.flow_factory_tail, guarded=guarded, kl_beta=0.04, kl_type=kl_type
            ),
        )
        for name, guarded in (("GRPO", False), ("GRPO-Guard", True))
        for kl_type in ("v-based", "x-based")
    },
}


def kinds(name):
    """The steps that a framework's scripts train with."""
    if "Wan" in name:
        return ("wan_sde",)
    if name.startswith("DanceGRPO"):
        return ("dance_sde",)
    if name.startswith("flow_grpo"):
        return ("flow_sde", "cps")
    return ("flow_sde", "dance_sde", "cps")


CASES = [
    (name, contender, kind)
    for name, contender in (scripts.CONTENDERS | VARIANTS).items()
    for kind in kinds(name)
]


@pytest.mark.parametrize("mixed", [False, True], ids=["one timestep", "mixed timesteps"])
@pytest.mark.parametrize("name, contender, kind", CASES, ids=[f"{c[0]}, {c[2]}" for c in CASES])
def test_loss_gradient_and_info_are_the_scripts(name, contender, kind, mixed):
    """The originals round per float32 operator; two log-probs of order 1 differ by 1e-7, which is
    what their losses and the shares near a clip bound show."""
    if mixed and name == "DanceGRPO":
        pytest.skip("its batch has one sample, and one timestep")
    batch, velocity = scripts.make_batch(SHAPE, kind, mixed)
    found = []
    for block in (contender.original, contender.tail):
        v = velocity.clone().requires_grad_()
        loss, info = block(batch, v)
        loss.backward()
        found.append((loss.detach(), v.grad, info))
    (loss, grad, info), (ours, our_grad, our_info) = found
    torch.testing.assert_close(ours, loss, rtol=3e-6, atol=3e-6)
    assert (grad - our_grad).norm() <= 2e-5 * grad.norm()
    assert grad.any()
    assert sorted(our_info) == sorted(info)
    for key, value in info.items():
        value, mine = (torch.as_tensor(x).detach().double() for x in (value, our_info[key]))
        assert mine.shape == value.shape, key
        torch.testing.assert_close(mine, value, rtol=1e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("name", scripts.CONTENDERS)
def test_info_keeps_no_graph(name):
    batch, velocity = scripts.make_batch(SHAPE, scripts.CONTENDERS[name].kind)
    _, info = scripts.CONTENDERS[name].tail(batch, velocity.requires_grad_())
    for value in info.values():
        assert not (isinstance(value, torch.Tensor) and value.requires_grad)


GUARDED = [name for name, contender in scripts.CONTENDERS.items() if contender.guarded]


@pytest.mark.parametrize("name", GUARDED)
def test_guard_ratio_is_exactly_one_on_policy(name):
    """From the stored mean; the originals' is 1 only to the rounding of two log-probs."""
    batch, velocity = scripts.make_batch(SHAPE)
    coeffs = go.SdeSchedule(batch.sigmas, scripts.LEVEL)[scripts.J]
    x = batch.sample["latents"][:, 0]
    mean = go.sde_step(velocity, x, coeffs, noise=torch.zeros_like(x)).mean
    batch.sample["prev_sample_mean"] = mean.unsqueeze(1)
    batch.sample["log_probs"] += 0.1  # which this ratio does not need
    _, info = scripts.CONTENDERS[name].tail(batch, velocity)
    if "ratio" in info:
        assert (info["ratio"] == 1).all()
    elif "actor/ratio_mean" in info:
        assert info["actor/ratio_mean"] == 1.0
        assert info["actor/ratio_std"] == 0.0
    else:
        assert info["approx_kl"] == 0
        assert info["clipfrac"] == 0


@pytest.mark.parametrize("dynamics", flow_factory.KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["Euler", "UniPC"])
def test_flow_factorys_ratio_is_one_on_policy_at_every_step(which, dynamics):
    """UniPC begins at 0.9999, or 0.999 as a timestep, where the step divides by ``1 - sigma``."""
    pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
    unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    make = restated.flow_factory_schedulers()[which]
    scheduler = make(dynamics_type=dynamics, **(unipc if which else {"shift": 3.0}))
    scheduler.set_timesteps(8)
    ends = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)]).float()
    generator = torch.Generator().manual_seed(4)
    for k in range(7 if dynamics == "CPS" else 8):  # its last step, without noise, has no scale
        x, v = torch.randn((2, *SHAPE), generator=generator)
        given = {"timestep_next": ends[k + 1], "noise_level": scripts.LEVEL, "return_dict": False}
        y, mean, _, log_prob, *_ = flow_factory.step(
            scheduler, v, ends[k], x, generator=generator, **given
        )
        tail = (scheduler, v, ends[k], ends[k + 1], x, y, torch.ones(len(x)))
        args = scripts.flow_factory_args()
        guarded = flow_factory.training_loss(*tail, args, old_next_latents_mean=mean)
        assert (guarded.loss_info["ratio"] == 1).all(), k
        plain = flow_factory.training_loss(*tail, args, old_log_prob=log_prob)
        # from a log-prob that was rounded to float32, the last step's of up to 8
        torch.testing.assert_close(
            plain.loss_info["ratio"], torch.ones(len(x)), rtol=0, atol=1e-6, msg=str(k)
        )


@pytest.mark.parametrize("name, contender", (scripts.CONTENDERS | VARIANTS).items())
def test_a_velocity_that_is_no_number_is_seen(name, contender):
    """An optimizer's step with zeros for what could not be computed would go unnoticed."""
    batch, velocity = scripts.make_batch(SHAPE, contender.kind)
    velocity[1, 0, 0, 0] = torch.nan
    v = velocity.requires_grad_()
    loss, _ = contender.tail(batch, v)
    loss.backward()
    assert loss.isnan()
    assert v.grad[1].isnan().any()
    seen = v.grad.flatten(1).isnan().any(1)
    one_bias = name.startswith("flow_grpo, GRPO-Guard")  # which is in every ratio
    assert seen.all() if one_bias else seen.tolist() == [False, True] + [False] * 4


@pytest.mark.parametrize("batch_size, bias", [(6, "sample"), (1, "batch"), (1, "sample")])
def test_flow_grpos_guard_is_one_pass_where_samples_do_not_meet(batch_size, bias, monkeypatch):
    """Of samples at one timestep the scale is the density's s: exact on policy, as the others."""
    batch, velocity = scripts.make_batch((batch_size, *SHAPE[1:]))
    x, config = batch.sample["latents"][:, 0], scripts.flow_grpo_config(True)
    coeffs = go.SdeSchedule(batch.sigmas, scripts.LEVEL)[scripts.J]
    given = (batch.sample, 0, config)

    def run():
        v = velocity.clone().requires_grad_()
        out = flow_grpo.training_loss(batch.scheduler, v, *given, bias_reduction=bias)
        out.loss.backward()
        return out, v.grad

    two, expected = run_in_two_passes(monkeypatch, run)
    one, grad = run()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)
    for key, value in two.info.items():
        torch.testing.assert_close(one.info[key], value, rtol=1e-6, atol=1e-9)
    mean = go.sde_step(velocity, x, coeffs, noise=torch.zeros_like(x)).mean
    batch.sample["prev_sample_mean"] = mean.unsqueeze(1)
    on_policy, _ = run()
    assert on_policy.info["approx_kl"] == 0
    assert on_policy.info["clipfrac"] == 0
    advantages = batch.sample["advantages"].double().clamp(-scripts.ADV_CLIP, scripts.ADV_CLIP)
    torch.testing.assert_close(
        on_policy.loss.double(), (advantages.mean() / coeffs.dt), rtol=1e-6, atol=0
    )


def run_in_two_passes(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(steps, "is_one_step", lambda index, batch: False)
        return run()


def test_which_steps_are_one_is_known_without_a_device():
    assert steps.is_one_step((3, 3, 3), 3)
    assert not steps.is_one_step((3, 2, 3), 3)
    assert not steps.is_one_step(torch.tensor([3, 3]), 2)  # the host would have to wait
    assert steps.is_one_step(torch.tensor([3]), 1)


def test_verl_omnis_loss_mode_is_one_that_is_known():
    batch, v = scripts.make_batch(SHAPE)
    sample = batch.sample
    micro_batch = {
        "all_latents": sample["all_latents"], "all_timesteps": sample["timesteps"],
        "advantages": sample["advantages"], "old_log_probs": sample["log_probs"],
        "old_prev_sample_mean": sample["prev_sample_mean"],
    }  # fmt: skip
    algo = scripts.SimpleNamespace(noise_level=scripts.LEVEL, sde_type="sde")
    model = scripts.SimpleNamespace(algo=algo)

    def loss(mode):
        config = scripts.verl_config(mode)
        return verl_omni.training_loss(batch.scheduler, v, micro_batch, 0, config, model)[0].item()

    plain, guarded = loss("flow_grpo"), loss("grpo_guard")
    assert plain != guarded
    assert loss("flow_grpo_fused") == loss("dance_grpo") == plain
    assert loss("grpo_guard_fused") == guarded
    for mode in ("flow_dppo", "my_guard", "safeguarded"):
        with pytest.raises(ValueError, match=rf"`config.diffusion_loss.loss_mode` is '{mode}'"):
            loss(mode)


@pytest.mark.parametrize("guarded", [False, True])
def test_verl_omni_with_one_sample_has_a_ratio_std(guarded):
    """torch's std of one number is NaN, which a mean over micro-batches would spread."""
    batch, velocity = scripts.make_batch((1, *SHAPE[1:]))
    _, metrics = scripts.verl_tail(batch, velocity, guarded=guarded)
    assert metrics["actor/ratio_std"] == 0.0
    old, mean, advantages = (
        batch.sample[name][:, 0] for name in ("log_probs", "prev_sample_mean", "advantages")
    )
    given = {"old_log_prob": old, "log_prob": old + 0.01, "advantages": advantages,
             "config": scripts.verl_config("flow_grpo")}  # fmt: skip
    if guarded:
        given |= {"old_prev_sample_mean": mean, "prev_sample_mean": mean + 0.01,
                  "std_dev_t": torch.ones(1, 1, 1, 1), "sqrt_dt": torch.ones(1)}  # fmt: skip
    loss = verl_omni.GRPOGuardFusedLoss if guarded else verl_omni.FlowGRPOFusedLoss
    assert loss.compute_loss(**given)[1]["actor/ratio_std"] == 0.0


@pytest.mark.parametrize("guarded", [False, True])
def test_verl_omnis_metrics_of_a_policy_that_has_run_away_are_numbers(guarded):
    batch, velocity = scripts.make_batch(SHAPE)
    velocity[0] *= 1e4
    velocity[1] = torch.nan
    _, metrics = scripts.verl_tail(batch, velocity, guarded=guarded)
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["actor/ratio_mean"] != metrics["actor/ratio_mean"]  # NaN, and no error


def test_rejected_samples_have_no_weight():
    batch, velocity = scripts.make_batch(SHAPE)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 2])
    losses = []
    for given in (None, weights):
        sample = batch.sample
        micro_batch = {
            "all_latents": torch.cat([sample["latents"], sample["next_latents"]], 1),
            "all_timesteps": sample["timesteps"], "advantages": sample["advantages"],
            "old_log_probs": sample["log_probs"], "rollout_is_weights": given,
        }  # fmt: skip
        algo = scripts.SimpleNamespace(noise_level=scripts.LEVEL, sde_type="sde")
        v = velocity.clone().requires_grad_()
        loss, _ = verl_omni.training_loss(
            batch.scheduler, v, micro_batch, 0, scripts.verl_config("flow_grpo"),
            scripts.SimpleNamespace(algo=algo),
        )  # fmt: skip
        loss.backward()
        losses.append(v.grad.flatten(1).norm(dim=1))
    torch.testing.assert_close(losses[1], losses[0] * weights)


class Dispatched(TorchDispatchMode):
    """Counts the operators that torch dispatches, views included, which take as long as others."""

    def __enter__(self):
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


# What a tail computes besides the loss, its backward included: what its script logs. The originals
# compute 101 to 143. Then what it dispatches more than guard_loss on the same timestep: that,
# views, and a timestep of what guard_loss has no use for.
COMPUTED = {
    "flow_grpo": (3, 6),
    "flow_grpo, GRPO-Guard": (29, 29),  # two passes, and between them its coupled ratios
    "flow_grpo, Wan2.1": (3, 4),
    "DanceGRPO": (1, 1),
    "verl-omni": (0, -2),
    "verl-omni, GRPO-Guard": (0, -1),
    "Flow-Factory": (7, 11),
    "Flow-Factory, GRPO-Guard": (7, 11),
}


@pytest.mark.parametrize("name, contender", scripts.CONTENDERS.items())
def test_a_tail_is_few_operators_more_than_guard_loss(name, contender):
    """A latent takes as long as tens of them: each shows in a tail's time."""
    if "cpu" not in go.available_backends():
        pytest.skip("the extension is not built")
    batch, velocity = scripts.make_batch(SHAPE, contender.kind)
    v = velocity.requires_grad_()
    alone = scripts.guard_loss(batch, contender.guarded)

    def counted(loss):
        def call():
            torch.autograd.grad(loss(v), v)

        call()  # a tail's timestep is known from then on
        with Dispatched() as mode:
            call()
        return measure.traffic(call, v.numel()).operators, mode.count

    computed, dispatched = counted(lambda v: contender.tail(batch, v)[0])
    computed_alone, dispatched_alone = counted(alone)
    found = (computed - computed_alone, dispatched - dispatched_alone)
    for more, most in zip(found, COMPUTED[name], strict=True):
        assert more <= most, f"it computes and dispatches {found} more than guard_loss"


@pytest.mark.parametrize("rationorm, beta", [(True, 0.0), (False, 0.04)], ids=["coupled", "KL"])
def test_a_tail_of_two_passes_is_traced_whole(rationorm, beta):
    batch, velocity = scripts.make_batch(SHAPE)
    config = scripts.flow_grpo_config(rationorm, beta)

    def loss(v):
        given = (batch.scheduler, v, batch.sample, 0, config, batch.reference)
        return flow_grpo.training_loss(*given).loss

    v = velocity.requires_grad_()
    (expected,) = torch.autograd.grad(loss(v), v)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(v), v)
    torch.testing.assert_close(found, expected)


def test_weights_of_another_shape_are_refused_in_two_passes_too():
    """Where they would be broadcast to every pair of samples."""
    batch, v = scripts.make_batch(SHAPE, "dance_sde")
    sample = batch.sample
    micro_batch = {
        "all_latents": sample["all_latents"], "all_timesteps": sample["timesteps"],
        "advantages": sample["advantages"], "old_prev_sample_mean": sample["prev_sample_mean"],
        "rollout_is_weights": torch.ones(6, 1),
    }  # fmt: skip
    algo = scripts.SimpleNamespace(noise_level=scripts.LEVEL, sde_type="dance_sde")
    given = (micro_batch, 0, scripts.verl_config("grpo_guard"), scripts.SimpleNamespace(algo=algo))
    with pytest.raises(ValueError, match=r"`step_weights` has shape \(6, 1\)"):
        verl_omni.training_loss(batch.scheduler, v, *given)


@pytest.mark.parametrize("name, contender", scripts.CONTENDERS.items())
def test_a_devices_lookup_is_the_hosts(name, contender, monkeypatch):
    """On an accelerator nothing is looked up by the host, which would have to wait for it."""
    batch, velocity = scripts.make_batch(SHAPE, contender.kind, mixed=name != "DanceGRPO")
    found = []
    for host in (True, False):
        if not host:
            monkeypatch.setattr(steps, "_on_host", lambda x: False)
            monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
        v = velocity.clone().requires_grad_()
        loss, _ = contender.tail(batch, v)
        loss.backward()
        found.append((loss.detach(), v.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name, contender", scripts.CONTENDERS.items())
def test_a_rollout_in_inference_mode_leaves_nothing_behind(name, contender):
    """Its schedules are kept, and serve the update as well."""
    steps._known.cache_clear()
    steps._known_at.cache_clear()
    steps._schedule.cache_clear()
    with torch.inference_mode():
        inside, velocity = scripts.make_batch(SHAPE, contender.kind, seed=3)
        contender.tail(inside, velocity)
    batch, velocity = scripts.make_batch(SHAPE, contender.kind, seed=3)
    v = velocity.requires_grad_()
    contender.tail(batch, v)[0].backward()
    assert v.grad.any()


def test_qwen_image_scripts_divide_both_losses():
    batch, velocity = scripts.make_batch(SHAPE)
    whole, part = (
        flow_grpo.training_loss(
            batch.scheduler, velocity, batch.sample, 0,
            scripts.flow_grpo_config(False, beta=0.04), batch.reference,
            gradient_accumulation_steps=n,
        )
        for n in (1, 4)
    )  # fmt: skip
    for key in ("policy_loss", "kl_loss", "loss"):
        torch.testing.assert_close(part.info[key] * 4, whole.info[key])


def test_the_guard_scripts_kl_of_a_step_with_hardly_any_noise():
    """It adds 1e-7 to ``2 std^2``, which is 1.4e-5 at this noise level."""
    batch, velocity = scripts.make_batch(SHAPE)
    std = go.SdeSchedule(batch.sigmas, 1e-3)[scripts.J]
    variance = float(std.s**2 / -std.dt)
    kl = []
    for rationorm in (False, True):
        config = scripts.flow_grpo_config(rationorm, beta=0.04)
        config.sample.noise_level = 1e-3
        out = flow_grpo.training_loss(
            batch.scheduler, velocity, batch.sample, 0, config, batch.reference
        )
        kl.append(float(out.info["kl_loss"]))
    assert kl[0] / kl[1] == pytest.approx(1 + 1e-7 / (2 * variance), rel=1e-6)
    assert kl[0] / kl[1] > 1.005


def test_the_papers_bias_is_per_sample():
    """The published script's is one mean over the batch (its issue 244)."""
    batch, velocity = scripts.make_batch(SHAPE)
    batch.sample["prev_sample_mean"][0] += 0.1
    whole, each = (
        flow_grpo.training_loss(
            batch.scheduler, velocity, batch.sample, 0,
            scripts.flow_grpo_config(True), bias_reduction=reduction,
        ).loss
        for reduction in ("batch", "sample")
    )  # fmt: skip
    assert abs(whole - each) > 1e-3


def test_bad_input_names_the_argument():
    batch, v = scripts.make_batch(SHAPE)
    scheduler, config = batch.scheduler, scripts.flow_grpo_config(False, beta=0.1)
    with pytest.raises(ValueError, match=r"`noise_pred_ref` is missing; with `config.train.beta`"):
        flow_grpo.training_loss(scheduler, v, batch.sample, 0, config)
    with pytest.raises(ValueError, match=r"`sde_type` is 'ddim'"):
        flow_grpo.training_loss(scheduler, v, batch.sample, 0, config, v, sde_type="ddim")
    x, old = batch.sample["latents"][:, 0], batch.sample["log_probs"][:, 0]
    given = (scheduler, v, 900.0, 800.0, x, x, old)
    args = scripts.flow_factory_args()
    with pytest.raises(ValueError, match="exactly one of `old_log_prob` and"):
        flow_factory.training_loss(*given, args)
    args.kl_beta = 0.1
    with pytest.raises(ValueError, match="`ref_noise_pred` is missing"):
        flow_factory.training_loss(*given, args, old_log_prob=old)
    scheduler.dynamics_type = "ODE"
    with pytest.raises(ValueError, match=r"`scheduler\.dynamics_type` is 'ODE'; a policy needs"):
        flow_factory.training_loss(*given, args, old_log_prob=old)
    with pytest.raises(ValueError, match="`index` is 10; with 11 sigmas"):
        dance_grpo.training_loss(scripts.DANCE_ARGS, v, x, x, old, old, batch.sigmas, 10, 1)
