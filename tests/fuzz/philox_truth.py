"""Philox4x32-10 (Salmon et al., 2011) and its normals, in numpy's uint64 and float64."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

Words = tuple[np.ndarray, ...]  # of uint64 below 2^32
MASK = np.uint64(2**32 - 1)
HALF = np.uint64(32)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def words(key: np.ndarray, transition: np.ndarray, counter: np.ndarray) -> Words:
    """Four words of 32 bits, of key (64 bits) and counter (element / 4, transition)."""
    c = [counter & MASK, counter >> HALF, transition & MASK, transition >> HALF]
    k = [key & MASK, key >> HALF]
    for _ in range(10):
        first, second = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]  # of 32 bits each: 64 hold it
        c = [second >> HALF ^ c[1] ^ k[0], second & MASK, first >> HALF ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + WEYL[0]) & MASK, (k[1] + WEYL[1]) & MASK]
    return tuple(c)


def box_muller(radius_word: np.ndarray, angle_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A pair of normals; the numbers that the functions are taken of are float32's."""
    uniform = np.maximum(radius_word.astype(np.float32).astype(np.float64), 0.5) * 2.0**-32
    quadrant, rest = np.divmod(angle_word.astype(np.int64), 2**30)
    fraction = (rest - 2**29).astype(np.float32).astype(np.float64) * 2.0**-30
    radius, angle = np.sqrt(-2 * np.log(uniform)), (quadrant + fraction) * (np.pi / 2)
    return radius * np.cos(angle), radius * np.sin(angle)


def normals(seed: Tensor, numel: int) -> Tensor:
    """[K, B, numel] float64 of ``seed`` [K, B, 2]."""
    return _normals(seed.numpy().tobytes(), seed.shape, numel)


@functools.lru_cache(maxsize=4)  # a case asks for its own more than once
def _normals(seed: bytes, shape: torch.Size, numel: int) -> Tensor:
    pairs = np.frombuffer(seed, dtype=np.uint64).reshape(shape)
    counter = np.arange((numel + 3) // 4, dtype=np.uint64)
    w = words(*np.broadcast_arrays(pairs[..., :1], pairs[..., 1:], counter))
    four = [*box_muller(w[0], w[2]), *box_muller(w[1], w[3])]
    return torch.from_numpy(np.stack(four, -1).reshape(*shape[:-1], -1)[..., :numel].copy())
