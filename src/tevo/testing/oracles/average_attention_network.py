"""The average attention network, one token and one average at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """For every token the mean of the real tokens up to it, a feed-forward on that, and two gates of the token and it."""
    b, n, d = x.shape
    rows = []
    for row in range(b):
        outputs = []
        for t in range(n):
            past = [x[row, s] for s in range(t + 1) if mask is None or bool(mask[row, s])]
            if not past or (mask is not None and not bool(mask[row, t])):
                outputs.append(torch.zeros(d, dtype=x.dtype))
                continue
            mean = sum(past) / len(past)
            hidden = (module.into.weight @ mean + module.into.bias).clamp(min=0)
            g = module.out.weight @ hidden + module.out.bias
            scores = module.gates.weight @ torch.cat([x[row, t], g]) + module.gates.bias
            gates = 1 / (1 + (-scores).exp())
            outputs.append(gates[:d] * x[row, t] + gates[d:] * g)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)
