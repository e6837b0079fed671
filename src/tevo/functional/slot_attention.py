"""Reading n inputs into k competing slots: the pass that Slot Attention repeats, in three forms of one function.

    y = LN(x) = xh * g + b,    l = q (y Wk^T)^T,    a = softmax over slots of l,    w = a + eps          (1)
    total = w (y Wv^T),        mass = sum over inputs of w                                                (2)

*Plain*: keys and values are made once, then (1) and (2). *Absorbed*: they are never made, because

    l = (q Wk * g) xh^T + (q Wk) b^T,    total = ((w xh) * g + mass b) Wv^T                               (3)

works on the k slots instead of the n inputs. xh is the norm without its affine part, so that it needs no gradient where
x needs none. *Folded*: the absorbed form over raw x, piece by piece, in which xh is not made either. With r, the
reciprocal deviation of each token, and with vectors q' whose mean over their d numbers was taken away,

    q xh^T = (q' x^T) r,           w xh = ((w r) x)'                                                      (4)

The backward pass keeps the maps a, or makes them again so that nothing of size k n is saved; the gradient of x is formed
once, jointly for all passes over it.

Letters: b batch, n inputs, d their width, h heads, k slots, e width of a head. A token masked as padding has w = 0; a masked
slot has a = 0. Padded tokens must not hold NaN except in the folded form's x. FLOPs of T passes, n large: plain
4 n d h e + 4 T k n h e, absorbed 4 T k n h d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.functional.precision import island

__all__ = [
    "Folded",
    "Message",
    "absorb",
    "absorption_pays",
    "centred",
    "compete",
    "folded_read",
    "logits",
    "messages",
    "read",
    "reciprocal_deviation",
    "stretches",
    "unabsorb",
]

# numbers of x in a piece of the folded form: few enough for the maps to stay in cache, enough to outweigh the calls from
# Python and the threads' waiting for each other; fewer where memory is dear
CHUNK, LEAN = 2**20, 2**19
# inputs, and numbers of x, that one product of matrices should have at least
STRETCH, STRETCH_NUMBERS = 2**9, 2**17
# width from which products of few rows with all inputs are faster as products of all inputs with few columns
WIDE = 2**8
# greatest logit whose exponential, and the sum of them over the slots, stays far from overflow and underflow in float32
SAFE = 60.0
# mean square over variance of a token up to which their difference is exact enough
STEADY = 8.0
# numbers of x from which the folded form's further calls from Python cost less than the memory traffic it saves in training
MANY = 2**22
# the same in inference
MORE = 2**23
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


def stretches(n: int, d: int) -> int:
    """Into how many equal parts of a good length n inputs of width d can be divided."""
    parts = 1
    while n % 2 == 0 and n >= 2 * max(STRETCH, STRETCH_NUMBERS // d):
        n, parts = n // 2, 2 * parts
    return parts


def logits(q: Tensor, offset: Tensor | None, xh: Tensor) -> Tensor:
    """Absorbed queries (b, r, d) and their offset (b, r) give q xh^T + offset (b, r, n) for xh (b, n, d)."""
    if xh.shape[-1] >= WIDE:
        found = (xh @ q.mT).mT
        return found if offset is None else found + offset[..., None]
    return q @ xh.mT if offset is None else torch.baddbmm(offset[..., None], q, xh.mT)


class Folded(NamedTuple):
    """What all folded passes over one x share.

    Args:
        heads: heads h.
        joint: the softmax is over heads and slots.
        eps: added to every weight of a real token.
        keep: maps are saved for the backward pass; otherwise they are made again.
        chunk: numbers of x that are worked on at a time.
    """

    heads: int
    joint: bool
    eps: float
    keep: bool = False
    chunk: int = CHUNK


class Message(NamedTuple):
    """Zeros made of x, whose gradients tell what the gradient of x needs of one pass: see :func:`messages`."""

    vectors: Tensor  # b hk 2d+2
    map: Tensor | None = None  # b hk n
    dlogits: Tensor | None = None  # b hk n


def reciprocal_deviation(x: Tensor, eps: float | None, mask: Tensor | None = None) -> Tensor | None:
    """By which a norm of ``x`` (b, n, d) multiplies: (b, n), in float32 at least, without a graph; None without an eps."""
    return None if eps is None else _Rstd.apply(x, mask, eps)


def messages(
    x: Tensor,
    rstd: Tensor | None,
    count: int,
    rows: int,
    shared: Folded,
    *,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Iterator[Message]:
    """Carriers of the gradient of ``x`` (b, n, d) through ``count`` folded passes, each with ``rows`` = h k queries.

    Each is spent on one pass. In the backward pass it takes home what the gradient of x needs of that pass: two numbers
    and two vectors for each slot, and the maps where they are kept; then one joint pass over x makes the whole gradient.
    """
    flat = _Source.apply(x, rstd, mask, slot_mask, count, rows, shared)
    return (Message(*flat[i::count]) for i in range(count))


def folded_read(
    q: Tensor,
    offset: Tensor | None,
    x: Tensor,
    rstd: Tensor | None,
    shared: Folded,
    *,
    message: Message | None = None,
    mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Equations (1), (2) and (4) for absorbed ``q`` (b, h, k, d) and ``offset`` (b, h, k) over raw ``x`` (b, n, d)
    and its ``rstd`` (b, n), see :func:`reciprocal_deviation`.

    Without a ``message`` (see :func:`messages`) the gradient of x is left out. With ``norm_eps`` rstd is found on the way,
    while pieces of x are in cache.

    Returns:
        w xh (b, h, k, d) and mass (b, h, k), in the dtype of q; a (b, h, k, n) where it is kept; rstd, given or found.
        Gradients are of the first order only.
    """
    b, h, k, d = q.shape
    q = q.reshape(b, h * k, d)
    offset = q.new_zeros(b, h * k) if offset is None else offset.reshape(b, h * k)
    carriers = (None, None, None) if message is None else message
    total, mass, a, found = _Pass.apply(q, offset, x, rstd, *carriers, mask, slot_mask, shared, norm_eps)
    a = None if a is None else a.view(b, h, k, -1)
    return total.view(b, h, k, d), mass.view(b, h, k), a, rstd if found is None else found


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
    """A piece of x (b, c, d) in full precision, with rstd and mask (b, 1, c) and the slots that are real (b, k)."""

    x: Tensor
    rstd: Tensor | None
    mask: Tensor | None
    slots: Tensor | None

    def products(self, q: Tensor, offset: Tensor, out: Tensor | None = None) -> Tensor:
        """First half of equation (4), and an offset (b, r): q' (b, r, d) give (b, r, c), in ``out`` if there is one."""
        if self.x.shape[-1] < WIDE:
            found = torch.bmm(q, self.x.mT, out=out)
        else:
            # in this order, and copied, because products of few wide rows are slow
            found = (self.x @ q.mT).mT
            found = found.contiguous() if out is None else out.copy_(found)
        if self.rstd is None:
            return found.add_(offset[..., None])
        return torch.addcmul(offset[..., None], found, self.rstd, out=found)

    def sums(self, w: Tensor, spend: bool = True) -> Tensor:
        """Second half, not yet centred: w (b, r, c), unless they are to be spared, give (b, r, d)."""
        if self.rstd is not None:
            w = w.mul_(self.rstd) if spend else w * self.rstd
        return w @ self.x


