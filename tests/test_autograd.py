"""What a training loop does with the loss: backward twice, scaled, accumulated, not at all."""

import itertools

import pytest
import torch
from combinations import pairs_first
from problems import FORMS, arguments, problem, relative, run, truth, without_advantages
from torch.utils._python_dispatch import TorchDispatchMode

import guard_ops as go

CONFIGS = {
    "article": go.GuardConfig.article(),
    "paper": go.GuardConfig.paper(clip_low=0.01, clip_high=0.02),
}
# One rounding of each element of the gradient to its own dtype.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def leaf(given, name="model_output"):
    return given[name].detach().clone().requires_grad_()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_any_grad_output(dtype, config, backend):
    """Scaled by the loop, before and after: also a second time through the same graph."""
    given = problem("noise", latent=(17, 5), dtype=dtype, drift=0.4)
    _, expected = truth(given, CONFIGS[config])
    v = leaf(given)
    out = go.guard_loss(**{**given, "model_output": v}, config=CONFIGS[config])
    scales = [-3.0, 1024.0, 1.0, 0.37, 1.0, 0.0]
    for n, scale in enumerate(scales):
        (grad,) = torch.autograd.grad(scale * out.loss, v, retain_graph=n + 1 < len(scales))
        assert grad.dtype == dtype
        subnormal = dtype == torch.float16 and abs(scale) < 1000  # see the next test
        assert relative(grad, scale * expected) < (3e-3 if subnormal else ROUNDING[dtype])


@pytest.mark.parametrize("route", ["guard_loss", "log_ratio"])
def test_a_loss_scale_keeps_float16_gradients_from_underflowing(route, backend):
    """A GradScaler's 65536 must reach the gradient before it is rounded to float16.

    Unscaled, its elements are a few times float16's least number, 6e-8.
    """
    given = problem("noise", steps=4, batch=16, latent=(16, 64), dtype=torch.float16, drift=0.05)
    given["advantages"] /= 16  # as small a gradient as 16 times the latents would have
    config = CONFIGS["paper"]
    v, exact = leaf(given), leaf(given).double().detach().requires_grad_()
    with go.use_backend("reference"):
        wide = {k: x.double() if torch.is_tensor(x) else x for k, x in given.items()}
        if route == "guard_loss":
            go.guard_loss(**{**wide, "model_output": exact}, config=config).loss.backward()
        else:
            rest = without_advantages({**wide, "model_output": exact})
            (go.log_ratio(**rest).log_ratio * wide["advantages"]).mean().backward()
    if route == "guard_loss":
        loss = go.guard_loss(**{**given, "model_output": v}, config=config).loss
    else:
        rest = without_advantages({**given, "model_output": v})
        loss = (go.log_ratio(**rest).log_ratio * given["advantages"].float()).mean()
    assert relative(exact.grad.half(), exact.grad) > 0.01  # what not scaling would cost
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(loss).backward()
    # 2^-11 / sqrt(3) of each element, and the subnormals' absolute rounding.
    assert relative(v.grad.double() / 65536, exact.grad) < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_retained_graph_gives_the_same_gradient_again(form, backend):
    given = problem(form, dtype=torch.float32)
    _, expected = run(given)
    v = leaf(given)
    out = go.guard_loss(**{**given, "model_output": v})
    for n in range(3):
        (grad,) = torch.autograd.grad(out.loss, v, retain_graph=n < 2)
        assert torch.equal(grad, expected)
        grad.fill_(7.0)  # what the caller does to one gradient is not seen by the next
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


def test_gradients_accumulate_over_losses(backend):
    """Two losses on one leaf, one backward each and one backward of their sum."""
    first = problem("velocity", dtype=torch.float64, seed=1)
    v = leaf(first)
    second = problem("noise", seed=2) | {"model_output": v}
    first = first | {"model_output": v}
    expected = run(first)[1] + 0.5 * run(second)[1]
    go.guard_loss(**first).loss.backward()
    (0.5 * go.guard_loss(**second).loss).backward()
    assert relative(v.grad, expected) < 1e-14
    v.grad = None
    (go.guard_loss(**first).loss + 0.5 * go.guard_loss(**second).loss).backward()
    assert relative(v.grad, expected) < 1e-14


