"""The fused loss over ranks: against the one that is composed of plain PyTorch, and its cost."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import forked_ranks
import pytest
import torch
import torch.distributed as dist
from problems import operands, problem, relative, run
from runnable import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

import guard_ops as go
from guard_ops import backends, objective
from guard_ops.config import objective_of, rounding_of
from guard_ops.schedule import StepCoefficients
from guard_ops.transitions import Latents, Rows, Transitions

RANKS = 2
# Interpreted kernels would take minutes; of them, the operators alone are tested.
FUSED = [name for name in BACKENDS if name not in ("reference", "triton")]
ARTICLE = go.GuardConfig.article(clip_low=0.05, clip_high=0.05)
DROP = go.GuardConfig.article(nonfinite="drop", kl_beta=0.1)
# name: (form, dtype, config, whether latents are shared out instead of samples)
CASES = {
    "float64": ("velocity", torch.float64, ARTICLE, False),
    "mean": ("mean", torch.float32, ARTICLE, False),
    "bfloat16": ("noise", torch.bfloat16, ARTICLE, False),
    "float16": ("noise", torch.float16, ARTICLE, False),
    "log-prob": ("log-prob", torch.float64, ARTICLE, False),
    "masked": ("seeded", torch.float32, ARTICLE, False),
    "drop": ("velocity", torch.float32, DROP, False),
    "propagate": ("velocity", torch.float32, go.GuardConfig.article(kl_beta=0.1), False),
    "floor": ("velocity", torch.float32, go.GuardConfig.article(std_floor=0.5), False),
    "inverse_dt": ("mean", torch.float32, go.GuardConfig(balance="inverse_dt"), False),
    "paper": ("mean", torch.float32, go.GuardConfig.paper(clip_low=0.1), False),
    "shards": ("mean", torch.float32, ARTICLE, True),
    "masked shards": ("velocity", torch.bfloat16, ARTICLE, True),
    "given shards": ("velocity", torch.bfloat16, ARTICLE, True),
    "attached shards": (
        "velocity",
        torch.float32,
        go.GuardConfig.article(detach_stats=False),
        True,
    ),
}


def given_of(name, rank):
    """A rank's share of a case: of six samples two or four, or of each latent 10 or 20 elements."""
    form, dtype, config, shards = CASES[name]
    with go.use_backend("reference"):
        given = problem(form, batch=6, dtype=dtype, drift=0.3, reference=config.kl_beta > 0)
    if "masked" in name:
        given["mask"] = torch.arange(30).reshape(6, 5) % 7 != 0
    if name in ("drop", "propagate"):
        given["advantages"] = given["advantages"].expand(3, 6).clone()
        given["advantages"][0, :2] = math.nan  # of this step, rank 0 has nothing finite
        given["model_output"][1, 3] = math.inf
        given["advantages"][2] = math.nan  # nor has any rank of this
    coeffs = given.pop("coeffs")
    part = slice(0, 2) if rank == 0 else slice(2, 6)
    if shards:
        mine = {n: x[:, :, part] if x.ndim == 4 else x for n, x in given.items()}
        if "mask" in mine:
            mine["mask"] = mine["mask"][part]
    else:
        mine = {n: x[:, part] if x.ndim > 2 else x for n, x in given.items() if n != "mask"}
        mine["advantages"] = given["advantages"][..., part]
        if "old_log_prob" in mine:
            mine["old_log_prob"] = given["old_log_prob"][:, part]
        if "mask" in given:
            mine["mask"] = given["mask"]
    if "given" in name:  # not degenerate, which they would be by the floor of a part of 20 elements
        table = StepCoefficients._of(coeffs.table, coeffs.gaussian, ())
        square = objective.squared_gain(table, 30, config.reduction)
        floor = objective.std_floor(square, config, rounding_of(config, (dtype,), 1.0))
        count = torch.full((3,), 10.0).double()
        state = {"count": count, "mean": 0.01 * count, "root_m2": 1.1 * floor * count.sqrt()}
        mine["statistics"] = go.RatioStatistics(3)
        mine["statistics"].load_state_dict(state)
    group = "latent_group" if shards else "process_group"
    return {**mine, "coeffs": coeffs, group: dist.group.WORLD}, config


@contextlib.contextmanager
def composed():
    """Losses take the backend's sums and objective.py instead of its fused loss."""
    with mock.patch.object(backends, "max_batch", return_value=0):
        yield


class Operators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def gathers(self):
        return sum("allgather" in name for name in self.names)


def found(given, config):
    """(loss, everything else that does not round to the operands' dtype), gradient, operators"""
    with Operators() as operators:
        out, grad = run(given, config)
    numbers = [out.loss.detach(), out.log_ratio, out.excess, out.weights, out.kl, *out.metrics]
    return numbers, grad, (len(operators.names), operators.gathers())


