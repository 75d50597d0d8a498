"""Philox4x32-10 and its normals in plain PyTorch integers: what every backend regenerates.

Random123's counter-based generator (Salmon et al., 2011). Key = seed; counter = (element / 4,
transition), each 64 bits, low word first. The four words of a counter make four normals by
Box-Muller: word 0 gives the radius of elements 4j and 4j+1 (cosine, then sine), word 1 that of 4j+2
and 4j+3; words 2 and 3 give their angles. Radius and angle come from exact float32 numbers, and the
angle is first reduced to its quadrant, so that backends differ only by how they round log, sqrt,
sin and cos.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``, both below 2^32, in int64."""
    low = a * (b & 0xFFFF)  # below 2^48
    high = a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: Tensor, transition: Tensor, counter: Tensor) -> list[Tensor]:
    """Four words (int64 below 2^32) per counter; the arguments broadcast against each other."""
    c = [counter & _MASK, (counter >> 32) & _MASK, transition & _MASK, (transition >> 32) & _MASK]
    k = [key & _MASK, (key >> 32) & _MASK]
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + _WEYL[0]) & _MASK, (k[1] + _WEYL[1]) & _MASK]
    return list(torch.broadcast_tensors(*c))


def normals(seed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [K, B, numel] of ``seed`` [K, B, 2] int64, or [K, B, 3] with a counter."""
    counter = seed[..., 2:].sum(-1, keepdim=True)  # of the first element: 0 if it is not given
    counter = counter + torch.arange((numel + 3) // 4, device=seed.device)
    words = philox(seed[..., :1], seed[..., 1:2], counter)
    pairs = [_box_muller(words[0], words[2], dtype), _box_muller(words[1], words[3], dtype)]
    return torch.stack([z for pair in pairs for z in pair], -1).flatten(2)[..., :numel]


def _box_muller(radius_word: Tensor, angle_word: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    uniform = radius_word.to(torch.float32).clamp(min=0.5) * 2.0**-32  # in (0, 1]
    radius = torch.sqrt(-2.0 * torch.log(uniform.to(dtype)))
    quadrant = angle_word >> 30
    fraction = ((angle_word & 0x3FFFFFFF) - 0x20000000).to(torch.float32) * 2.0**-30
    angle = fraction.to(dtype) * (math.pi / 2)  # within pi / 4 of 0
    cos, sin = torch.cos(angle), torch.sin(angle)
    swap = (quadrant & 1).bool()
    x, y = torch.where(swap, -sin, cos), torch.where(swap, cos, sin)
    sign = torch.where(quadrant >= 2, -1.0, 1.0).to(dtype)
    return radius * sign * x, radius * sign * y
