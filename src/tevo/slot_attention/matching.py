"""One-to-one matching of targets and predictions, and the set loss on top of it.

C_ij = (1/c) sum_c huber(y_ic - p_jc),   huber(z) = z^2/2 where |z| <= 1, |z| - 1/2 beyond             (1)
L = (1/b) sum_b min over matchings s of sum_i C_i,s(i)                                               (2)

Source: the set-prediction loss of google-research ``slot_attention``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hungarian_huber", "match", "pairwise_huber"]


def match(cost: Tensor) -> Tensor:
    """The cheapest one-to-one matching of each cost matrix (b, r, c).

    Returns:
        indices (b, 2, min(r, c)): matched rows, ascending, and their columns.

    Raises:
        ValueError: costs that are not finite, or scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError("matching needs the package scipy; pip install 'tevo[tasks]'") from error
    if cost.ndim != 3:
        raise ValueError(f"match got costs of shape {tuple(cost.shape)}, expected (batch, rows, columns)")
    matrices = cost.detach().to("cpu", torch.promote_types(cost.dtype, torch.float32)).numpy()
    if not np.isfinite(matrices).all():
        raise ValueError("match got costs that are NaN or infinite; look for a diverged model or a corrupt target")
    pairs = [np.stack(linear_sum_assignment(matrix)) for matrix in matrices]
    size = min(cost.shape[1:])
    found = np.stack(pairs) if pairs else np.zeros((0, 2, size), dtype=np.int64)
    return torch.from_numpy(found).to(cost.device, torch.int64)


def pairwise_huber(targets: Tensor, predictions: Tensor) -> Tensor:
    """Targets (b, r, c) and predictions (b, k, c) give the mean Huber distance (b, r, k) of every pair (eq. 1)."""
    p, y = torch.broadcast_tensors(predictions[:, None], targets[:, :, None])
    terms = F.huber_loss(p, y, reduction="none")  # b r k c
    # summed in order of the features, as in the reference: padding rows tie, and the last bit decides between them
    return terms.cumsum(-1)[..., -1] / terms.shape[-1]


def hungarian_huber(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Set loss (eq. 2) of predictions (b, k, c) against targets (b, r, c), padding rows included.

    Returns:
        the loss, and the matching (b, 2, min(r, k)): rows are targets, columns predictions.

    Raises:
        ValueError: batch sizes or widths differ, values that are not finite, or scipy is missing.
    """
    if predictions.ndim != 3 or targets.ndim != 3 or predictions.shape[::2] != targets.shape[::2]:
        raise ValueError(
            f"hungarian_huber got predictions of shape {tuple(predictions.shape)} and targets of shape "
            f"{tuple(targets.shape)}, expected (batch, slots, width) and (batch, objects, width)"
        )
    cost = pairwise_huber(targets, predictions)
    pairs = match(cost)
    batch = torch.arange(cost.shape[0], device=cost.device)[:, None]
    return cost[batch, pairs[:, 0], pairs[:, 1]].sum(1).mean(), pairs
