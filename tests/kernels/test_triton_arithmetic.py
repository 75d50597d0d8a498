"""The kernels' own arithmetic: expm1, Philox and its normals, and sums in a fixed order."""

import os

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1",
)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from guard_ops import philox_seed  # noqa: E402
from guard_ops.backends import philox as truth  # noqa: E402
from guard_ops.kernels.expm1 import expm1  # noqa: E402
from guard_ops.kernels.philox import normals, philox  # noqa: E402
from guard_ops.kernels.summation import sum_all, sum_first, sum_last  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
N = 4096
on_devices = pytest.mark.parametrize("device", DEVICES)


@triton.jit
def expm1_kernel(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, expm1(tl.load(x + at)))


@on_devices
def test_expm1_is_within_two_units_of_the_last_place(device):
    """numpy's is libm's, itself within one."""
    x = torch.cat(
        [
            torch.linspace(-45, 45, N - 3000, dtype=torch.float64),
            *(scale * torch.randn(1000, dtype=torch.float64) for scale in (1e-9, 1e-3, 300)),
        ]
    ).clamp(max=709)
    y = torch.empty(N, dtype=torch.float64, device=device)
    expm1_kernel[(1,)](x.to(device), y, N)
    expected = np.expm1(x.numpy())
    assert (np.abs(y.cpu().numpy() - expected) <= 2 * np.spacing(np.abs(expected))).all()


@on_devices
def test_expm1_at_the_ends_of_its_range(device):
    special = {0.0: 0.0, -800.0: -1.0, 710.0: float("inf"), float("inf"): float("inf")}
    special |= {-float("inf"): -1.0, 709.78: np.expm1(709.78)}
    x = torch.tensor([*special, float("nan"), 0.0], dtype=torch.float64).repeat(N // 8)
    y = torch.empty(N, dtype=torch.float64, device=device)
    expm1_kernel[(1,)](x.to(device), y, N)
    got = y.cpu().numpy()[:8]
    np.testing.assert_allclose(got[:6], list(special.values()), rtol=1e-15)
    assert np.isnan(got[6])


@triton.jit
def words_kernel(seed, words, N: tl.constexpr):
    at = tl.arange(0, N)
    counter = (at.to(tl.int64) << 22) + at
    w0, w1, w2, w3 = philox(tl.load(seed), tl.load(seed + 1), counter)
    tl.store(words + at, w0.to(tl.int64))
    tl.store(words + N + at, w1.to(tl.int64))
    tl.store(words + 2 * N + at, w2.to(tl.int64))
    tl.store(words + 3 * N + at, w3.to(tl.int64))


@on_devices
def test_philoxs_integers_are_those_of_every_backend(device):
    seed = torch.tensor([0x123456789ABCDEF, (5 << 33) + 7], device=device)
    words = torch.empty(4, N, dtype=torch.int64, device=device)
    words_kernel[(1,)](seed, words, N)
    at = torch.arange(N)
    expected = truth.philox(seed[:1].cpu(), seed[1:].cpu(), (at << 22) + at)
    assert torch.equal(words.cpu(), torch.stack(expected))


@triton.jit
def normals_kernel(seed, z, start, N: tl.constexpr, T: tl.constexpr):
    noise = normals(tl.load(seed), tl.load(seed + 1), tl.cast(start, tl.int64), N, T)
    tl.store(z + tl.arange(0, N), noise)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_within_1e_6(dtype, device):
    seeds = philox_seed(12345678901234567, (2, 3))[1, 2].to(device)
    z = torch.empty(N, dtype=dtype, device=device)
    start = 3 * N
    normals_kernel[(1,)](seeds, z, start, N, tl.float32 if dtype == torch.float32 else tl.float64)
    expected = truth.normals(seeds.cpu().reshape(1, 1, 2), start + N, torch.float64)[0, 0, start:]
    assert (z.cpu() - expected).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)


@triton.jit
def sums_kernel(x, last, first, every, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    value = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(last + m, tl.reshape(sum_last(value), (M,)))
    tl.store(first + n, sum_first(value))
    tl.store(every, sum_all(tl.load(x + tl.arange(0, M * N))))


@on_devices
@pytest.mark.parametrize("warps", [4] if INTERPRETED else [1, 4, 8, 16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 16), (16, 1), (8, 256)])
def test_sums_are_the_same_tree_for_any_number_of_warps(rows, columns, warps, device):
    x = torch.randn(rows, columns, dtype=torch.float64)
    last, first, every = (torch.empty(n, dtype=x.dtype, device=device) for n in (rows, columns, 1))
    sums_kernel[(1,)](x.to(device), last, first, every, rows, columns, num_warps=warps)

    def tree(values):  # neighbours, again and again
        while values.shape[-1] > 1:
            values = values[..., ::2] + values[..., 1::2]
        return values[..., 0]

    assert torch.equal(last.cpu(), tree(x))
    assert torch.equal(first.cpu(), tree(x.T))
    assert torch.equal(every.cpu()[0], tree(x.flatten()))
