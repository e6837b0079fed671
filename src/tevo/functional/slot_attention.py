"""Reading n inputs into k competing slots: the pass that Slot Attention repeats, in three forms of one function.

    y = LN(x) = xh * g + b,    l = q (y Wk^T)^T,    a = softmax over slots of l,    w = a + eps          (1)
    total = w (y Wv^T),        mass = sum over inputs of w                                                (2)

*Plain*: keys and values are made once, then (1) and (2). *Absorbed*: they are never made, because

    l = (q Wk * g) xh^T + (q Wk) b^T,    total = ((w xh) * g + mass b) Wv^T                               (3)

works on the k slots instead of the n inputs. xh is the norm without its affine part, so that it needs no gradient where
x needs none. *Lean*: the absorbed form over chunks of the inputs, with nothing of size n saved; the backward pass makes
everything again, and the gradient of x is formed once, jointly for all passes over it.

Letters: b batch, n inputs, d their width, h heads, k slots, e width of a head. A token masked as padding has w = 0; a masked
slot has a = 0. Padded tokens must not hold NaN except in the lean form's x. FLOPs of T passes, n large: plain
4 n d h e + 4 T k n h e, absorbed 4 T k n h d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Lean",
    "absorb",
    "absorption_pays",
    "compete",
    "lean_read",
    "messages",
    "read",
    "unabsorb",
]

# numbers of x in a chunk of the lean form: few enough for a core's cache, enough to outweigh the calls from Python
CHUNK = 2**18
# inputs of a whole batch below which the absorbed form's further calls from Python cost more than the products it saves
FEW = 2**11


def compete(
    logits: Tensor, *, joint: bool = False, mask: Tensor | None = None, slot_mask: Tensor | None = None
) -> Tensor:
    """Softmax of ``logits`` (b, h, k, n) over the slots, or with ``joint`` over heads and slots.

    ``mask`` (b, n) and ``slot_mask`` (b, k), bool, True = real; weights of padding and of masked slots are zeros.
    """
    if slot_mask is not None:
        # a finite fill keeps the softmax, and its gradient, free of NaN where no slot is real
        logits = logits.masked_fill(~slot_mask[:, None, :, None], torch.finfo(logits.dtype).min)
    a = logits.flatten(1, 2).softmax(1).view_as(logits) if joint else logits.softmax(2)
    if slot_mask is not None:
        a = a.masked_fill(~slot_mask[:, None, :, None], 0.0)
    return a if mask is None else a.masked_fill(~mask[:, None, None], 0.0)


def read(a: Tensor, values: Tensor, *, eps: float = 0.0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equation (2) from ``a`` (b, h, k, n) and values (b, h, n, v): total (b, h, k, v), mass (b, h, k).

    ``eps`` is added to the weight of every token that ``mask`` (b, n) calls real.
    """
    w = a if eps == 0.0 else a + eps
    if mask is not None:
        w = w.masked_fill(~mask[:, None, None], 0.0)
    return w @ values, w.sum(-1)