def _piece(
    x: Tensor,
    rstd: Tensor | None,
    mask: Tensor | None,
    slots: Tensor | None,
    at: tuple[slice, slice],
    dtype: torch.dtype,
) -> _Piece:
    rows, tokens = at
    part = x[rows, tokens].to(dtype)
    if mask is not None:
        mask = mask[rows, None, tokens]
        part = part.masked_fill(~mask.mT, 0.0)
    if rstd is not None:
        rstd = rstd[rows, None, tokens]
    return _Piece(part, rstd, mask, None if slots is None else slots[rows])


def centred(v: Tensor) -> Tensor:
    """Equation (4)'s v' of ``v`` (..., d)."""
    return v - v.mean(-1, keepdim=True)


def _centred(v: Tensor, rstd: Tensor | None) -> Tensor:
    """The same; v itself without a norm."""
    return v if rstd is None else centred(v)


def _map(q: Tensor, offset: Tensor, p: _Piece, shared: Folded, passes: int = 1) -> Tensor:
    """The softmax a (b, passes h k, c) of stacked q' (b, passes h k, d)."""
    found = p.products(q, offset)
    apart = found.view(found.shape[0] * passes, shared.heads, -1, found.shape[-1])
    slots = p.slots if p.slots is None or passes == 1 else p.slots.repeat_interleave(passes, 0)
    a = compete(apart, joint=shared.joint, slot_mask=slots).view_as(found)
    return a if p.mask is None else a.mul_(p.mask)


def _seen(x: Tensor) -> bool:
    """Whether values of ``x`` can be looked at."""
    return not (x.is_meta or torch.compiler.is_compiling())


def _small(q: Tensor, offset: Tensor) -> bool:
    """Whether no logit of q' (b, r, d) and ``offset`` (b, r) can be great: a token's norm is at most sqrt(d) long."""
    if not _seen(q):
        return False
    most = torch.linalg.vector_norm(q, dim=-1).mul_(q.shape[-1] ** 0.5).add_(offset.abs()).max()
    return bool(most < SAFE)


