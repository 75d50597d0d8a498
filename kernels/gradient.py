"""``d loss / d v = b (c1 e + 2 c2 delta) + 2 c3 b^2 (v - v_ref)``, and what rescales it.

An objective of the log-ratio alone has c2 = -c1 / 2, so that its gradient is ``b c1`` times the
departure ``y - mean = e - delta``; with the closed form c2 is 0, and the gradient is ``b c1 e``.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..transitions import Transitions
from .launch import (
    COUNTS,
    POINTERS,
    arguments,
    compute_type,
    on_device,
    start,
    start_tuned,
    strides_of,
)
from .paths import cut
from .sums import tuning_key
from .transition import TILE, counted, differences, load, step_coefficient, store, velocity


@triton.jit
def put_gradient(
    t, strides, grads, grad_strides, k, i, start, inside, g, from_ref, b, c1, c2, c3,
    guidance_scale, T: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one tile for the branches whose pointer in ``grads`` is not None.

    ``g``: the gradient but for the reference model's part; ``from_ref``: v - v_ref; ``b`` and the
    coefficients are float64. If all three coefficients are 0, 0 is written, even where an operand
    is not finite.
    """
    k3 = (2 * b * b * c3).to(T)
    if t.ref_model_output is not None:
        g = tl.where(c3 != 0, tl.fma(from_ref, k3, g), g)
    g = tl.where((c1 != 0) | (c2 != 0) | (c3 != 0), g, 0.0)
    if t.mask is not None:
        g = tl.where(counted(t, strides, k, i, start, inside), g, 0.0)
    if t.model_output_uncond is None:
        store(grads[0], grad_strides[0], k, i, start, inside, g)
    else:
        if grads[0] is not None:
            scale = tl.full((), guidance_scale, T)
            store(grads[0], grad_strides[0], k, i, start, inside, scale * g)
        if grads[1] is not None:
            rest = (1 - tl.full((), guidance_scale, tl.float64)).to(T)
            store(grads[1], grad_strides[1], k, i, start, inside, rest * g)


@triton.jit
def put_resident_gradient(
    t, strides, grads, grad_strides, k, i, start, inside, direction, from_ref, b, c1, c2, c3,
    guidance_scale, T: tl.constexpr,
):  # fmt: skip
    """:func:`put_gradient` of a tile whose :func:`direction_of` is still in registers."""
    g = (b * c1).to(T) * direction
    put_gradient(
        t, strides, grads, grad_strides, k, i, start, inside, g, from_ref, b, c1, c2, c3,
        guidance_scale, T,
    )  # fmt: skip


@triton.jit
def direction_of(e, departure, mode):
    """The tile of which a gradient is a multiple, but for the reference model's part."""
    if mode.debiased:
        direction = e
    else:
        direction = departure
    return direction


