"""Next-token prediction: the mean negative log-likelihood of the scored targets.

L = -(1/|S|) sum_{(b,n) in S} log softmax(model(x))[b, n, y_bn],     S = {(b, n): y_bn != -100}     (1)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.contracts import Loss, Objective

__all__ = ["IGNORED", "NextToken", "next_token_loss"]

IGNORED = -100


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (b, n, V) and targets (b, n), -100 where nothing is scored, give nats per scored token; 0 if none is."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)  # (eq. 1)


class NextToken(Objective):
    """Next-token prediction for models that give logits (b, n, V) for tokens (b, n)."""

    def corrupt(self, tokens: Tensor, *, mask: Tensor | None = None, generator: torch.Generator) -> dict[str, Tensor]:
        """``inputs`` and ``targets`` (b, n - 1): each token's target is the next one, if it is real. Nothing is drawn."""
        targets = tokens[:, 1:]
        return {"inputs": tokens[:, :-1], "targets": targets if mask is None else targets.where(mask[:, 1:], IGNORED)}

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` holds ``inputs`` and ``targets`` (b, n); a target of -100 is not scored."""
        return Loss(next_token_loss(model(batch["inputs"]), batch["targets"]), {})

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets of the batch are scored: the weight of this batch among the parts of a larger one."""
        return (batch["targets"] != IGNORED).sum()
