"""PaFi and HiWi: the parameters written out entry by entry, in an encoder written out layer by layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def reference(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The adapted encoder: (b, n, d), mask (b, n), gives (b, n, d)."""
    return torch.stack([_encode(model, x[b], None if mask is None else mask[b]) for b in range(len(x))])


def parameter(module: nn.Module, name: str) -> Tensor:
    """What the adaptation makes of a parameter."""
    under = getattr(module, "parametrizations", {})
    if name not in under:
        return getattr(module, name)
    own, (step,) = under[name].original, list(under[name])
    if hasattr(step, "values"):
        places = torch.arange(own.numel())[:, None] == step.index  # entries k
        kept = own.flatten() * ~places.any(1)
        return (kept + places.to(own.dtype) @ step.values).reshape(own.shape)
    rows = []
    for row in own.reshape(-1, own.shape[-1]):
        hidden = [(row * step.down[:, r]).sum() for r in range(step.down.shape[1])]
        hidden = [h * (1 + torch.erf(h / math.sqrt(2))) / 2 for h in hidden]
        rows.append(row + sum(h * step.up[r] for r, h in enumerate(hidden)))
    return torch.stack(rows).reshape(own.shape)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    y = x @ parameter(layer, "weight").T
    return y if layer.bias is None else y + parameter(layer, "bias")


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean(-1, keepdim=True)
    z = z / (z.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return z * parameter(layer, "weight") + parameter(layer, "bias")


def _encode(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """One sequence (n, d) through pre-norm blocks."""
    real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    for block in model.blocks:
        heads, norms = block.mixer.heads, block.residual.norms
        y = _norm(norms[0], x).where(real[:, None], torch.zeros_like(x))
        q, (k, v) = _linear(heads.q, y), _linear(heads.kv, y).chunk(2, -1)
        e, parts = q.shape[-1] // heads.heads, []
        for h in range(heads.heads):
            part = slice(h * e, (h + 1) * e)
            power = (q[:, part] @ k[:, part].T / math.sqrt(e)).exp() * real
            parts.append(power @ v[:, part] / power.sum(-1, keepdim=True))
        x = x + _linear(heads.out, torch.cat(parts, -1))
        hidden = _linear(block.channel.into, _norm(norms[1], x))
        x = x + _linear(block.channel.out, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
        if block.residual.final is not None:
            x = _norm(block.residual.final, x)
    return x
