"""Exact softmax attention within a window, in blocks, with optional extra keys that every query sees.

    query i sees key j iff |i - j| <= radius, and j <= i where causal                                        (1)
    s_ij = scale q_i k_j + bias_(j-i),   s_ig = scale q_i K_g + B_ig                                         (2)
    o_i = (sum_j exp(s_ij) v_j + sum_g exp(s_ig) V_g) / (sum_j exp(s_ij) + sum_g exp(s_ig))                  (3)

Letters beyond the shared ones: r radius, N blocks, c queries of a block, w keys of its window, G global keys.
A block of c = r / 2 queries needs the w = 5 c keys around it (3 c where causal), which are an overlapping view of the
keys, so the cost is n w instead of n^2: FLOPs 2 n (w + G) (e + v) per head. Without a graph c = r / 4 and w = 9 c.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.functional.attention import scores, softmax_weights, weighted
from tevo.functional.masks import check_mask

__all__ = ["local_attention", "local_attention_reference"]

# smaller blocks would make matrix products too thin to be fast
SMALLEST_BLOCK = 32


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    radius: int,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    global_bias: Tensor | None = None,
    global_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Equations (1) to (3); one softmax over the window and the global keys. A query without any key gives zeros.

    Args:
        q: (b, h, n, e).
        k: (b, h, n, e).
        v: (b, h, n, v).
        radius: tokens on each side, >= 0.
        causal: no later keys; the global keys are seen all the same.
        mask: (b, n) bool, True = real key. What masked keys and values hold is never used.
        bias: (h, 2 radius + 1), addend of the scores by offset j - i from -radius to radius.
        global_k: (b, h, G, e), keys that every query sees; together with ``global_v``.
        global_v: (b, h, G, v).
        global_bias: addend of their scores, broadcastable to (b, h, n, G).
        global_mask: bool, broadcastable to (b, 1, n, G), True = may be seen.
        scale: default e^-1/2.

    Returns:
        (b, h, n, v).

    Raises:
        ValueError: if shapes do not fit together.
    """
    _check(q, k, v, radius, mask, bias, global_k, global_v, global_bias, global_mask)
    b, h, n, _ = q.shape
    if n == 0:
        # zeros that keep the graph: gradients are zeros too, not missing
        return v + 0 * sum(x.sum() for x in (q, k, bias, global_k, global_v, global_bias) if x is not None)
    k, v = _blank(mask, k, v)
    # a window that is wider than the sequence is the sequence
    r = min(radius, n - 1)
    # smaller blocks need fewer keys in vain (w = (2 p + 1) c for c = r / p), but each key appears in more windows, whose
    # gradients must be added up
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    c = max(SMALLEST_BLOCK, -(-r // (2 if trained else 4)))
    # up to four radii one block, which is the dense form, is as fast
    c = n if n <= max(4 * r, c) else c
    blocks = -(-n // c)
    before = 0 if blocks == 1 else -(-r // c)  # blocks of keys before and after a block of queries
    after = 0 if causal else before
    w, tail = (before + 1 + after) * c, blocks * c - n

    def windows(x: Tensor) -> Tensor:  # b h n e -> (b h) N w e
        return _Windows.apply(_pad(x, before * c, after * c + tail).flatten(0, 1), w, c)

    def in_blocks(x: Tensor) -> Tensor:  # b h n e -> (b h) N c e
        return _pad(x, 0, tail).flatten(0, 1).unflatten(1, (blocks, c))

    real = q.new_ones(1, n, dtype=torch.bool) if mask is None else mask
    exists = F.pad(real, (before * c, after * c + tail)).unfold(1, w, c)  # #b N w
    # torch's fused kernel has no gradient for a bias, and takes it in the dtype of q only
    fused = global_k is None and (bias is None or not (bias.requires_grad and torch.is_grad_enabled()))
    dtype = q.dtype if fused else torch.promote_types(q.dtype, torch.float32)
    table = q.new_zeros(1, 2 * r + 1, dtype=dtype)
    if bias is not None:
        table = bias[:, radius - r : radius + r + 1].to(dtype).repeat(b, 1)
    window = _by_offset(table[:, : r + 1] if causal else table, c, w, before * c - r)[:, None]  # 1|(b h) 1 c w
    absent = _only(exists, table.new_zeros(()))[:, :, None]  # #b N 1 w
    near = window + (absent if mask is None else absent.repeat_interleave(h, 0))  # #(b h) N c w
    qs, ks, vs = in_blocks(q), windows(k), windows(v)
    if fused:
        o = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=near, scale=scale)  # (b h) N c v
    else:
        qs, ks, vs = (x.to(dtype) for x in (qs, ks, vs))
        qs = qs * (q.shape[-1] ** -0.5 if scale is None else scale)
        s = qs @ ks.mT + near
        if global_k is None or global_v is None:
            o = s.softmax(-1) @ vs
        else:
            gk, gv = (x.to(dtype).flatten(0, 1) for x in (global_k, global_v))  # (b h) G e
            far = qs.flatten(1, 2) @ gk.mT
            addend = far.new_zeros(()) if global_bias is None else global_bias.to(dtype)
            if global_mask is not None:
                addend = _only(global_mask, addend)
            far = far.unflatten(1, (blocks, c)) + in_blocks(addend.expand(b, h, n, gk.shape[1]))
            a_near, a_far = torch.cat([s, far], -1).softmax(-1).split([w, gk.shape[1]], -1)
            o = a_near @ vs + (a_far.flatten(1, 2) @ gv).unflatten(1, (blocks, c))
        o = o.to(v.dtype)
    o = o.flatten(1, 2)[:, :n].unflatten(0, (b, h))  # b h n v
    if mask is None:
        return o  # every query sees itself
    # b 1 n 1: whether any key of the window exists
    some = (near[::h] > _lowest(dtype) / 2).any(-1).flatten(1)[:, None, :n, None]
    if global_k is not None:
        any_far = q.new_ones(()).bool() if global_mask is None else global_mask.any(-1, keepdim=True)
        some = some | (any_far if global_k.shape[2] else False)
    return o.masked_fill(~some, 0.0)


class _Windows(torch.autograd.Function):
    """Overlapping views (b, N, w, e) of x (b, m, e), c apart; the gradient is added up in w / c passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: int, c: int) -> Tensor:
        return x.unfold(1, w, c).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.c = inputs[2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        blocks, w, e = dy.shape[1:]
        parts = dy.unflatten(2, (w // ctx.c, ctx.c)).unbind(2)  # b N c e each
        dx = dy.new_zeros(dy.shape[0], blocks + len(parts) - 1, ctx.c, e)
        for i, part in enumerate(parts):
            dx[:, i : i + blocks] += part
        return dx.flatten(1, 2), None, None


def _lowest(dtype: torch.dtype) -> float:
    # in place of minus infinity, so that a row without any key has finite weights and gradients before it is set to
    # zero; a quarter of the lowest number, so that two of them and a score stay finite
    return torch.finfo(dtype).min / 4


def _only(allowed: Tensor, addend: Tensor) -> Tensor:
    return torch.where(allowed, addend, _lowest(addend.dtype))


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    """``x`` (b, h, n, e) with zero tokens around it; F.pad would write all of it twice, and copy even without any."""
    b, h, _, e = x.shape
    parts = [x.new_zeros(b, h, m, e) for m in (before, after)]
    return torch.cat([parts[0], x, parts[1]], 2) if before + after else x


def local_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    radius: int,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    global_bias: Tensor | None = None,
    global_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`local_attention` with all n x n scores and a mask."""
    _check(q, k, v, radius, mask, bias, global_k, global_v, global_bias, global_mask)
    b, _, n, _ = q.shape
    k, v = _blank(mask, k, v)
    at = torch.arange(n, device=q.device)
    offset = at - at[:, None]  # n n
    allowed = (offset.abs() <= radius) & (offset <= (0 if causal else radius))
    allowed = allowed.expand(b, 1, n, n) if mask is None else allowed & mask[:, None, None, :]
    s = scores(q, k, scale)
    if bias is not None:
        s = s + bias[:, (offset + radius).clamp(0, 2 * radius)]
    if global_k is not None and global_v is not None:
        far = scores(q, global_k, scale)
        s = torch.cat([s, far if global_bias is None else far + global_bias], -1)
        seen = q.new_ones(1, 1, 1, 1, dtype=torch.bool) if global_mask is None else global_mask
        allowed = torch.cat([allowed, seen.expand(b, 1, n, far.shape[-1])], -1)
        v = torch.cat([v, global_v], 2)
    return weighted(softmax_weights(s, allowed), v)


def _blank(mask: Tensor | None, *xs: Tensor) -> tuple[Tensor, ...]:
    # a NaN in a key of weight zero would still reach the sum
    return xs if mask is None else tuple(x.masked_fill(~mask[:, None, :, None], 0.0) for x in xs)


def _by_offset(table: Tensor, c: int, w: int, start: int) -> Tensor:
    """The table (h, t) as the addend (h, c, w) of a block's scores; elsewhere the lowest.

    Row a holds the table from column start + a on. A row of period c + w that is read on and on, c + w - 1 numbers at a
    time, moves by one each time without an index, whose gradient would be slow.
    """
    period, left = c + w, c - 1 + start
    row = F.pad(table, (left, period - left - table.shape[-1]), value=_lowest(table.dtype)).roll(1 - c, 1)
    return row.repeat(1, c)[:, : c * (period - 1)].unflatten(1, (c, period - 1))[..., :w]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    radius: int,
    mask: Tensor | None,
    bias: Tensor | None,
    global_k: Tensor | None,
    global_v: Tensor | None,
    global_bias: Tensor | None,
    global_mask: Tensor | None,
) -> None:
    name = "local_attention"
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"{name} got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected q and k (b, h, n, e), "
            "v (b, h, n, v) of one sequence"
        )
    b, h, n, e = q.shape
    if radius < 0:
        raise ValueError(f"{name} got radius={radius}, expected the number of tokens on each side, at least 0")
    check_mask(name, mask, b, n)
    if bias is not None and bias.shape != (h, 2 * radius + 1):
        raise ValueError(
            f"{name} got a bias of shape {tuple(bias.shape)}, expected (h, 2 radius + 1) = ({h}, {2 * radius + 1}), "
            "one number per head and offset"
        )
    if (global_k is None) != (global_v is None):
        raise ValueError(f"{name} got only one of global_k and global_v; pass both or neither")
    if global_k is None or global_v is None:
        if global_bias is not None or global_mask is not None:
            raise ValueError(
                f"{name} got a global_bias or global_mask without global_k; pass the global keys and values"
            )
        return
    g = global_k.shape[2] if global_k.ndim == 4 else 0
    if global_k.shape != (b, h, g, e) or global_v.shape != (b, h, g, v.shape[-1]):
        raise ValueError(
            f"{name} got global_k {tuple(global_k.shape)} and global_v {tuple(global_v.shape)}, expected "
            f"({b}, {h}, G, {e}) and ({b}, {h}, G, {v.shape[-1]})"
        )
    for what, x, full in (("global_bias", global_bias, (b, h, n, g)), ("global_mask", global_mask, (b, 1, n, g))):
        if x is not None and (x.ndim != 4 or any(s not in (1, f) for s, f in zip(x.shape, full, strict=True))):
            raise ValueError(f"{name} got a {what} of shape {tuple(x.shape)}, expected one broadcastable to {full}")
    if global_mask is not None and global_mask.dtype != torch.bool:
        raise ValueError(
            f"{name} got a global_mask of dtype {global_mask.dtype}, expected torch.bool, True = may be seen"
        )
