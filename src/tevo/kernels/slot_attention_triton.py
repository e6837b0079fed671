"""The pass of Slot Attention as Triton kernels; plain form: :mod:`tevo.functional.slot_attention`, whose letters hold.

Slots that compete form a group: the k slots of a head, or all h k of a joint softmax. A group is one tile of g groups and
r rows, so the softmax needs no rescaling; the norm is made in registers, so x is all that is read. Sums over the inputs
are partial, one for each of s splits, and added in a fixed order: no atomics, equal results every time.

    P   total = w xh,  mass = w 1               one read of x
    U   sums, GRU, MLP, the next queries        none of x; without gradients only
    Q   dq = dl xh^T,  doffset = dl 1           one read of x
    X   dx = LN'(w^T dtotal + dl^T q)           one read and one write of x, for all passes together

with dl = a (da - sum_slots a da), da = dtotal xh^T + dmass. Masked slots and the rows that fill a tile have offset -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tevo.kernels.slot_attention import Plan, exact

__all__ = [
    "Weights",
    "dx_kernel",
    "iterate",
    "messages",
    "pass_kernel",
    "query_gradient_kernel",
    "read",
    "tiling",
    "update_kernel",
]


# tokens of a tile: of one that is followed by others, whose loads overlap; of one that several programs beside it must hide,
# and of the latter where each product is made of three
STREAMED, ALONE, ALONE_EXACT = 64, 32, 16


def jit(kernel: Any) -> Any:
    """``triton.jit``, whose own type is unknown where Triton is missing."""
    return triton.jit(kernel)


@jit
def _xh(x, mask, tokens, n, D: tl.constexpr, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of normalised inputs (t, d) with its reciprocal deviations and which tokens are real (t); x at its batch row."""
    cols = tl.arange(0, WIDTH)
    real = tokens < n
    if mask is not None:
        real = real & (tl.load(mask + tokens, mask=real, other=0) != 0)
    inside = cols < D
    # what is masked is not read, whatever it holds
    xh = tl.load(x + tokens[:, None] * D + cols[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    rstd = tl.full(tokens.shape, 1.0, tl.float32)
    if NORM_EPS is not None:
        mean = tl.sum(xh, 1) / D
        xh = tl.where(inside[None, :], xh - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(xh * xh, 1) / D + NORM_EPS)
        xh = xh * rstd[:, None]
    return xh, rstd, real


@jit
def _matrix(q, D: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A group's contiguous (r, d), filled up with zeros to a tile."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return tl.load(q + rows[:, None] * D + cols[None, :], mask=(rows < R)[:, None] & (cols < D)[None, :], other=0.0)


@jit
def _compete(q, offset, xh, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Softmax over the rows of q (r, d) for each of xh (t, d); zeros where no row is real."""
    logits = tl.dot(q, tl.trans(xh), input_precision=PRECISION) + offset[:, None]
    top = tl.max(logits, 0)
    a = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[None, :])
    mass = tl.sum(a, 0)
    return a / tl.where(mass == 0.0, 1.0, mass)[None, :]


@jit
def _dlogits(a, dtotal, dmass, xh, real, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of the logits of weights a (r, t)."""
    da = tl.dot(dtotal, tl.trans(xh), input_precision=PRECISION) + dmass[:, None]
    return tl.where(real[None, :], a * (da - tl.sum(a * da, 0)[None, :]), 0.0)


@jit
def pass_kernel(  # type: ignore[no-untyped-def]
    q,  # b g r d
    offset,  # b g r
    x,  # b n d
    mask,  # b n
    total,  # b g s r d
    mass,  # b g s r
    n,
    stretch,  # tokens of a split
    groups,
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P: partial totals and masses of one group over one split of the inputs."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = group // groups
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    queries = _matrix(q + group * R * D, D, WIDTH, R, ROWS)
    offsets = tl.load(offset + group * R + rows, mask=rows < R, other=float("-inf"))
    x += batch * n * D
    if mask is not None:
        mask += batch * n
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    masses = tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(n, (split + 1) * stretch)
    for start in range(split * stretch, end, TOKENS):
        xh, _, real = _xh(x, mask, start + tl.arange(0, TOKENS), end, D, WIDTH, NORM_EPS)
        w = tl.where(real[None, :], _compete(queries, offsets, xh, PRECISION) + EPS, 0.0)
        sums = tl.dot(w, xh, sums, input_precision=PRECISION)
        masses += tl.sum(w, 1)
    part = group * tl.num_programs(1) + split
    tl.store(
        total + part * R * D + rows[:, None] * D + cols[None, :], sums, mask=(rows < R)[:, None] & (cols < D)[None, :]
    )
    tl.store(mass + part * R + rows, masses, mask=rows < R)


@jit
def query_gradient_kernel(  # type: ignore[no-untyped-def]
    q,  # b g r d
    offset,  # b g r
    dtotal,  # b g r d
    dmass,  # b g r
    x,  # b n d
    mask,  # b n
    dq,  # b g s r d
    doffset,  # b g s r
    n,
    stretch,
    groups,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Q: partial gradients of one group's queries and offsets over one split of the inputs."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = group // groups
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    queries = _matrix(q + group * R * D, D, WIDTH, R, ROWS)
    dtotals = _matrix(dtotal + group * R * D, D, WIDTH, R, ROWS)
    offsets = tl.load(offset + group * R + rows, mask=rows < R, other=float("-inf"))
    dmasses = tl.load(dmass + group * R + rows, mask=rows < R, other=0.0)
    x += batch * n * D
    if mask is not None:
        mask += batch * n
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    offset_sums = tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(n, (split + 1) * stretch)
    for start in range(split * stretch, end, TOKENS):
        xh, _, real = _xh(x, mask, start + tl.arange(0, TOKENS), end, D, WIDTH, NORM_EPS)
        a = _compete(queries, offsets, xh, PRECISION)
        dlogits = _dlogits(a, dtotals, dmasses, xh, real, PRECISION)
        sums = tl.dot(dlogits, xh, sums, input_precision=PRECISION)
        offset_sums += tl.sum(dlogits, 1)
    part = group * tl.num_programs(1) + split
    tl.store(
        dq + part * R * D + rows[:, None] * D + cols[None, :], sums, mask=(rows < R)[:, None] & (cols < D)[None, :]
    )
    tl.store(doffset + part * R + rows, offset_sums, mask=rows < R)


@jit
def dx_kernel(  # type: ignore[no-untyped-def]
    q,  # b p r d, p = passes x groups
    offset,  # b p r
    dtotal,  # b p r d
    dmass,  # b p r
    x,  # b n d
    mask,  # b n
    dx,  # b n d
    n,
    blocks,  # p
    D: tl.constexpr,
    R: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X: the gradient of one tile of inputs through all groups of all passes."""
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    if mask is not None:
        mask += batch * n
    xh, rstd, real = _xh(x + batch * n * D, mask, tokens, n, D, WIDTH, NORM_EPS)
    grad = tl.zeros((TOKENS, WIDTH), tl.float32)
    for block in range(batch * blocks, (batch + 1) * blocks):
        queries = _matrix(q + block * R * D, D, WIDTH, R, ROWS)
        dtotals = _matrix(dtotal + block * R * D, D, WIDTH, R, ROWS)
        offsets = tl.load(offset + block * R + rows, mask=rows < R, other=float("-inf"))
        dmasses = tl.load(dmass + block * R + rows, mask=rows < R, other=0.0)
        a = _compete(queries, offsets, xh, PRECISION)
        dlogits = _dlogits(a, dtotals, dmasses, xh, real, PRECISION)
        w = tl.where(real[None, :], a + EPS, 0.0)
        grad = tl.dot(tl.trans(w), dtotals, grad, input_precision=PRECISION)
        grad = tl.dot(tl.trans(dlogits), queries, grad, input_precision=PRECISION)
    if NORM_EPS is not None:
        mean, slope = tl.sum(grad, 1) / D, tl.sum(grad * xh, 1) / D
        grad = (grad - mean[:, None] - xh * slope[:, None]) * rstd[:, None]
    tl.store(
        dx + batch * n * D + tokens[:, None] * D + cols[None, :],
        tl.where(real[:, None], grad, 0.0).to(dx.dtype.element_ty),
        mask=(tokens < n)[:, None] & (cols < D)[None, :],
    )


@jit
def _linear(  # type: ignore[no-untyped-def]
    source,
    weight,
    columns,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of a W^T, of a W if turned: a (rows, in) in scratch, W (out, in) or turned (in, out)."""
    rows = tl.arange(0, ROWS)
    y = tl.zeros((ROWS, PART), tl.float32)
    for start in range(0, IN, PART):
        inner = start + tl.arange(0, PART)
        a = tl.load(source + rows[:, None] * IN + inner[None, :], mask=(inner < IN)[None, :], other=0.0)
        if TURNED:
            at = inner[:, None] * OUT + columns[None, :]
        else:
            at = columns[None, :] * IN + inner[:, None]
        w = tl.load(weight + at, mask=(inner < IN)[:, None] & (columns < OUT)[None, :], other=0.0).to(tl.float32)
        y = tl.dot(a, w, y, input_precision=PRECISION)
    return y


@jit
def _vector(bias, columns, D: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@jit
def _norm(source, result, gain, bias, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Layer norm of (rows, d), from scratch to scratch."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at, inside = rows[:, None] * D + cols[None, :], (cols < D)[None, :]
    s = tl.load(source + at, mask=inside, other=0.0)
    s = tl.where(inside, s - (tl.sum(s, 1) / D)[:, None], 0.0)
    s = s / tl.sqrt(tl.sum(s * s, 1) / D + EPS)[:, None]
    tl.store(result + at, s * _vector(gain, cols, D) + _vector(bias, cols, D), mask=inside)


@jit
def update_kernel(  # type: ignore[no-untyped-def]
    total,  # b s k d
    mass,  # b s k
    slots,  # rows c, whole tiles of rows
    fresh,  # rows c, the next slots
    scratch,  # rows, c + e + max(d, hidden)
    qk,  # b k d
    offset,  # b k
    slot_mask,  # b k
    norm_gain,
    norm_bias,
    value,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    mlp_gain,
    mlp_bias,
    up,
    up_bias,
    down,
    down_bias,
    slots_gain,
    slots_bias,
    query,
    key,
    count,  # b k
    splits,
    scale,
    mean_offset,
    STARTS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    HIDDEN: tl.constexpr,
    NORM_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """U: partial sums become the next slots, and these the next queries of xh and offsets; with STARTS the slots are given.

    A stage makes rows of scratch, which the next one reads after a barrier.
    """
    rows, part = tl.arange(0, ROWS), tl.arange(0, PART)
    program = tl.program_id(0)
    row = program * ROWS + rows
    real = row < count
    state, following = slots + program * ROWS * C, fresh + program * ROWS * C
    long_width: tl.constexpr = D if D > HIDDEN else HIDDEN
    normed = scratch + program * ROWS * (C + E + long_width)
    inner = normed + ROWS * C
    long = inner + ROWS * E
    current = state
    if not STARTS:
        current = following
        part_row = (row // K) * splits * K + row % K
        masses = tl.zeros((ROWS,), tl.float32)
        for split in range(splits):
            masses += tl.load(mass + part_row + split * K, mask=real, other=0.0)
        # the smallest normal number keeps what won nothing finite
        divisor = tl.maximum(masses + mean_offset, 1.1754944e-38)
        for start in range(0, D, PART):
            cols = start + part
            sums = tl.zeros((ROWS, PART), tl.float32)
            for split in range(splits):
                at = (part_row + split * K)[:, None] * D + cols[None, :]
                sums += tl.load(total + at, mask=real[:, None] & (cols < D)[None, :], other=0.0)
            mean = (sums * _vector(norm_gain, cols, D) + masses[:, None] * _vector(norm_bias, cols, D)) / divisor[
                :, None
            ]
            tl.store(long + rows[:, None] * D + cols[None, :], mean, mask=(cols < D)[None, :])
        tl.debug_barrier()
        for start in range(0, E, PART):
            cols = start + part
            u = _linear(long, value, cols, D, E, ROWS, PART, False, PRECISION)
            tl.store(inner + rows[:, None] * E + cols[None, :], u, mask=(cols < E)[None, :])
        tl.debug_barrier()
        for start in range(0, C, PART):
            cols = start + part
            at, inside = rows[:, None] * C + cols[None, :], (cols < C)[None, :]
            # the weights of the gates r and z and of the candidate n are stacked
            r = _linear(inner, weight_ih, cols, E, C, ROWS, PART, False, PRECISION) + _vector(bias_ih, cols, C)
            r += _linear(state, weight_hh, cols, C, C, ROWS, PART, False, PRECISION) + _vector(bias_hh, cols, C)
            z = _linear(inner, weight_ih + C * E, cols, E, C, ROWS, PART, False, PRECISION)
            z += _linear(state, weight_hh + C * C, cols, C, C, ROWS, PART, False, PRECISION)
            z += _vector(bias_ih + C, cols, C) + _vector(bias_hh + C, cols, C)
            n = _linear(state, weight_hh + 2 * C * C, cols, C, C, ROWS, PART, False, PRECISION)
            n = tl.sigmoid(r) * (n + _vector(bias_hh + 2 * C, cols, C))
            n += _linear(inner, weight_ih + 2 * C * E, cols, E, C, ROWS, PART, False, PRECISION)
            # tanh as a sigmoid, which does not overflow
            n = 2.0 * tl.sigmoid(2.0 * (n + _vector(bias_ih + 2 * C, cols, C))) - 1.0
            s = tl.load(state + at, mask=inside, other=0.0)
            tl.store(following + at, n + tl.sigmoid(z) * (s - n), mask=inside)
        tl.debug_barrier()
        _norm(following, normed, mlp_gain, mlp_bias, C, WIDTH, ROWS, NORM_EPS)
        tl.debug_barrier()
        for start in range(0, HIDDEN, PART):
            cols = start + part
            y = _linear(normed, up, cols, C, HIDDEN, ROWS, PART, False, PRECISION) + _vector(up_bias, cols, HIDDEN)
            at = rows[:, None] * HIDDEN + cols[None, :]
            tl.store(long + at, tl.maximum(y, 0.0), mask=(cols < HIDDEN)[None, :])
        tl.debug_barrier()
        for start in range(0, C, PART):
            cols = start + part
            at, inside = rows[:, None] * C + cols[None, :], (cols < C)[None, :]
            s = tl.load(following + at, mask=inside, other=0.0) + _vector(down_bias, cols, C)
            s += _linear(long, down, cols, HIDDEN, C, ROWS, PART, False, PRECISION)
            tl.store(following + at, s, mask=inside)
        tl.debug_barrier()
    _norm(current, normed, slots_gain, slots_bias, C, WIDTH, ROWS, NORM_EPS)
    tl.debug_barrier()
    for start in range(0, E, PART):
        cols = start + part
        q = scale * _linear(normed, query, cols, C, E, ROWS, PART, False, PRECISION)
        tl.store(inner + rows[:, None] * E + cols[None, :], q, mask=(cols < E)[None, :])
    tl.debug_barrier()
    offsets = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, PART):
        cols = start + part
        y = _linear(inner, key, cols, E, D, ROWS, PART, True, PRECISION)
        offsets += tl.sum(y * _vector(norm_bias, cols, D), 1)
        at = row[:, None] * D + cols[None, :]
        tl.store(qk + at, y * _vector(norm_gain, cols, D), mask=real[:, None] & (cols < D)[None, :])
    if slot_mask is not None:
        offsets = tl.where(tl.load(slot_mask + row, mask=real, other=0) != 0, offsets, float("-inf"))
    tl.store(offset + row, offsets, mask=real)


def tiling(width: int, rows: int, tokens: int) -> dict[str, int]:
    """Sizes of a tile and the launch, for inputs of ``width`` d, ``rows`` r that compete, and at most so many ``tokens``."""
    padded = max(16, triton.next_power_of_2(width))
    # a tile's 2^13 numbers, and the sums beside them, fit the registers of 8 warps
    tokens = max(16, min(tokens, 2**13 // padded))
    return {
        "WIDTH": padded,
        # a product's inner side has 16 rows at least
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "TOKENS": tokens,
        "num_warps": 4 if padded <= 64 and padded * tokens <= 2**11 else 8,
        "num_stages": 2,
    }


class _Launch(NamedTuple):
    """What the kernels are told of one problem: q (b, rows, d) over x (b, n, d)."""

    groups: int
    slots: int  # r, those that compete
    splits: int
    stretch: int
    options: dict[str, Any]


def _precision(x: Tensor) -> str:
    """Of the products: tf32 has the range of float32 and keeps all digits of either half precision."""
    return "tf32x3" if exact(x) else "tf32"


def _launch(q: Tensor, x: Tensor, plan: Plan, tokens: int) -> _Launch:
    b, n, d = x.shape
    groups = 1 if plan.joint else plan.heads
    slots = q.shape[1] // groups
    options = {
        **tiling(d, slots, tokens),
        "D": d,
        "R": slots,
        "NORM_EPS": plan.norm_eps,
        "PRECISION": _precision(x),
        "enable_fp_fusion": True,
    }
    tiles = max(1, triton.cdiv(n, options["TOKENS"]))
    # two programs for each multiprocessor
    programs = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2 * b * groups
    splits = min(tiles, triton.cdiv(programs, b * groups))
    stretch = triton.cdiv(tiles, splits) * options["TOKENS"]
    return _Launch(groups, slots, triton.cdiv(n, stretch), stretch, options)


def messages(x: Tensor, count: int, rows: int, plan: Plan, mask: Tensor | None) -> Iterator[Tensor]:
    """Carriers of the gradient of ``x`` (b, n, d) through ``count`` passes, each with ``rows`` = h k queries.

    Each is spent on one pass. In the backward pass it takes home what the gradient of x needs of that pass: two numbers
    and two vectors for each slot; then one joint pass over x makes the whole gradient.
    """
    return iter(_Source.apply(x, mask, count, rows, plan))


def read(
    q: Tensor,
    offset: Tensor | None,
    x: Tensor,
    plan: Plan,
    *,
    message: Tensor | None = None,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass of absorbed ``q`` (b, h, k, d) and ``offset`` (b, h, k), in float32, over raw ``x`` (b, n, d).

    Without a ``message`` (see :func:`messages`) the gradient of x is left out.

    Returns:
        w xh (b, h, k, d) and mass (b, h, k), in float32. Gradients are of the first order only.
    """
    b, h, k, d = q.shape
    offset = q.new_zeros(b, h, k) if offset is None else offset
    if slot_mask is not None:
        offset = offset.masked_fill(~slot_mask[:, None], -torch.inf)
    q, offset = q.reshape(b, h * k, d), offset.reshape(b, h * k)
    if torch.is_grad_enabled():
        total, mass = _Pass.apply(q, offset, x, message, mask, plan)
    else:
        total, mass = _Pass.forward(q, offset, x, message, mask, plan)
    return total.view(b, h, k, d), mass.view(b, h, k)


def _partial_sums(q: Tensor, offset: Tensor, x: Tensor, mask: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """Total (b, g, s, r, d) and mass (b, g, s, r) of contiguous q (b, rows, d), offset (b, rows) and x (b, n, d)."""
    to = _launch(q, x, plan, STREAMED)
    b, n, d = x.shape
    total = q.new_empty(b, to.groups, to.splits, to.slots, d)
    mass = q.new_empty(b, to.groups, to.splits, to.slots)
    pass_kernel[b * to.groups, to.splits](
        q,
        offset,
        x,
        None if mask is None else mask.contiguous(),
        total,
        mass,
        n,
        to.stretch,
        to.groups,
        EPS=plan.eps,
        **to.options,
    )
    return total, mass


class Weights(NamedTuple):
    """What one iteration over one head is made of, besides the inputs: norms, maps, GRU cell and MLP, each contiguous."""

    norm_gain: Tensor  # d
    norm_bias: Tensor
    value: Tensor  # e d
    weight_ih: Tensor  # 3c e
    weight_hh: Tensor  # 3c c
    bias_ih: Tensor  # 3c
    bias_hh: Tensor
    mlp_gain: Tensor  # c
    mlp_bias: Tensor
    up: Tensor  # hidden c
    up_bias: Tensor  # hidden
    down: Tensor  # c hidden
    down_bias: Tensor  # c
    slots_gain: Tensor  # c
    slots_bias: Tensor
    query: Tensor  # e c
    key: Tensor  # e d


def iterate(
    x: Tensor,
    slots: Tensor,
    weights: Weights,
    plan: Plan,
    *,
    iterations: int,
    scale: float,
    offset: float = 0.0,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """Slot Attention's iterations over ``x`` (b, n, d) from ``slots`` (b, k, c), two launches each, without gradients.

    Args:
        x: in float32 or half precision.
        slots: in float32.
        weights: all on the device of x.
        plan: of one head; its norm is that of the slots too.
        iterations: T.
        scale: of the queries.
        offset: added to the mass that divides the total.
        mask: (b, n) bool, True = real input.
        slot_mask: (b, k) bool, True = real slot.
    """
    b, k, c = slots.shape
    d, (e, _), hidden = x.shape[-1], weights.value.shape, len(weights.up)
    rows = 16
    tiles = triton.cdiv(b * k, rows)
    x = x.contiguous()
    # rows that fill the last tile go through all stages as zeros
    state = slots.new_zeros(tiles * rows, c)
    state[: b * k] = slots.flatten(0, 1)
    fresh = torch.empty_like(state)
    scratch = state.new_empty(tiles * rows, c + e + max(d, hidden))
    q, qk_offset = state.new_empty(b, k, d), state.new_empty(b, k)
    total, mass = q, qk_offset  # not read at the start
    for t in range(iterations + 1):
        update_kernel[(tiles,)](
            total,
            mass,
            state,
            fresh,
            scratch,
            q,
            qk_offset,
            None if slot_mask is None else slot_mask.contiguous(),
            *weights,
            b * k,
            total.shape[2] if t else 0,
            scale,
            offset,
            STARTS=t == 0,
            K=k,
            D=d,
            C=c,
            E=e,
            HIDDEN=hidden,
            NORM_EPS=plan.norm_eps,
            WIDTH=triton.next_power_of_2(c),
            ROWS=rows,
            PART=64 if max(c, d, e, hidden) > 32 else 32,
            PRECISION=_precision(x),
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
        if t:
            state, fresh = fresh, state
        if t < iterations:
            total, mass = _partial_sums(q, qk_offset, x, mask, plan)
    return state[: b * k].view(b, k, c)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, offset: Tensor, x: Tensor, message: Tensor | None, mask: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        total, mass = _partial_sums(q.contiguous(), offset.contiguous(), x.contiguous(), mask, plan)
        return total.sum(2).view_as(q), mass.sum(2).view_as(offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, offset, x, _, mask, ctx.plan = inputs
        ctx.save_for_backward(q, offset, x, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dmass: Tensor) -> tuple[Tensor | None, ...]:
        q, offset, x, mask = ctx.saved_tensors
        to = _launch(q, x, ctx.plan, STREAMED)
        b, n, d = x.shape
        dq = q.new_empty(b, to.groups, to.splits, to.slots, d)
        doffset = q.new_empty(b, to.groups, to.splits, to.slots)
        query_gradient_kernel[b * to.groups, to.splits](
            q.contiguous(),
            offset.contiguous(),
            dtotal.contiguous(),
            dmass.contiguous(),
            x.contiguous(),
            None if mask is None else mask.contiguous(),
            dq,
            doffset,
            n,
            to.stretch,
            to.groups,
            **to.options,
        )
        message = torch.cat([q, offset[..., None], dtotal, dmass[..., None]], -1) if ctx.needs_input_grad[3] else None
        return dq.sum(2).view_as(q), doffset.sum(2).view_as(offset), None, message, None, None


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, count: int, rows: int, plan: Plan) -> tuple[Tensor, ...]:
        return tuple(x.new_zeros(len(x), rows, 2 * x.shape[-1] + 2, dtype=torch.float32) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, _, _, ctx.plan = inputs
        ctx.save_for_backward(x, mask)
        # a message that no pass has used stays None
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        used = [grad for grad in grads if grad is not None]
        if not used:
            return (None,) * 5
        b, n, d = x.shape
        to = _launch(used[0], x, ctx.plan, ALONE_EXACT if exact(x) else ALONE)
        q, offset, dtotal, dmass = (t.contiguous() for t in torch.cat(used, 1).split([d, 1, d, 1], -1))
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dx_kernel[triton.cdiv(n, to.options["TOKENS"]), b](
            q,
            offset,
            dtotal,
            dmass,
            x.contiguous(),
            None if mask is None else mask.contiguous(),
            dx,
            n,
            len(used) * to.groups,
            EPS=ctx.plan.eps,
            **to.options,
        )
        return dx, None, None, None, None
