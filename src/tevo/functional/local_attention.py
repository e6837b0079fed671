"""Exact softmax attention within a window, in blocks, with optional extra keys that every query sees.

    query i sees key j iff |i - j| <= radius, and j <= i where causal                                        (1)
    s_ij = scale q_i k_j + bias_(j-i),   s_ig = scale q_i K_g + B_ig                                         (2)
    o_i = (sum_j exp(s_ij) v_j + sum_g exp(s_ig) V_g) / (sum_j exp(s_ij) + sum_g exp(s_ig))                  (3)

Letters beyond the shared ones: r radius, N blocks, c queries of a block, w keys of its window, G global keys.
A block of c >= r + 1 queries needs the c + 2 r keys around it (c + r where causal), which are an overlapping view of the
keys, so the cost is n (c + 2 r) instead of n^2: FLOPs 2 n (c + 2 r + G) (e + v) per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.functional.attention import attention, scores, softmax_weights, weighted
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
    c = min(n, max(r + 1, SMALLEST_BLOCK))
    blocks = -(-n // c)
    before, after = (0, 0) if blocks == 1 else (r, 0 if causal else r)
    w, tail = before + c + after, blocks * c - n

    def windows(x: Tensor) -> Tensor:  # b h n e -> (b h) N w e, overlapping views of the padded x
        return F.pad(x, (0, 0, before, after + tail)).flatten(0, 1).unfold(1, w, c).mT

    def in_blocks(x: Tensor) -> Tensor:  # b h n e -> (b h) N c e
        return F.pad(x, (0, 0, 0, tail)).flatten(0, 1).unflatten(1, (blocks, c))

    def per_head(x: Tensor) -> Tensor:  # #b N c w -> #(b h) N c w
        return x if x.shape[0] == 1 else x.repeat_interleave(h, 0)

    real = q.new_ones(1, n, dtype=torch.bool) if mask is None else mask
    exists = F.pad(real, (before, after + tail)).unfold(1, w, c)  # #b N w
    offset = torch.arange(w, device=q.device) - before - torch.arange(c, device=q.device)[:, None]  # c w
    allowed = per_head((offset.abs() <= r) & (offset <= (0 if causal else r)) & exists[:, :, None])
    addend = None if bias is None else _by_offset(bias[:, radius - r : radius + r + 1], c, w, before).repeat(b, 1, 1)
    if addend is not None:
        addend = addend[:, None]  # (b h) 1 c w
    keys, values = windows(k), windows(v)
    if global_k is not None and global_v is not None:
        g = global_k.shape[2]
        keys, values = (
            torch.cat([x, y.flatten(0, 1)[:, None].expand(-1, blocks, -1, -1)], 2)
            for x, y in ((keys, global_k), (values, global_v))
        )
        seen = q.new_ones(1, 1, 1, g, dtype=torch.bool) if global_mask is None else global_mask
        allowed, seen = (x.expand(b * h, blocks, c, -1) for x in (allowed, in_blocks(seen.expand(b, h, n, g))))
        allowed = torch.cat([allowed, seen], -1)
        if bias is not None or global_bias is not None:
            near = q.new_zeros(1, 1, 1, w) if addend is None else addend
            far = q.new_zeros(1, 1, 1, g) if global_bias is None else global_bias
            far = in_blocks(far.expand(b, h, n, g))
            addend = torch.cat([near.expand(b * h, blocks, c, w), far], -1)
    o = attention(in_blocks(q), keys, values, allowed=allowed, bias=addend, scale=scale)  # (b h) N c v
    return o.flatten(1, 2)[:, :n].unflatten(0, (b, h))


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


def _by_offset(table: Tensor, c: int, w: int, before: int) -> Tensor:
    """The table (h, 2 r + 1) as the addend (h, c, w) of a block's scores; zeros outside the window.

    Row a holds the table moved by a: the rows are overlapping views of one padded row, from the last one upwards.
    """
    r = table.shape[-1] // 2
    left = c - 1 + before - r
    row = F.pad(table, (left, c + w - 1 - left - table.shape[-1]))
    return row.unfold(1, w, 1).flip(1)


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
