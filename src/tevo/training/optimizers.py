"""Optimisers and learning rates that recipes name.

    cosine         lr (s + 1) / w, w the warm-up's steps; then a cosine from lr down to final_lr lr at the last step     (1)
    inverse_sqrt   lr sqrt(w / max(s + 1, w)): T5's, which is 1 / sqrt(s + 1) for lr = 0.01 and w = 10^4                  (2)
    constant       lr (s + 1) / w in the warm-up, then lr                                                                (3)

for step s from 0. Adafactor is torch's, whose step is (with G the gradient, X a matrix, t = s + 1)

    R <- b R + (1 - b) mean_cols G^2,   C <- b C + (1 - b) mean_rows G^2,   b = 1 - t^-0.8
    U = G / sqrt(R C / mean R),   X <- X - min(lr, 1 / sqrt(t)) max(10^-3, rms X) U / max(1, rms U)                       (4)

as in the paper's algorithms 4 and 5; vectors keep G^2 whole. Departures: the rate is never above 1 / sqrt(t), which recipes
refuse to ask for; the 10^-30 that the paper adds to G^2 is a floor of the estimate, which differs where all of a row or column
of G is below 10^-14; rows and columns are those of the last two dimensions. torch's own floor, the type's precision, would
replace mean R wherever the gradients of a matrix are below 3 10^-4.

Sources: Adafactor (1804.04235); T5 (1910.10683), section 3.1.2; AdamW (1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tevo.training.base import Recipe

__all__ = ["ADAMW", "OPTIMIZERS", "SCHEDULES", "Kind", "Rate", "learning_rate"]

Rate = Callable[[Recipe, int], float]

# torch squares it to make the floor: the paper's 10^-30
_FLOOR = 1e-15


class Kind(NamedTuple):
    """An optimiser.

    Args:
        make: from groups of parameters and a recipe.
        state: what it keeps of a parameter once it has taken a step; names, and tensors of the shapes, types and devices.
    """

    make: Callable[[Iterable[dict[str, Any]], Recipe], torch.optim.Optimizer]
    state: Callable[[Tensor], dict[str, Tensor]]


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step ``step`` (from 0): linear warm-up that never starts at 0, then cosine (eq. 1)."""
    warm = round(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(recipe.steps - 1 - warm, 1)
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def _inverse_sqrt(recipe: Recipe, step: int) -> float:
    warm = max(round(recipe.warmup * recipe.steps), 1)
    return recipe.lr * math.sqrt(warm / max(step + 1, warm))


def _constant(recipe: Recipe, step: int) -> float:
    return recipe.lr * min(1.0, (step + 1) / max(round(recipe.warmup * recipe.steps), 1))


def _adamw(groups: Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _adamw_state(p: Tensor) -> dict[str, Tensor]:
    return {"step": p.new_zeros((), dtype=torch.float32), "exp_avg": p, "exp_avg_sq": p}


def _adafactor(groups: Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=recipe.lr, eps=(_FLOOR, 1e-3))


def _adafactor_state(p: Tensor) -> dict[str, Tensor]:
    step = torch.zeros(())
    if p.ndim < 2:
        return {"step": step, "variance": p}
    return {"step": step, "row_var": p[..., :1], "col_var": p[..., :1, :]}


ADAMW = Kind(_adamw, _adamw_state)
OPTIMIZERS: dict[str, Kind] = {"adamw": ADAMW, "adafactor": Kind(_adafactor, _adafactor_state)}
SCHEDULES: dict[str, Rate] = {"cosine": learning_rate, "inverse_sqrt": _inverse_sqrt, "constant": _constant}
