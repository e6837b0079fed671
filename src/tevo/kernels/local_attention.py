"""Windowed attention with a bias by offset, on the CPU: fused forward pass, backward pass in pieces that stay in cache.

    P_ij = exp(q_i . k_j + bias_(j-i) - L_i),   L_i = log of the sum over the window                      (1)
    dP = dO V^T,   dS = P * (dP - rowsum(dO * O)),   dQ = dS K,   dK = dS^T Q,   dV = P^T dO              (2)
    dbias_t = sum of dS_ij over j - i = t                                                                 (3)

The function is that of :func:`tevo.functional.local_attention.local_attention`, which is the reference. torch's fused
kernel has no gradient for a bias; here P is made again from q, k and L, a few blocks of queries at a time, and (3) sums
blocks before it sums diagonals, so that nothing of size n w is ever kept. Saved for backward: q, k, v, o and L. Blocks all of
whose keys exist share one small table of addends; only the others get one of their own. Without a mask the two ends of a row
are one block each, so that no key is copied.

Letters beyond the shared ones: r radius, N blocks, c queries of a block, w keys of its window.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.functional import local_attention as plain

__all__ = ["local_attention"]

# numbers in a piece of P: few enough for two of them to stay in cache, enough to outweigh the calls from Python
PIECE = 2**19
# tokens below which the reference trains faster: its calls from Python serve all rows at once
SHORT = 2**9
LOG2_E = math.log2(math.e)
# an exponent whose power is zero, in single precision too, and that stays finite when others are added
FAR = -1e30


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    radius: int,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As :func:`tevo.functional.local_attention.local_attention`, to which other devices, half precision, values of
    another width than keys and short sequences go; arguments, result and errors are the same. Differentiable twice.
    """
    here = q.device.type == "cpu" and q.dtype == bias.dtype and q.dtype in (torch.float32, torch.float64)
    # the fused kernel wants one width; up to four radii the dense form is as fast
    fits = q.ndim == 4 and q.shape == v.shape and q.shape[2] > max(4 * radius, plain.SMALLEST_BLOCK)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
    if not here or not fits or 0 in q.shape or (trained and q.shape[2] < SHORT):
        return plain.local_attention(q, k, v, radius=radius, mask=mask, bias=bias, scale=scale)
    plain._check(q, k, v, radius, mask, bias, None, None, None, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # as in the plain form: smaller blocks need fewer keys in vain, but more windows, whose gradients must be added up
    c = max(plain.SMALLEST_BLOCK, -(-radius // (2 if trained else 4)))
    run = _Local.apply if trained else _forward
    o: Tensor = run(q if scale == 1.0 else q * scale, k, v, bias, mask, c)[0]
    return o


class _Blocks(NamedTuple):
    """How n tokens are cut: ``blocks`` blocks of c, of which ``before`` on each side hold the rest of a window."""

    c: int
    blocks: int
    before: int
    tail: int

    @property
    def side(self) -> int:
        return self.before * self.c

    @property
    def w(self) -> int:
        return (2 * self.before + 1) * self.c


def _cut(n: int, r: int, c: int) -> _Blocks:
    count = -(-n // c)
    return _Blocks(c, count, -(-r // c), count * c - n)


def _existing(mask: Tensor, cut: _Blocks) -> Tensor:
    """(N, w): which keys of the windows of a row (n,) exist."""
    return F.pad(mask, (cut.side, cut.side + cut.tail)).unfold(0, cut.w, cut.c)


def _offsets(queries: int, keys: int, shift: int, device: torch.device) -> Tensor:
    """(queries, keys): key position - query position, which is ``shift`` for the first of both."""
    return torch.arange(shift, shift + keys, device=device) - torch.arange(queries, device=device)[:, None]


def _addends(bias: Tensor, queries: int, keys: int, shift: int, outside: float) -> Tensor:
    """(h, queries, keys): the bias within the window, ``outside`` elsewhere."""
    r = bias.shape[1] // 2
    # every query's row is the one before, shifted by one
    row = F.pad(bias, (queries - 1 - shift - r, shift + keys - 1 - r), value=outside)
    return row.unfold(1, keys, 1).contiguous().flip(1)


def _whole(existing: Tensor) -> tuple[int, int]:
    """The first stretch of blocks (N, w) all of whose keys exist."""
    flags = existing.all(-1).tolist()
    start = flags.index(True) if True in flags else 0
    rest = flags[start:]
    return start, start + (rest.index(False) if False in rest else len(rest))


def _stretch(x: Tensor, first: int, last: int) -> Tensor:
    """Tokens ``first`` to ``last`` of (h, n, e), zeros where there are none: a view if all exist."""
    n = x.shape[1]
    before, after = max(-first, 0), max(last - n, 0)
    x = x[:, max(first, 0) : min(last, n)]
    return F.pad(x, (0, 0, before, after)) if before + after else x


@torch.library.custom_op("tevo::local_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, c: int) -> tuple[Tensor, Tensor]:
    b, h, n, e = q.shape
    cut = _cut(n, bias.shape[1] // 2, c)
    # heads beside each other, as the projection wants them
    o, lse = q.new_empty(b, n, h, e), q.new_empty(b, n, h)
    if mask is None:
        _forward_whole(q, k, v, bias, cut, o, lse)
    else:
        for row in range(b):
            _forward_masked(q[row], k[row], v[row], bias, mask[row], cut, o[row], lse[row])
    return o.transpose(1, 2), lse.transpose(1, 2)


def _lowest(x: Tensor) -> float:
    """Finite, so that a query without any key has finite weights before they are set to zero."""
    return torch.finfo(x.dtype).min / 4


def _fused(q: Tensor, k: Tensor, v: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """(N, h, c, e) and (N, h, w, e), with (#N, h, c, w), give (N, c, h, e) and (N, c, h)."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=addend.expand(len(q), -1, -1, -1), scale=1.0
    )
    return o.transpose(1, 2), lse.transpose(1, 2)


def _forward_whole(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cut: _Blocks, o: Tensor, lse: Tensor) -> None:
    """All keys of (b, h, n, e) exist: the kernel reads those that were given."""
    n, r, c, lowest = q.shape[2], bias.shape[1] // 2, cut.c, _lowest(q)
    # blocks whose windows lie within the row; what is before and after them is one block each, with fewer keys
    inside = max(0, (n - 2 * cut.side) // c) * c
    start = cut.side if inside else n
    end = start + inside
    for at, stop in ((0, start), (end, n)):
        if at < stop:
            first, last = max(at - r, 0), min(stop + r, n)
            addend = _addends(bias, stop - at, last - first, first - at, lowest)
            o[:, at:stop], lse[:, at:stop] = _fused(
                q[:, :, at:stop], k[:, :, first:last], v[:, :, first:last], addend[None]
            )
    if not inside:
        return
    near = _addends(bias, c, cut.w, -cut.side, lowest)[None]
    for row in range(len(q)):
        q_ = q[row, :, start:end].unflatten(1, (-1, c)).transpose(0, 1)  # N h c e
        # blocks are the kernel's batch
        k_, v_ = (x[row, :, : end + cut.side].unfold(1, cut.w, c).permute(1, 0, 3, 2) for x in (k, v))  # N h w e
        o[row, start:end], lse[row, start:end] = (x.flatten(0, 1) for x in _fused(q_, k_, v_, near))


def _forward_masked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, cut: _Blocks, o: Tensor, lse: Tensor
) -> None:
    """One row (h, n, e) of whose keys only those of ``mask`` (n,) exist."""
    n, c, lowest = q.shape[1], cut.c, _lowest(q)
    near = _addends(bias, c, cut.w, -cut.side, lowest)
    existing = _existing(mask, cut)
    start, end = _whole(existing)
    for first, last, whole in ((0, start, False), (start, end, True), (end, cut.blocks, False)):
        if first == last:
            continue
        at, stop = first * c, min(last * c, n)
        q_ = _stretch(q, at, last * c).unflatten(1, (-1, c)).transpose(0, 1)  # N h c e
        # where all keys exist, the kernel reads windows of the very keys that were given
        k_, v_ = (_stretch(x, at - cut.side, last * c + cut.side) for x in (k, v))
        addend = near[None]
        if not whole:
            addend = torch.where(existing[first:last, None, None], near, lowest)  # N h c w
            gone = ~_stretch(mask[None, :, None], at - cut.side, last * c + cut.side)
            k_, v_ = k_.masked_fill(gone, 0.0), v_.masked_fill(gone, 0.0)
        k_, v_ = (x.unfold(1, cut.w, c).permute(1, 0, 3, 2) for x in (k_, v_))  # N h w e
        o_, lse_ = (x.flatten(0, 1)[: stop - at] for x in _fused(q_, k_, v_, addend))
        if not whole:
            o_ = o_.masked_fill((lse_ < lowest / 2)[..., None], 0.0)
        o[at:stop], lse[at:stop] = o_, lse_


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, c: int) -> tuple[Tensor, Tensor]:
    b, h, n, e = q.shape
    return q.new_empty(b, n, h, e).transpose(1, 2), q.new_empty(b, n, h).transpose(1, 2)


def _widened(
    x: Tensor, columns: tuple[Tensor | float, ...], before: int, after: int, fill: tuple[float, ...]
) -> Tensor:
    """(h, n, e) with more columns (h, n) or (n,) behind its own, and tokens around it, zeros but for ``fill`` there."""
    h, n, e = x.shape
    made = x.new_zeros(h, before + n + after, e + len(columns))
    made[:, before : before + n, :e] = x
    for i, (column, other) in enumerate(zip(columns, fill, strict=True)):
        made[:, :, e + i] = other
        made[:, before : before + n, e + i] = column
    return made


@torch.library.custom_op("tevo::local_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, c: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n, e = q.shape
    cut = _cut(n, bias.shape[1] // 2, c)
    w, side, blocks = cut.w, cut.side, cut.blocks
    # powers of two, since torch's exp takes several times as long where it meets minus infinity
    near = _addends(bias * LOG2_E, c, cut.w, -cut.side, -torch.inf)  # h c w
    k, v = plain._blank(mask, k, v)
    delta = (do * o).sum(-1)
    # a query that sees nothing has weights of zero
    lse = lse.masked_fill(lse < torch.finfo(q.dtype).min / 8, -FAR) * LOG2_E
    dq, dk, dv = (x.new_empty(b, n, h, e) for x in (q, k, v))
    total = torch.zeros_like(near)
    step = max(1, PIECE // (c * w))
    for row in range(b):
        absent: Tensor | float = 0.0 if mask is None else torch.where(mask[row], 0.0, FAR)
        # products of longer rows are the exponents (eq. 1), and dP - rowsum(dO * O), without a pass of their own
        qs = _widened(q[row] * LOG2_E, (-lse[row], 1.0), 0, cut.tail, (FAR, 1.0)).unflatten(1, (blocks, c))
        dos = _widened(do[row], (-delta[row],), 0, cut.tail, (0.0,)).unflatten(1, (blocks, c))  # h N c e+1
        ks = _widened(k[row], (1.0, absent), side, side + cut.tail, (1.0, FAR)).unfold(1, w, c)  # h N e+2 w
        vs = _widened(v[row], (1.0,), side, side + cut.tail, (1.0,)).unfold(1, w, c)
        sums = [x.new_zeros(h, blocks + 2 * cut.before, c, e) for x in (k, v)]
        for head in range(h):
            for first in range(0, blocks, step):
                last = min(first + step, blocks)
                q_, do_, k_, v_ = (x[head, first:last] for x in (qs, dos, ks, vs))
                p = torch.baddbmm(near[head], q_, k_).exp2_()  # N c w
                ds = torch.bmm(do_, v_).mul_(p)  # (eq. 2)
                total[head] += ds.sum(0)
                here = torch.bmm(ds, k_[:, :e].mT).flatten(0, 1)
                dq[row, first * c : last * c, head] = here[: n - first * c]
                for x, weights, other in zip(sums, (ds, p), (q_[..., :e], do_[..., :e]), strict=True):
                    # blocks of keys overlap, and are added to one after the other
                    for i, part in enumerate(weights.split(c, 2)):
                        x[head, first + i : last + i].baddbmm_(part.mT, other)
        for x, into, factor in zip(sums, (dk, dv), (1 / LOG2_E, 1.0), strict=True):
            into[row] = x.flatten(1, 2)[:, side : side + n].transpose(0, 1).mul_(factor)
    offset = _offsets(c, w, -side, q.device)
    seen = offset.abs() <= bias.shape[1] // 2
    dbias = torch.zeros_like(bias).index_add_(1, offset[seen] + bias.shape[1] // 2, total[:, seen])  # (eq. 3)
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    if mask is not None:
        dk, dv = (x.masked_fill_(~mask[:, None, :, None], 0.0) for x in (dk, dv))
    return dq, dk, dv, dbias


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, c: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n, e = q.shape
    dq, dk, dv = (x.new_empty(b, n, h, e).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv, bias.new_empty(bias.shape)


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, c: int) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, bias, mask, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.c = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_LocalBackward.apply(do, *ctx.saved_tensors, ctx.c), None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_Local, info.batch_size, dims, inputs)


class _LocalBackward(torch.autograd.Function):
    """Its own derivatives are those of the plain form; o and L are functions of the rest."""

    @staticmethod
    def forward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor, c: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _backward(do, q, k, v, bias, mask, o, lse, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, mask = ctx.saved_tensors
        with torch.enable_grad():
            do, q, k, v, bias = (x.detach().requires_grad_() for x in leaves)
            o = plain.local_attention(q, k, v, radius=bias.shape[1] // 2, mask=mask, bias=bias, scale=1.0)
            first = torch.autograd.grad(o, (q, k, v, bias), do, create_graph=True)
            found = torch.autograd.grad(first, (do, q, k, v, bias), dy)
        return *found, None, None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _one_by_one(_LocalBackward, info.batch_size, dims, inputs)


def _one_by_one(function: Any, size: int, dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    found = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)