def worker(rank):
    results = {}
    for backend in FUSED:
        with go.use_backend(backend):
            for name, (_, dtype, *_) in CASES.items():
                if backend == "cuda" and dtype == torch.float64:
                    continue
                given, config = given_of(name, rank)
                fused = found(given, config)
                with composed():
                    plain = found(given, config)
                with composed() if rank == 0 else contextlib.nullcontext():
                    mixed = found(given, config)
                results[backend, name] = fused, plain, mixed
    return results


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """What every rank got, from one start of the processes."""
    return forked_ranks.run(__name__, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", CASES)
def test_fused_and_composed_losses_agree(backend, name, by_rank):
    """Also where one rank's loss is fused and the other's composed."""
    _, dtype, *_ = CASES[name]
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels have no float64")
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7  # the rounding of float32 results
    for results in by_rank:
        (numbers, grad, _), (expected, expected_grad, _), (mixed, mixed_grad, _) = results[
            backend, name
        ]
        for got, number in zip([*numbers, *mixed], [*expected, *expected], strict=True):
            torch.testing.assert_close(got, number, rtol=tolerance, atol=1e-14, equal_nan=True)
        for got in (grad, mixed_grad):
            assert torch.equal(got.isnan(), expected_grad.isnan())
            assert relative(got.nan_to_num(), expected_grad.nan_to_num()) < tolerance


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", CASES)
def test_what_ranks_share_has_the_same_bits(backend, name, by_rank):
    _, dtype, _, shards = CASES[name]
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels have no float64")
    (first, *_), (second, *_) = (results[backend, name] for results in by_rank)
    for one, other in zip(first[0], second[0], strict=True):
        if shards:  # the latents are the same, and so is all that is said of them
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(first[0][-1], second[0][-1])  # which steps are degenerate


@pytest.mark.parametrize("backend", FUSED)
def test_operators_and_all_gathers_of_a_call(backend, by_rank):
    """Composed of plain PyTorch it has up to ten times as many; a group gathers once."""
    for results in by_rank:
        for name, (_, _, config, shards) in CASES.items():
            if (backend, name) not in results:
                continue
            fused, plain, _ = (count for _, _, count in results[backend, name])
            statistics = config.ratio_norm == "standardize"
            assert fused[1] == plain[1] == int(shards or statistics)
            most = 64 if "given" in name else 38 if shards else 60
            assert fused[0] <= most, name
            assert plain[0] > 3 * fused[0], name


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.skipif("triton" in BACKENDS, reason="tests/kernels have its operators")
@pytest.mark.parametrize("group", ["process_group", "latent_group"])
def test_the_number_of_operators_does_not_depend_on_the_number_of_ranks(
    group, fused_backend, alone, by_rank
):
    name = "mean" if group == "process_group" else "shards"
    given, config = given_of(name, 0)
    _, _, one = found(given, config)
    assert one == by_rank[0][fused_backend, name][0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_over_ranks_is_differentiated_like_any_other(dtype, fused_backend, alone):
    """Loss scale, a second backward, a gradient by no autograd: as of the ordinary call."""
    given = problem("noise", steps=2, dtype=dtype, drift=0.3)
    groups = {"process_group": alone, "latent_group": alone}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    grads = []
    for more in ({}, groups):
        v = given["model_output"].clone().requires_grad_()
        out = go.guard_loss(**{**given, "model_output": v}, config=ARTICLE, **more)
        (once,) = torch.autograd.grad(512.0 * out.loss, v, retain_graph=True)
        (again,) = torch.autograd.grad(512.0 * out.loss, v)
        assert torch.equal(once, again)
        pushed = go.guard_loss_and_grad(**given, config=ARTICLE, **more)
        assert torch.equal(pushed.loss, out.loss.detach())
        assert relative(pushed.grad, once / 512) < tolerance
        grads.append(once)
    assert relative(grads[1], grads[0]) < tolerance


def test_both_outputs_of_guidance_have_a_gradient_over_ranks(fused_backend, alone):
    given = problem("velocity", steps=2, dtype=torch.float32, guided=True)
    expected = go.guard_loss_and_grad(**given, config=ARTICLE)
    got = go.guard_loss_and_grad(**given, config=ARTICLE, process_group=alone)
    for one, other in zip(got.grad, expected.grad, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.slow_suite  # some 500 operators are traced
def test_a_traced_loss_over_ranks_is_the_eager_one(fused_backend, alone):
    """It is composed, as torch.compile traces collectives and no buffers that outlive a call."""
    given = problem("mean", steps=2, dtype=torch.float32, drift=0.3)
    v, groups = given.pop("model_output"), {"process_group": alone, "latent_group": alone}

    def step(v, given):
        out = go.guard_loss(v, **given, config=ARTICLE, **groups)
        return out.loss, out.excess

    torch.compiler.reset()
    results = []
    for function in (torch.compile(step, backend="aot_eager"), step):
        leaf = v.clone().requires_grad_()
        loss, excess = function(leaf, given)
        results.append((loss.detach(), excess, *torch.autograd.grad(loss, leaf)))
    for got, expected in zip(*results, strict=True):
        assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("form", ["mean", "velocity", "noise", "seeded"])
def test_on_policy_the_ratio_is_exactly_one_over_ranks(form, fused_backend, alone):
    given = problem(form, steps=2, dtype=torch.float32, drift=0.0)
    groups = {"process_group": alone, "latent_group": alone}
    out, grad = run(given, go.GuardConfig.article(), **groups)
    assert (out.log_ratio == 0).all()
    assert (out.excess == 0).all()
    assert (out.metrics.degenerate == 1).all()
    assert (grad != 0).any()
    given["advantages"] = torch.zeros_like(given["advantages"])
    _, grad = run(given, go.GuardConfig.article(), **groups)
    assert (grad == 0).all()


# ---- the operators ------------------------------------------------------------------------------


def rows_of(form, *, weights=False, statistics=False):
    advantages = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 4)
    advantages[1, 2] = math.nan
    old = torch.full((2, 4), -1.4, dtype=torch.float64) if form == "log-prob" else None
    step_weights = torch.full((2, 4), 0.3) if weights else None
    elements = torch.full((2, 4), 29.0, dtype=torch.float64) if weights else None
    given = torch.tensor([[0.1, 0.2], [0.3, 0.0], [1e-8, 1e-8]], dtype=torch.float64)
    return Rows(advantages, old, step_weights, elements, given if statistics else None)


def transitions_of(form, dtype):
    with go.use_backend("reference"):
        given = problem(form, steps=2, dtype=dtype, drift=0.3, reference=True)
    latents, *rest = operands(given)
    return Transitions(Latents._make(latents), *rest)


@pytest.mark.parametrize("form", ["mean", "log-prob"])  # of a form, it knows no more
def test_evaluate_gives_the_bits_of_guard_loss(form, fused_backend):
    """It is guard_loss from where that has its sums."""
    backend, t = backends.select(torch.device("cpu")), transitions_of(form, torch.float32)
    for config in (DROP, go.GuardConfig.flow_grpo(nonfinite="drop")):
        for weights, statistics in ((False, False), (True, True)):
            if statistics and config.ratio_norm == "none":
                continue
            rows = rows_of(form, weights=weights, statistics=statistics)
            arguments = t, rows, objective_of(config, True)
            loss, _, _, *others = backend.guard_loss(*arguments, False, False)
            got = backend.evaluate(backend.sums(t), *arguments)
            for one, other in zip(got, (loss, *others), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ratio_statistics_are_those_of_the_objective(dtype, fused_backend):
    backend, t = backends.select(torch.device("cpu")), transitions_of("velocity", dtype)
    for config in (ARTICLE, go.GuardConfig("standardize", reduction="sum", nonfinite="drop")):
        rows = rows_of("velocity", weights=True, statistics=True)
        rows.advantages[0] = math.nan  # a step of which nothing is finite
        dtypes = (dtype, dtype)
        sums = backend.sums(t)
        got = backend.ratio_statistics(sums, t, rows, objective_of(config, True, dtypes))
        coeffs = StepCoefficients._of(t.coefficients, True, ())
        log_ratio, kl_old, kl = objective.log_ratio_and_kl(
            sums, coeffs, rows.elements, config.reduction
        )
        finite = objective.finite_transitions(
            log_ratio, kl_old, kl, rows.advantages, coeffs, config, rows.step_weights.double(),
            None, t.compute_dtype(), 0.0,
        )  # fmt: skip
        assert finite.sum(-1).tolist() == [0, 3]
        square = objective.squared_gain(coeffs, rows.elements, config.reduction)
        expected = objective.ratio_statistics(log_ratio, finite, square)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-18)
        assert got[:3, 0].tolist() == [0.0, 0.0, 0.0]


def test_sums_of_another_shape_are_refused():
    compiled = pytest.importorskip("guard_ops.backends.compiled")
    t, objective = transitions_of("mean", torch.float32), objective_of(ARTICLE, True)
    for operator in (compiled.evaluate, compiled.ratio_statistics):
        for sums in (torch.zeros(3, 4, 2).double(), torch.zeros(2, 2, 4).double()):
            with pytest.raises(RuntimeError, match=r"sums needs \[3, K, B\]"):
                operator(sums, t, rows_of("mean"), objective)
        with pytest.raises(RuntimeError, match=r"needs float64 \[K, B\]"):
            operator(torch.zeros(3, 2, 4), t, rows_of("mean"), objective)
