"""Sinusoidal positions, one feature at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """Scores are left as they are."""
    return torch.einsum("bhne,bhme->bhnm", q, k) / q.shape[-1] ** 0.5


def embed(module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """Even features get the sine, the odd one after each gets the cosine of the same angle; x is scaled by sqrt(d)."""
    d = x.shape[-1]
    features = []
    for i in range(d):
        angle = at.to(x.dtype) / module.base ** (2 * (i // 2) / d)
        features.append(math.sqrt(d) * x[..., i] + (angle.sin() if i % 2 == 0 else angle.cos()))
    return torch.stack(features, -1)