def test_one_step_at_a_time_accumulates_to_the_whole(backend):
    """The loop that holds one step's activations: K calls with the trajectory's weights."""
    given = problem("noise", steps=3)
    config = CONFIGS["paper"]
    out, expected = run(given, config)
    latents = [k for k, x in given.items() if torch.is_tensor(x) and x.ndim > 2]
    schedule = go.SdeSchedule((1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0))
    total = 0.0
    for k in range(3):
        step = {**given, **{name: given[name][k] for name in latents}, "coeffs": schedule[1 + k]}
        part, grad = run(step, config, step_weights=out.weights[k])
        total += part.loss.item()
        assert relative(grad, expected[k]) < 1e-12
    assert total == pytest.approx(out.loss.item(), rel=1e-12)


def test_the_network_behind_the_velocity_is_trained(backend):
    """Gradients go on through the graph that made ``model_output``, guidance and all."""
    given = problem("noise", guided=True)
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    cond, uncond = layer(given["model_output"]), layer(given["model_output_uncond"])
    changes = {"model_output": cond, "model_output_uncond": uncond}
    go.guard_loss(**arguments(given, **changes)).loss.backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    cond, uncond = layer(given["model_output"]), layer(given["model_output_uncond"])
    combined = uncond + given["guidance_scale"] * (cond - uncond)
    changes = {"model_output": combined, "model_output_uncond": None, "guidance_scale": None}
    go.guard_loss(**arguments(given, **changes)).loss.backward()
    assert relative(got, layer.weight.grad) < 1e-12


@pytest.mark.parametrize("wanted", ["model_output", "model_output_uncond"])
def test_only_the_branch_that_requires_grad_gets_one(wanted, backend):
    given = problem("velocity", guided=True)
    both = {name: leaf(given, name) for name in ("model_output", "model_output_uncond")}
    go.guard_loss(**{**given, **both}).loss.backward()
    alone = leaf(given, wanted)
    go.guard_loss(**{**given, wanted: alone}).loss.backward()
    assert torch.equal(alone.grad, both[wanted].grad)
    t = go.log_ratio(**without_advantages({**given, wanted: leaf(given, wanted)}))
    assert t.log_ratio.requires_grad


def test_without_gradients_nothing_is_recorded(backend):
    given = problem("velocity")
    expected, _ = run(given)
    v = leaf(given)
    with torch.no_grad():
        out = go.guard_loss(**{**given, "model_output": v})
        assert not go.log_ratio(**without_advantages({**given, "model_output": v}))[0].requires_grad
    with torch.inference_mode():
        inferred = go.guard_loss(**given)
    for result in (out, inferred, go.guard_loss(**given)):
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.excess, expected.excess)
    # Under no_grad an operand that requires grad is not an error: nothing is ignored.
    with torch.no_grad():
        go.guard_loss(**{**given, "sample": leaf(given, "sample")})


def test_diagnostics_carry_no_gradient(backend):
    given = problem("velocity", reference=True)
    config = go.GuardConfig.article(kl_beta=0.1)
    out = go.guard_loss(**{**given, "model_output": leaf(given)}, config=config)
    assert out.loss.requires_grad
    for value in (out.log_ratio, out.excess, out.weights, out.kl, *out.metrics):
        assert not value.requires_grad


@pytest.mark.parametrize(
    "form, config, guided", pairs_first(itertools.product(FORMS, CONFIGS, [False, True]))
)
def test_loss_and_grad_is_guard_loss_and_backward(form, config, guided, backend):
    if form == "log-prob" and config == "paper":
        config = "article"
    given = problem(form, dtype=torch.float32, guided=guided)
    names = ["model_output", "model_output_uncond"][: 1 + guided]
    leaves = {name: leaf(given, name) for name in names}
    loss = go.guard_loss(**{**given, **leaves}, config=CONFIGS[config]).loss
    loss.backward()
    with torch.no_grad():  # as a pipeline engine calls it
        got = go.guard_loss_and_grad(**given, config=CONFIGS[config])
    assert torch.equal(got.loss, loss)
    assert not got.loss.requires_grad
    grads = got.grad if guided else (got.grad,)
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(grad, leaves[name].grad)
        assert not grad.requires_grad


