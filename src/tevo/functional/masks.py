"""Masks: True = may be seen."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """(n, m) bool: the last query sees all m keys, the one before it m - 1 (aligned bottom-right)."""
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)


def blank(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (b, n, d) with the tokens that ``mask`` (b, n) excludes set to zero, so that their content (NaN too) is gone."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def check_mask(owner: str, mask: Tensor | None, batch: int, length: int) -> None:
    """Refuse a mask of another type or shape than bool (batch, length)."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (batch, length):
        raise ValueError(
            f"{owner} got a mask of dtype {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool of shape "
            f"({batch}, {length}) with True for real tokens"
        )


def refuse_mask(owner: str, mask: Tensor | None) -> None:
    """For mixers without the padding claim."""
    if mask is not None:
        raise ValueError(
            f"{owner} cannot honour a padding mask, got one of shape {tuple(mask.shape)}; pass sequences of equal length "
            "without a mask (see `tevo list --where padding`)"
        )


def refuse_context(owner: str, context: Tensor | None) -> None:
    """For mixers without the cross claim."""
    if context is not None:
        raise ValueError(
            f"{owner} mixes a sequence with itself only, got a context of shape {tuple(context.shape)}; choose a mixer with "
            "the cross claim (see `tevo list --where cross`)"
        )


def positions_of(mask: Tensor | None, n: int, start: Tensor | int = 0, device: torch.device | None = None) -> Tensor:
    """Logical positions (#b, n): real tokens are counted from ``start``, padding repeats a neighbour's position."""
    if mask is None:
        steps = torch.arange(n, device=device)[None]
    else:
        steps = (mask.long().cumsum(1) - 1).clamp(min=0)
    return steps + (start[:, None] if isinstance(start, Tensor) else start)


def to_front(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real tokens of ``x`` (b, n, d) first, in their order, then zeros.

    Returns:
        (b, n, d), how many are real (b,), and the index (b, n, 1) that undoes the order.
    """
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    return blank(x, mask).take_along_dim(order[..., None], 1), mask.sum(1), order.argsort(dim=1)[..., None]
