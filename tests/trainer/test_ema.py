import pytest
import torch

from guard_ops.trainer import Ema


def test_average_follows_the_recurrence_with_its_warm_up():
    weight = torch.nn.Parameter(torch.tensor([0.0, 4.0]))
    ema = Ema({"w": weight}, decay=0.5)
    expected = weight.detach().double()
    for n in range(1, 21):
        with torch.no_grad():
            weight.add_(1.0)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    # twenty float32 roundings of numbers near 20
    torch.testing.assert_close(ema.average["w"].double(), expected, rtol=0, atol=2e-5)


def test_zero_decay_is_the_weights_themselves():
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = Ema({"w": weight}, decay=0.0)
    with torch.no_grad():
        weight.fill_(0.3)
    ema.update()
    assert torch.equal(ema.average["w"], weight.detach())


def test_bfloat16_weights_are_averaged_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema({"w": weight}, decay=0.999)
    ema.updates = 10**6  # past the warm-up
    with torch.no_grad():
        weight.fill_(2.0)
    ema.update()
    assert ema.average["w"].dtype == torch.float32
    # bfloat16 would have stayed at 1
    torch.testing.assert_close(ema.average["w"], torch.tensor([1.001]), rtol=0, atol=1e-6)


def test_applied_swaps_the_average_in_and_the_weights_back_even_after_an_error():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = Ema({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.fill_(5.0)
    try:
        with ema.applied():
            assert torch.equal(weight.detach(), torch.zeros(2))
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(weight.detach(), torch.full((2,), 5.0))


def test_what_is_written_inside_applied_is_an_error_at_its_end_and_not_kept():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = Ema({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.fill_(5.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(2)
    with (
        pytest.raises(RuntimeError, match=r"'w' was written to inside `ema.applied\(\)`"),
        ema.applied(),
    ):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2,), 5.0))


def test_inside_applied_there_is_no_update_and_no_second_applied():
    weight = torch.nn.Parameter(torch.zeros(2))
    ema = Ema({"w": weight}, decay=0.9)
    with torch.no_grad():
        weight.fill_(5.0)
    with ema.applied():
        with pytest.raises(RuntimeError, match="train outside"):
            ema.update()
        with pytest.raises(RuntimeError, match="the model holds the average"), ema.applied():
            pass
        assert torch.equal(ema.weights()["w"], torch.full((2,), 5.0))
    assert ema.updates == 0
    assert torch.equal(weight.detach(), torch.full((2,), 5.0))
    assert ema.weights()["w"] is weight


def test_an_average_that_cannot_be_applied_leaves_the_weights_and_training_goes_on():
    weights = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("a", "b")}
    ema = Ema(weights, decay=0.9)
    with torch.no_grad():
        for p in weights.values():
            p.fill_(5.0)
    whole, ema.average["b"] = ema.average["b"], torch.zeros(3)
    with pytest.raises(RuntimeError, match="size of tensor"), ema.applied():
        pass
    ema.average["b"] = whole
    assert all(torch.equal(p.detach(), torch.full((2,), 5.0)) for p in weights.values())
    assert ema.weights() is weights
    ema.update()