class CountOperators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_loss_and_grad_of_a_fused_backend_is_one_operator(fused_backend):
    """No autograd, no conversion kernels: what a GPU would have to launch besides."""
    given = problem("mean", dtype=torch.float32)
    given["advantages"] = given["advantages"].float()
    with CountOperators() as count:
        go.guard_loss_and_grad(**given)
    views = {"detach", "view", "expand", "select", "slice", "unsqueeze", "as_strided"}
    views |= {"_reshape_alias", "alias", "unbind"}
    assert [name for name in count.names if name not in views] == ["guard_loss"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["mean", "log-prob"])
def test_narrow_advantages_and_weights_are_read_as_they_are(form, dtype, backend):
    given = problem(form, dtype=torch.float32)
    rows = given["model_output"].shape[:2]
    names = ["advantages"] + ["old_log_prob"] * (form == "log-prob")
    narrow = {name: given[name].to(dtype) for name in names}
    narrow["step_weights"] = torch.linspace(0.5, 1.5, rows.numel()).view(rows).to(dtype)
    wide = {name: value.double() for name, value in narrow.items()}
    config = CONFIGS["article"]
    got = go.guard_loss_and_grad(**{**given, **narrow}, config=config)
    expected = go.guard_loss_and_grad(**{**given, **wide}, config=config)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.grad, expected.grad)


def test_gradient_of_a_model_output_that_is_not_dense(backend):
    """Channels last, as convolutions return it: the gradient has its shape all the same."""
    given = problem("velocity", dtype=torch.float32, latent=(3, 4, 5))
    turned = given["model_output"].movedim(2, -1).contiguous().movedim(-1, 2)
    grads = []
    for v in (given["model_output"], turned):
        v = v.detach().requires_grad_()
        assert v.is_contiguous() == (v.stride(-1) == 1)
        for factor in (1.0, 3.0):
            v.grad = None
            (factor * go.guard_loss(**{**given, "model_output": v}).loss).backward()
            assert v.grad.shape == v.shape
            grads.append(v.grad)
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_double_backward_on_a_fused_backend_says_what_to_do(fused_backend):
    given = problem("velocity")
    message = f"'{fused_backend}' backend has no double backward.*use_backend\\('reference'\\)"
    v = leaf(given)
    loss = go.guard_loss(**{**given, "model_output": v}).loss
    (grad,) = torch.autograd.grad(loss, v, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()
    ratio = go.log_ratio(**without_advantages({**given, "model_output": v})).log_ratio
    (grad,) = torch.autograd.grad(ratio.sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_does_not_touch_the_loss(config, backend):
    """Ops called inside autocast compute as outside: the loss is float32, the gradient v's."""
    for dtype in (torch.float32, torch.bfloat16):
        given = problem("noise", dtype=dtype)
        expected, expected_grad = run(given, CONFIGS[config])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, grad = run(given, CONFIGS[config])
        assert out.loss.dtype == torch.float32
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(grad, expected_grad)


def test_inputs_are_left_as_they_were(backend):
    given = problem("velocity", guided=True, reference=True)
    before = {name: x.clone() for name, x in given.items() if torch.is_tensor(x)}
    run(given, go.GuardConfig.article(kl_beta=0.1))
    go.log_ratio(**{k: v for k, v in given.items() if k not in ("advantages", "ref_model_output")})
    for name, value in before.items():
        assert torch.equal(given[name], value), name


def test_changing_an_operand_between_loss_and_backward_is_noticed(backend):
    """autograd's own version check guards the operands that backward will read."""
    given = problem("noise")
    v = leaf(given)
    out = go.guard_loss(**{**given, "model_output": v})
    given["noise"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_a_backward_of_the_loss_itself_copies_no_latent_that_is_not_dense(fused_backend):
    """The forward has to lay it out; the gradient is there then, whatever the layout."""
    given = problem("velocity", dtype=torch.float32, latent=(3, 4, 5))
    v = given["model_output"].movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
    loss = go.guard_loss(**{**given, "model_output": v}).loss
    with CountOperators() as count:
        torch.autograd.grad(loss, v)  # backward() would copy into v.grad, which is laid out like v
    assert not {"clone", "copy_", "contiguous", "scaled_"} & set(count.names)
