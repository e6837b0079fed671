"""Softmax attention with masks, bias, and grouped keys: the core that the softmax family shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` by torch's fused kernel where it has one.

    Args:
        q: (b, h, n, e).
        k: (b, g, m, e), g divides h.
        v: (b, g, m, v).
        allowed: bool, broadcastable to (b, h, n, m); rows without an allowed key give zeros.
        bias: addend of the scores, broadcastable to (b, h, n, m).
        causal: query i of n sees the first m - n + i + 1 keys (bottom-right). Combines with ``allowed``.
        scale: default e^-1/2.

    Returns:
        (b, h, n, v).
    """
    h, n, m = q.shape[1], q.shape[2], k.shape[2]
    if n == 0 or m == 0:
        # keeps the graph, so that gradients are zeros rather than missing
        return q.new_zeros(q.shape[0], h, n, v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    fused_causal = causal and n == m and allowed is None and bias is None
    if causal and not fused_causal and n > 1:
        triangle = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        allowed = triangle if allowed is None else allowed & triangle
    if bias is not None and bias.requires_grad:
        # the fused CPU kernel has no gradient for a bias, and the fallback of torch is this form with more copies
        return weighted(softmax_weights(scores(q, k, scale) + bias, allowed), v)
    mask = allowed
    if bias is not None:
        mask = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
        # the fused kernel wants one dtype; a bias is made in the wider one
        mask = mask.to(q.dtype)
    if mask is not None and mask.ndim == 4 and mask.shape[1] not in (1, h):
        mask = mask.expand(-1, h, -1, -1)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=fused_causal, scale=scale, enable_gqa=k.shape[1] != h
    )
    if bias is not None and allowed is not None:
        # with an additive mask a row of minus infinities is torch's to define: make it zero, as with a bool mask
        o = o.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return o


def spread(k: Tensor, h: int) -> Tensor:
    """Key or value heads (b, g, m, e) repeated to (b, h, m, e): query head i uses group floor(i g / h)."""
    g = k.shape[1]
    return k if g == h else k.repeat_interleave(h // g, dim=1)


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot products (b, h, n, m) of q (b, h, n, e) and k (b, g, m, e)."""
    return (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ spread(k, q.shape[1]).mT


def softmax_weights(s: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Softmax over keys; a row without an allowed key gives zeros, with finite gradients."""
    if allowed is None:
        return s.softmax(-1)
    # a finite fill keeps the softmax of an empty row, and so its gradient, free of NaN
    weights = s.masked_fill(~allowed, torch.finfo(s.dtype).min).softmax(-1)
    return weights.masked_fill(~allowed, 0.0)


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """``weights`` (b, h, n, m) times ``v`` (b, g, m, v) gives (b, h, n, v)."""
    return weights.to(v.dtype) @ spread(v, weights.shape[1])
