"""Linear attention: every pair's weight phi(q_i) . phi(k_j) written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1."""
    return torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    source = x if context is None else context
    b, n, d = x.shape
    m, h = source.shape[1], module.heads.heads
    e = d // h
    key_weight, value_weight = module.heads.kv.weight[:d], module.heads.kv.weight[d:]
    rows = []
    for i in range(b):
        for t in range(n):
            last = t + m - n if module.causal else m - 1
            seen = [s for s in range(last + 1) if mask is None or bool(mask[i, s])]
            joined = []
            for head in range(h):
                part = slice(head * e, (head + 1) * e)
                q = phi(module.heads.q.weight[part] @ x[i, t])
                total, weights = 0 * q, torch.zeros((), dtype=x.dtype)
                for s in seen:
                    weight = (q * phi(key_weight[part] @ source[i, s])).sum()
                    total = total + weight * (value_weight[part] @ source[i, s])
                    weights = weights + weight
                joined.append(total / (weights + module.eps))
            rows.append(module.heads.out.weight @ torch.cat(joined))
    return torch.stack(rows).reshape(b, n, d)