def _quick_map(q: Tensor, offset: Tensor, p: _Piece, shared: Folded, out: Tensor | None) -> Tensor:
    """As :func:`_map` where logits are small: no maximum need be taken away."""
    e = p.products(q, offset, out).exp_()
    apart = e.view(e.shape[0], 1 if shared.joint else shared.heads, -1, e.shape[-1])
    share = apart.sum(2, keepdim=True).reciprocal_()
    if p.mask is not None:
        share.mul_(p.mask[:, None])
    apart.mul_(share)
    return e


def _dlogits(
    a: Tensor,
    dtotal: Tensor,
    dmass: Tensor,
    da: Tensor | None,
    p: _Piece,
    shared: Folded,
    passes: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits (b, passes h k, c), zeros for padding, from dtotal' and what reached a itself, ``da``."""
    through = p.products(dtotal, dmass, out)
    if da is not None:
        through = through.add_(da)
    # rivals in the second place
    shape = (a.shape[0] * passes * (1 if shared.joint else shared.heads), -1, a.shape[-1])
    one, other = a.reshape(shape), through.view(shape)
    return other.sub_((one * other).sum(1, keepdim=True)).mul_(one).view_as(a)


def _weighed(a: Tensor, p: _Piece, eps: float) -> Tensor:
    """Equation (1): w, in place."""
    if eps:
        a = a.add_(eps) if p.mask is None else a.add_(p.mask, alpha=eps)
    return a


def _batched(function: type[torch.autograd.Function], info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """The rule of vmap for functions of rows: rows of all examples are rows of one batch."""
    size = info.batch_size

    def flat(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return arg.flatten(0, 1)

    outs = function.apply(*(flat(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
    outs = (outs,) if isinstance(outs, Tensor) else outs
    outs = tuple(None if out is None else out.unflatten(0, (size, -1)) for out in outs)
    return outs, tuple(None if out is None else 0 for out in outs)


def _deviation(x: Tensor, eps: float) -> Tensor:
    """By which a norm of ``x`` (b, c, d) multiplies: (b, c)."""
    # three times as fast as the norm's own pass, and as exact unless a token is far from the origin
    mean = x.mean(-1).square_()
    variance = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).sub_(mean)
    if not _seen(x) or bool((mean > STEADY * variance).any()):
        return torch.native_layer_norm(x, [x.shape[-1]], *_affine(x), eps)[2].squeeze(-1)
    return variance.add_(eps).rsqrt_()


class _Rstd(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        rstd = x.new_empty(x.shape[:2], dtype=dtype)
        for at in _pieces(x, CHUNK):
            rstd[at] = _deviation(_piece(x, None, mask, None, at, dtype).x, eps)
        return rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # the gradient of x takes it into account
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        (rstd,), (dim,) = _batched(_Rstd, info, in_dims, *args)
        return rstd, dim


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        offset: Tensor,
        x: Tensor,
        rstd: Tensor | None,
        vectors: Tensor | None,
        kept: Tensor | None,
        dlogits: Tensor | None,
        mask: Tensor | None,
        slot_mask: Tensor | None,
        shared: Folded,
        norm_eps: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        measured = x.new_empty(x.shape[:2], dtype=q.dtype) if norm_eps is not None else None
        normed = rstd is not None or measured is not None
        q, total, mass = centred(q) if normed else q, torch.zeros_like(q), torch.zeros_like(offset)
        maps = q.new_empty(*offset.shape, x.shape[1]) if shared.keep else None
        small = normed and slot_mask is None and _small(q, offset)
        for at in _pieces(x, shared.chunk):
            rows, tokens = at
            p = _piece(x, rstd, mask, slot_mask, at, q.dtype)
            if measured is not None and norm_eps is not None:
                # while the piece is in cache
                measured[at] = _deviation(p.x, norm_eps)
                p = p._replace(rstd=measured[rows, None, tokens])
            kept = None if maps is None else maps[rows, :, tokens]
            if small:
                w = _quick_map(q[rows], offset[rows], p, shared, kept)
            else:
                w = _map(q[rows], offset[rows], p, shared)
                if kept is not None:
                    kept.copy_(w)
                w = _weighed(w, p, shared.eps)
            mass[rows].add_(w.sum(-1))
            total[rows].add_(p.sums(w, spend=kept is None or not small))
        if small and shared.eps:
            # a pass over the maps less: a sums to one over rivals, so that together they won the sum over real tokens
            apart = total.view(total.shape[0], 1 if shared.joint else shared.heads, -1, total.shape[-1])
            apart.add_(apart.sum(2, keepdim=True), alpha=shared.eps)
            mass.add_(x.shape[1] if mask is None else mask.sum(-1, keepdim=True), alpha=shared.eps)
        return centred(total) if normed else total, mass, maps, measured

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        q, offset, x, rstd, _, _, _, mask, slot_mask, ctx.shared, norm_eps = inputs
        if norm_eps is not None:
            rstd = output[3]
            ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(q, offset, x, rstd, mask, slot_mask, output[2])
        # nobody may ask for the maps' gradient
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dtotal: Tensor | None, dmass: Tensor | None, dmap: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        q, offset, x, rstd, mask, slot_mask, maps = ctx.saved_tensors
        shared: Folded = ctx.shared
        dtotal = torch.zeros_like(q) if dtotal is None else dtotal
        dmass = torch.zeros_like(offset) if dmass is None else dmass
        dq, doffset = torch.zeros_like(q), torch.zeros_like(offset)
        query, pull = _centred(q, rstd), _centred(dtotal, rstd)
        with_x = ctx.needs_input_grad[4]
        dlogits = torch.empty_like(maps) if with_x and maps is not None else None
        with island(x):
            for at in _pieces(x, shared.chunk):
                rows, tokens = at
                p = _piece(x, rstd, mask, slot_mask, at, q.dtype)
                a = _map(query[rows], offset[rows], p, shared) if maps is None else maps[rows, :, tokens]
                da = None if dmap is None else dmap[rows, :, tokens]
                out = None if dlogits is None else dlogits[rows, :, tokens]
                dl = _dlogits(a, pull[rows], dmass[rows], da, p, shared, out=out)
                doffset[rows].add_(dl.sum(-1))
                dq[rows].add_(p.sums(dl, spend=out is None))
        vectors = torch.cat([q, offset[..., None], dtotal, dmass[..., None]], -1) if with_x else None
        return (
            _centred(dq, rstd),
            doffset,
            None,
            None,
            vectors,
            maps if with_x else None,
            dlogits,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _batched(_Pass, info, in_dims, *args)


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        rstd: Tensor | None,
        mask: Tensor | None,
        slot_mask: Tensor | None,
        count: int,
        rows: int,
        shared: Folded,
    ) -> tuple[Tensor, ...]:
        b, n, d = x.shape
        # one number each, which nobody reads
        zero = x.new_zeros(b, 1, 1, dtype=torch.promote_types(x.dtype, torch.float32))
        widths = (2 * d + 2, n, n) if shared.keep else (2 * d + 2,)
        return tuple(zero.clone().expand(b, rows, width) for width in widths for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, rstd, mask, slot_mask, ctx.count, _, ctx.shared = inputs
        ctx.save_for_backward(x, rstd, mask, slot_mask)
        # a message that no pass has used stays None
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, rstd, mask, slot_mask = ctx.saved_tensors
        shared: Folded = ctx.shared
        vectors, maps, dlogits = (
            [grad for grad in grads[i * ctx.count : (i + 1) * ctx.count] if grad is not None] for i in range(3)
        )
        if not vectors:
            return (None,) * 7
        d, passes = x.shape[-1], len(vectors)
        q, offset, dtotal, dmass = torch.cat(vectors, 1).split([d, 1, d, 1], -1)
        offset, dmass, both = offset.squeeze(-1), dmass.squeeze(-1), torch.cat([dtotal, q], 1)
        query, pull = _centred(q, rstd), _centred(dtotal, rstd)
        dx = torch.empty_like(x)
        with island(x):
            # maps of all passes side by side, and a copy of the piece
            for at in _pieces(x, shared.chunk // 2):
                rows, tokens = at
                p = _piece(x, rstd, mask, slot_mask, at, q.dtype)
                if shared.keep:
                    stack = torch.cat([t[rows, :, tokens] for t in (*maps, *dlogits)], 1)
                else:
                    a = _map(query[rows], offset[rows], p, shared, passes)
                    stack = torch.cat([a, _dlogits(a, pull[rows], dmass[rows], None, p, shared, passes)], 1)
                _weighed(stack[:, : q.shape[1]], p, shared.eps)
                grad = stack.mT @ both[rows]  # b c d
                if rstd is not None:
                    mean = p.x.mean(-1, keepdim=True)
                    grad = torch.ops.aten.native_layer_norm_backward(
                        grad, p.x, [d], mean, rstd[at][..., None], None, None, [True, False, False]
                    )[0]
                if p.mask is not None:
                    grad = grad.masked_fill(~p.mask.mT, 0.0)
                dx[at] = grad.to(x.dtype)
        return dx, *(None,) * 6

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _batched(_Source, info, in_dims, *args)


def normalised(x: Tensor, eps: float | None, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The norm of ``x`` (..., d), by default without an affine part; x itself without an eps."""
    if eps is None:
        return x
    if gain is None or bias is None:
        gain, bias = _affine(x)
    return F.layer_norm(x, x.shape[-1:], gain, bias, eps)


def _affine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Ones and zeros (d,): without them torch's norm is nearly twice as slow."""
    return x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
