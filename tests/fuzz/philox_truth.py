"""Philox4x32-10 (Salmon et al., 2011) and its normals, in Python's integers and numpy's float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MASK = 2**32 - 1


def words(key: int, transition: int, counter: int) -> tuple[int, ...]:
    """Four words of 32 bits, of key (64 bits) and counter (element / 4, transition)."""
    c = [counter & MASK, counter >> 32, transition & MASK, transition >> 32]
    k = [key & MASK, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & MASK, first >> 32 ^ c[3] ^ k[1], first & MASK]
        k = [k[0] + 0x9E3779B9 & MASK, k[1] + 0xBB67AE85 & MASK]
    return tuple(c)


def box_muller(radius_word: int, angle_word: int) -> tuple[float, float]:
    """A pair of normals; the numbers that the functions are taken of are float32's."""
    uniform = max(float(np.float32(radius_word)), 0.5) * 2.0**-32
    quadrant, rest = divmod(angle_word, 2**30)
    angle = (quadrant + float(np.float32(rest - 2**29)) * 2.0**-30) * (math.pi / 2)
    radius = math.sqrt(-2 * math.log(uniform))
    return radius * math.cos(angle), radius * math.sin(angle)


def normals(seed: Tensor, numel: int) -> Tensor:
    """[K, B, numel] float64 of ``seed`` [K, B, 2]."""
    out = torch.empty(*seed.shape[:2], -(-numel // 4) * 4, dtype=torch.float64)
    for k in range(seed.shape[0]):
        for i in range(seed.shape[1]):
            key, transition = seed[k, i].tolist()
            for j in range(out.shape[2] // 4):
                w = words(key, transition, j)
                four = (*box_muller(w[0], w[2]), *box_muller(w[1], w[3]))
                out[k, i, 4 * j : 4 * j + 4] = torch.tensor(four, dtype=torch.float64)
    return out[..., :numel]