@triton.jit
def write_gradient(
    t, strides, table, table_strides, grads, grad_strides, k, i, start, c1, c2, c3, numel,
    guidance_scale, T: tl.constexpr,
):  # fmt: skip
    """Writes a tile of the gradient; reads an operand once, and only if a coefficient needs it."""
    a = step_coefficient(table, table_strides, 0, k, i).to(T)
    b = step_coefficient(table, table_strides, 1, k, i)
    s = step_coefficient(table, table_strides, 2, k, i).to(T)
    # Bounds rather than masks ANDed with a scalar: those cost more, and lose their type in the
    # interpreter.
    lane, left = tl.arange(0, TILE), numel - start
    used = tl.where((c1 != 0) | (c2 != 0) | (c3 != 0), left, 0)
    moved = tl.where(c2 != 0, left, 0)
    if t.ref_model_output is not None:
        moved = tl.where((c2 != 0) | (c3 != 0), left, 0)
    departs = c2 == -0.5 * c1
    behaved = tl.where(departs & (c2 != 0), 0, used)
    whole, inside, moving, behaving = lane < left, lane < used, lane < moved, lane < behaved
    v = velocity(t, strides, k, i, start, moving, guidance_scale, T)
    delta, e, departure = differences(
        t, strides, k, i, start, inside, moving, behaving, v, a, b.to(T), s, T
    )
    k1, k2 = (b * c1).to(T), (2 * b * c2).to(T)
    g = tl.where(departs, k1 * departure, tl.fma(e, k1, k2 * delta))
    g = tl.where(c2 == 0, k1 * e, g)
    from_ref = v
    if t.ref_model_output is not None:
        r = load(t.ref_model_output, strides.ref_model_output, k, i, start, moving, T)
        from_ref = v - r
    put_gradient(
        t, strides, grads, grad_strides, k, i, start, whole, g, from_ref, b, c1, c2, c3,
        guidance_scale, T,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def gradient_kernel(
    t,  # Operands: pointers
    strides,  # Operands: (over K, over B) of each
    table,  # [5, K, B] float64
    table_c,  # its strides
    table_k,
    table_i,
    guidance_scale: tl.float64,
    numel,
    steps,
    batch,
    tiles,  # in a row
    c,  # [3, K, B] float64, contiguous
    written,  # [3, K, B] float64: what c was for the gradient that is already there; or None
    factor,  # []: multiplies c; or None
    grads,  # (cond, uncond) pointers, None where not wanted
    grad_strides,
    T: tl.constexpr,
):
    """One program per tile, from the last to the first: what the sums read last is still cached.

    Reads the operands once and writes the gradient. With ``written``, a row is written only if its
    coefficients differ from those; with ``factor``, only if that is not 1.
    """
    table_strides = (table_c, table_k, table_i)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile // tiles
    k, i = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    start = (tile % tiles).to(tl.int64) * TILE
    rows = steps * batch
    c1, c2, c3 = tl.load(c + row), tl.load(c + rows + row), tl.load(c + 2 * rows + row)
    changed = True
    if written is not None:
        w1, w2 = tl.load(written + row), tl.load(written + rows + row)
        w3 = tl.load(written + 2 * rows + row)
        # NaN coefficients were NaN before as well, and differ from themselves
        changed = ((c1 != w1) | (c2 != w2) | (c3 != w3)) & (c1 == c1)
    if factor is not None:
        scale = tl.load(factor).to(tl.float64)
        changed = scale != 1
        c1, c2, c3 = c1 * scale, c2 * scale, c3 * scale
    if changed:
        write_gradient(
            t, strides, table, table_strides, grads, grad_strides, k, i, start, c1, c2, c3, numel,
            guidance_scale, T,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=POINTERS)
def scale_kernel(x, factor, size, T: tl.constexpr):
    """``x *= factor`` over dense memory, one program per tile; returns at once if factor is 1."""
    scale = tl.load(factor).to(T)
    if scale != 1:
        start = tl.program_id(0).to(tl.int64) * TILE
        at = x + start + tl.arange(0, TILE)
        inside = tl.arange(0, TILE) < size - start
        tl.store(at, scale * tl.load(at, mask=inside), mask=inside)


def gradient(
    t: Transitions,
    c: Tensor,  # [3, K, B] float64
    grad: Tensor | None,  # to be written, like model_output
    grad_uncond: Tensor | None,  # to be written, like model_output_uncond
    *,
    written: Tensor | None = None,  # [3, K, B] float64
    factor: Tensor | None = None,  # []
) -> None:
    """Launch :func:`gradient_kernel`."""
    if grad is None and grad_uncond is None:
        return
    parts, device = cut(*t.latents.model_output.shape), t.latents.model_output.device
    grads = (grad, grad_uncond)
    last = (parts.row_tiles, c.contiguous(), written, factor, grads, tuple(map(strides_of, grads)))

    def launch(warps: int) -> None:
        programs = parts.rows * parts.row_tiles
        start(gradient_kernel, programs, *arguments(t), *last, dtype, warps=warps)

    dtype = compute_type(t.compute_dtype())
    with on_device(device):
        # A launch that may find nothing to write is no measure of how long others take.
        start_tuned("gradient", tuning_key(t), launch, search=written is None and factor is None)


def rescale(
    t: Transitions,
    c: Tensor,  # [3, K, B] float64: the coefficients of the gradients as they are now
    grad: Tensor | None,
    grad_uncond: Tensor | None,
    factor: Tensor,  # []
) -> None:
    """Multiply gradients by ``factor`` in place, each rounded once to its dtype."""
    narrow = any(x is not None and x.element_size() == 2 for x in (grad, grad_uncond))
    if narrow:
        gradient(t, c, grad, grad_uncond, factor=factor)
        return
    with on_device(t.latents.model_output.device):
        for x in (grad, grad_uncond):
            if x is None:
                continue
            programs = -(-x.numel() // TILE.value)
            start(scale_kernel, programs, x, factor, x.numel(), compute_type(x.dtype), warps=8)
