"""Sums in an order that no launch configuration changes.

``tl.sum`` adds in an order that follows from the layout, and so from the number of warps. Adding
neighbours, again and again, is the same tree however the elements lie in registers.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(12)  # log2 of the largest power of two that is summed


@triton.jit
def halve(x):
    """[N] -> [N / 2]: neighbours added."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)


@triton.jit
def sum_all(x):
    """[N] -> a scalar; N is a power of two."""
    for _ in tl.static_range(LARGEST):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return tl.sum(x)


@triton.jit
def sum_last(x):
    """[M, N] -> [M, 1]; N is a power of two."""
    for _ in tl.static_range(LARGEST):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return x


@triton.jit
def sum_first(x):
    """[M, N] -> [N]; M is a power of two."""
    for _ in tl.static_range(LARGEST):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.reshape(x, (x.shape[1],))
