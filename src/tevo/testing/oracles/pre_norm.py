"""Pre-norm, written with norms of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, sublayers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The output is the input plus all branches, each of which read the normalised sum before it."""
    branches: list[Tensor] = []
    for norm, sublayer in zip(module.norms, sublayers, strict=True):
        branches.append(sublayer(normalise(norm, x + sum(branches))))
    y = x + sum(branches)
    return y if module.final is None else normalise(module.final, y)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm if it has a bias, RMSNorm otherwise."""
    bias = getattr(norm, "bias", None)
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if bias is None else y + bias
