"""Post-norm, written with norms of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, sublayers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """A norm of the sum after each sublayer."""
    for i in range(len(sublayers)):
        x = normalise(module.norms[i], x + sublayers[i](x))
    return x


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm if it has a bias, RMSNorm otherwise."""
    bias = getattr(norm, "bias", None)
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if bias is None else y + bias