def absorb(q: Tensor, key_weight: Tensor, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Left half of equation (3): q (b, h, k, e) and Wk (h e, d) give queries (b, h, k, d) of xh, and offsets (b, h, k)."""
    qk = q @ key_weight.unflatten(0, (q.shape[1], -1))
    if gain is None or bias is None:
        return qk, None
    return qk * gain, qk @ bias


def unabsorb(total: Tensor, mass: Tensor, value_weight: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """Right half of equation (3): w xh (b, h, k, d), mass (b, h, k) and Wv (h e, d) give total (b, h, k, e)."""
    if gain is not None and bias is not None:
        total = total * gain + mass[..., None] * bias
    return total @ value_weight.unflatten(0, (total.shape[1], -1)).mT


def absorption_pays(
    *, tokens: int, width: int, inner: int, slots: int, iterations: int, heads: int = 1, frozen: bool = False
) -> bool:
    """Whether the absorbed form takes no more FLOPs than the plain one, forward and backward, for one row of a batch.

    Args:
        tokens: inputs n.
        width: width d of an input.
        inner: width h e of keys and values.
        slots: slots k.
        iterations: passes T over the inputs.
        heads: heads h; the absorbed form has a query of width d for each.
        frozen: the inputs need no gradient, which spares a third of either form's products with them.
    """
    # a product goes forward once and back twice, or back once where one factor is the frozen inputs
    with_inputs = 2 if frozen else 3
    plain = tokens * inner * (with_inputs * width + 3 * iterations * slots)
    absorbed = iterations * slots * width * (with_inputs * tokens * heads + 3 * inner)
    return absorbed <= plain


class Lean(NamedTuple):
    """What all lean passes over one x share.

    Args:
        heads: heads h.
        joint: the softmax is over heads and slots.
        norm_eps: eps of the norm; None: no norm, xh = x.
        eps: added to every weight of a real token.
        chunk: numbers of x that are worked on at a time.
    """

    heads: int
    joint: bool
    norm_eps: float | None
    eps: float
    chunk: int = CHUNK


def messages(
    x: Tensor, count: int, rows: int, shared: Lean, mask: Tensor | None, slot_mask: Tensor | None
) -> Iterator[Tensor]:
    """Carriers of the gradient of ``x`` (b, n, d) through ``count`` lean passes, each with ``rows`` = h k queries.

    Each is spent on one pass. In the backward pass it takes home what the gradient of x needs of that pass: two numbers
    and two vectors for each slot; then one joint pass over x makes the whole gradient.
    """
    return iter(_Source.apply(x, mask, slot_mask, count, rows, shared))


def lean_read(
    q: Tensor,
    offset: Tensor | None,
    x: Tensor,
    shared: Lean,
    *,
    message: Tensor | None = None,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2) for absorbed ``q`` (b, h, k, d) and ``offset`` (b, h, k) over raw ``x`` (b, n, d).

    Without a ``message`` (see :func:`messages`) the gradient of x is left out.

    Returns:
        w xh (b, h, k, d) and mass (b, h, k), in the dtype of q. Gradients are of the first order only.
    """
    b, h, k, d = q.shape
    q = q.reshape(b, h * k, d)
    offset = q.new_zeros(b, h * k) if offset is None else offset.reshape(b, h * k)
    if torch.is_grad_enabled():
        total, mass = _Pass.apply(q, offset, x, message, mask, slot_mask, shared)
    else:
        total, mass = _Pass.forward(q, offset, x, message, mask, slot_mask, shared)
    return total.view(b, h, k, d), mass.view(b, h, k)


def _pieces(x: Tensor, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of x, piece by piece: several whole rows, or a stretch of one; each is contiguous if x is."""
    b, n, d = x.shape
    rows, stretch = max(1, chunk // max(1, n * d)), max(1, chunk // d)
    for i in range(0, b, rows):
        if rows > 1 or stretch >= n:
            yield slice(i, i + rows), slice(0, n)
        else:
            for j in range(0, n, stretch):
                yield slice(i, i + 1), slice(j, j + stretch)


class _Piece(NamedTuple):
    x: Tensor  # b c d, in full precision
    xh: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    mask: Tensor | None


def _piece(x: Tensor, mask: Tensor | None, rows: slice, tokens: slice, shared: Lean, dtype: torch.dtype) -> _Piece:
    part = x[rows, tokens].to(dtype)
    if mask is not None:
        mask = mask[rows, tokens]
        part = part.masked_fill(~mask[..., None], 0.0)
    if shared.norm_eps is None:
        return _Piece(part, part, None, None, mask)
    xh, mean, rstd = torch.native_layer_norm(part, [x.shape[-1]], None, None, shared.norm_eps)
    return _Piece(part, xh, mean, rstd, mask)


def _weights(q: Tensor, offset: Tensor, p: _Piece, slot_mask: Tensor | None, shared: Lean, passes: int = 1) -> Tensor:
    """The softmax (b passes, h, k, c) of stacked queries (b, passes h k, d)."""
    logits = torch.baddbmm(offset[..., None], q, p.xh.mT)  # b thk c
    logits = logits.view(logits.shape[0] * passes, shared.heads, -1, logits.shape[-1])
    if passes > 1:
        slot_mask = None if slot_mask is None else slot_mask.repeat_interleave(passes, 0)
    return compete(logits, joint=shared.joint, slot_mask=slot_mask)


def _through_softmax(a: Tensor, da: Tensor, joint: bool) -> Tensor:
    """Gradient of the logits from that of a (b, h, k, c); overwrites ``da``."""
    inner = (a * da).sum((1, 2) if joint else 2, keepdim=True)
    return da.sub_(inner).mul_(a)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        offset: Tensor,
        x: Tensor,
        message: Tensor | None,
        mask: Tensor | None,
        slot_mask: Tensor | None,
        shared: Lean,
    ) -> tuple[Tensor, Tensor]:
        total, mass = torch.zeros_like(q), torch.zeros_like(offset)
        for rows, tokens in _pieces(x, shared.chunk):
            p = _piece(x, mask, rows, tokens, shared, q.dtype)
            slots = None if slot_mask is None else slot_mask[rows]
            w = _weights(q[rows], offset[rows], p, slots, shared).flatten(1, 2).add_(shared.eps)
            if p.mask is not None:
                w = w.mul_(p.mask[:, None])
            total[rows].baddbmm_(w, p.xh)
            mass[rows] += w.sum(-1)
        return total, mass

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, offset, x, _, mask, slot_mask, ctx.shared = inputs
        ctx.save_for_backward(q, offset, x, mask, slot_mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dmass: Tensor) -> tuple[Tensor | None, ...]:
        q, offset, x, mask, slot_mask = ctx.saved_tensors
        shared: Lean = ctx.shared
        dq, doffset = torch.zeros_like(q), torch.zeros_like(offset)
        with torch.autocast(x.device.type, enabled=False):
            for rows, tokens in _pieces(x, shared.chunk):
                p = _piece(x, mask, rows, tokens, shared, q.dtype)
                slots = None if slot_mask is None else slot_mask[rows]
                dlogits = _dlogits(q[rows], offset[rows], dtotal[rows], dmass[rows], p, slots, shared)[1]
                dq[rows].baddbmm_(dlogits, p.xh)
                doffset[rows] += dlogits.sum(-1)
        message = torch.cat([q, offset[..., None], dtotal, dmass[..., None]], -1) if ctx.needs_input_grad[3] else None
        return dq, doffset, None, message, None, None, None


def _dlogits(
    q: Tensor,
    offset: Tensor,
    dtotal: Tensor,
    dmass: Tensor,
    p: _Piece,
    slots: Tensor | None,
    shared: Lean,
    passes: int = 1,
) -> tuple[Tensor, Tensor]:
    """The weights w and the gradient of the logits, both (b, passes h k, c)."""
    a = _weights(q, offset, p, slots, shared, passes)
    da = torch.baddbmm(dmass[..., None], dtotal, p.xh.mT)
    if p.mask is not None:
        da = da.mul_(p.mask[:, None])
    dlogits = _through_softmax(a, da.view_as(a), shared.joint).view_as(da)
    w = a.view_as(da).add_(shared.eps)
    return (w if p.mask is None else w.mul_(p.mask[:, None])), dlogits


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, mask: Tensor | None, slot_mask: Tensor | None, count: int, rows: int, shared: Lean
    ) -> tuple[Tensor, ...]:
        b, _, d = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        return tuple(x.new_zeros(b, rows, 2 * d + 2, dtype=dtype) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, mask, slot_mask, _, _, ctx.shared = inputs
        ctx.save_for_backward(x, mask, slot_mask)
        # a message that no pass has used stays None
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, slot_mask = ctx.saved_tensors
        shared: Lean = ctx.shared
        used = [grad for grad in grads if grad is not None]
        if not used:
            return (None,) * 6
        d, passes = x.shape[-1], len(used)
        q, offset, dtotal, dmass = (t.contiguous() for t in torch.cat(used, 1).split([d, 1, d, 1], -1))
        offset, dmass = offset.squeeze(-1), dmass.squeeze(-1)
        dx = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for rows, tokens in _pieces(x, shared.chunk):
                p = _piece(x, mask, rows, tokens, shared, q.dtype)
                slots = None if slot_mask is None else slot_mask[rows]
                w, dlogits = _dlogits(q[rows], offset[rows], dtotal[rows], dmass[rows], p, slots, shared, passes)
                grad = torch.baddbmm(w.mT @ dtotal[rows], dlogits.mT, q[rows])  # b c d
                if p.mean is not None and p.rstd is not None:
                    grad = torch.ops.aten.native_layer_norm_backward(
                        grad, p.x, [d], p.mean, p.rstd, None, None, [True, False, False]
                    )[0]
                if p.mask is not None:
                    grad = grad.masked_fill(~p.mask[..., None], 0.0)
                dx[rows, tokens] = grad.to(x.dtype)
        return dx, None, None, None, None, None


def normalised(x: Tensor, eps: float | None) -> Tensor:
    """xh: ``x`` (..., d) without mean and scale; x itself without an eps."""
    return x if eps is None else F.layer_norm(x, x.shape[-1:], eps=eps)
