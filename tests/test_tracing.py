"""The ops outside torch.compile: tensors without values, traced graphs, exported models."""

import pytest
import torch
from problems import problem, relative, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import guard_ops as go

OPERANDS = ("model_output", "sample", "prev_sample", "old_model_output", "advantages")


@pytest.fixture
def given():
    return problem("velocity", latent=(9, 4), dtype=torch.float32)


def test_a_step_can_be_planned_without_values(given, backend):
    """FakeTensorMode: shapes, dtypes and memory of the loss and its gradient, and no arithmetic."""
    mode = FakeTensorMode()
    fake = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with mode:
        out, grad = run(fake, go.GuardConfig.article())
    assert (out.loss.shape, out.loss.dtype) == ((), torch.float32)
    assert grad.shape == given["model_output"].shape
    with (
        mode,
        pytest.raises(RuntimeError, match=r"makes only a FakeTensor; make the schedule before"),
    ):
        go.SdeSchedule([1.0, 0.5, 0.0])


def test_a_gradient_can_be_traced(given, backend):
    """``make_fx`` of a loss that is scaled, whose factor has no value while it is traced."""

    def gradient(v):
        v = v.detach().requires_grad_()
        loss = go.guard_loss(**{**given, "model_output": v}).loss
        return torch.autograd.grad(loss * 3, v)[0]

    v = given["model_output"]
    traced = make_fx(gradient)(v)
    assert relative(traced(v + 0.01), gradient(v + 0.01)) < 1e-6


def test_a_model_is_exported_for_any_batch(given):
    """Even for a batch of K: the shapes of one dimension are not compared with those of two."""

    class Loss(torch.nn.Module):
        def forward(self, v, x, y, old, advantages):
            form = {"sample": x, "prev_sample": y, "old_model_output": old}
            return go.guard_loss(v, advantages=advantages, coeffs=given["coeffs"], **form).loss

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({1: batch},) * 4 + ({0: batch},)
    exported = torch.export.export(
        Loss(), tuple(given[name] for name in OPERANDS), dynamic_shapes=shapes
    )
    for size in (3, 5):
        other = problem("velocity", latent=(9, 4), batch=size, dtype=torch.float32)
        expected = go.guard_loss(**other).loss
        got = exported.module()(*(other[name] for name in OPERANDS))
        assert relative(got, expected) < 1e-6


def test_a_compiled_op_follows_a_change_of_the_backend(given):
    """It takes the backend for a constant, so a change has to make it compile anew."""
    seen = []

    def spy(graph, _):
        seen.append(any("guard_ops" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    v = given.pop("model_output")
    torch.compiler.reset()
    compiled = torch.compile(lambda v: go.log_ratio(v, **without(given)).log_ratio, backend=spy)
    with torch.no_grad():
        compiled(v)
        with go.use_backend("reference"):
            compiled(v)
        compiled(v)
    assert seen == ["cpu" in go.available_backends(), False]  # and the first again, from its cache


def without(given):
    return {name: value for name, value in given.items() if name != "advantages"}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_tensors_of_transforms_and_meshes_are_refused_in_a_sentence(given, backend):
    v = given.pop("model_output")

    def loss(v):
        return go.guard_loss(v, **given).loss

    with pytest.raises(TypeError, match=r"`model_output` is a tensor of a torch.func transform"):
        torch.func.grad(loss)(v)
    with pytest.raises(TypeError, match=r"`model_output` is a tensor of a torch.func transform"):
        torch.func.vmap(loss)(torch.stack([v, v]))
    shard = type("DTensor", (torch.Tensor,), {})  # one proper needs a mesh of processes
    with pytest.raises(TypeError, match=r"`model_output` is a DTensor, .* to_local\(\)"):
        loss(v.as_subclass(shard))


@pytest.mark.parametrize("name", [*OPERANDS, "step_weights"])
def test_a_forward_mode_tangent_is_not_dropped(name, given, backend):
    given["step_weights"] = torch.full((3, 4), 0.3)
    with torch.autograd.forward_ad.dual_level():
        given[name] = torch.autograd.forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError, match=f"`{name}` has a forward-mode tangent"):
            go.guard_loss(**given)


@pytest.mark.parametrize("name", [*OPERANDS, "step_weights"])
def test_tensors_that_are_no_block_of_memory_are_refused_by_name(name, given, backend):
    given["step_weights"] = torch.full((3, 4), 0.3)
    with pytest.raises(TypeError, match=f"`{name}` is a sparse_coo tensor; it needs a dense one"):
        go.guard_loss(**{**given, name: given[name].to_sparse()})
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(TypeError, match=f"`{name}` is a nested tensor; it needs a dense one"):
        go.guard_loss(**{**given, name: nested})
    freed = given[name].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"`{name}` has shape .* but its memory was freed"):
        go.guard_loss(**{**given, name: freed})


@pytest.mark.slow_suite
def test_one_index_is_looked_up_by_inductor():
    schedule = go.SdeSchedule([1.0, 0.8, 0.3, 0.0])
    torch.compiler.reset()
    looked_up = torch.compile(lambda k: schedule[k].s * 2, fullgraph=True)
    assert looked_up(torch.tensor(1)).item() == pytest.approx(2 * schedule[1].s.item(), rel=1e-15)
