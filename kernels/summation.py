"""Sums in an order that no launch configuration changes.

``tl.sum`` adds in an order that follows from the layout, and so from the number of warps. Adding
neighbours, again and again, is the same tree however the elements lie in registers.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(12)  # log2 of the largest power of two that is summed


@triton.jit
def halve(x):
    """[..., N] -> [..., N / 2]: neighbours of the last dimension added."""
    if len(x.shape) == 1:
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    else:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return x


@triton.jit
def sum_last(x):
    """[N] -> [1] or [M, N] -> [M, 1]; N is a power of two."""
    for _ in tl.static_range(LARGEST):
        if x.shape[len(x.shape) - 1] > 1:
            x = halve(x)
    return x


@triton.jit
def sum_first(x):
    """[M, N] -> [N]; M is a power of two."""
    for _ in tl.static_range(LARGEST):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.reshape(x, (x.shape[1],))
