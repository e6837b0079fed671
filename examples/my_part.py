"""A token mixer of one's own: nothing of tevo is imported, nothing is registered.

tevo compare examples/my_part.py:MeanMixer softmax --task text --budget 2m --report out.html
"""

import torch
from torch import Tensor, nn


class MeanMixer(nn.Module):
    """Every token reads the running mean of a gated projection of the tokens up to itself."""

    def __init__(self, *, dim: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.value, self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        if context is not None or mask is not None:
            raise ValueError("MeanMixer mixes x over itself, without padding")
        v = self.value(x)
        if self.causal:
            count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
            mean = v.cumsum(1) / count
        else:
            mean = v.mean(1, keepdim=True)
        return self.out(mean * torch.sigmoid(self.gate(x)))
