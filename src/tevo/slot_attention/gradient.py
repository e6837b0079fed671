"""Through which iterations the gradient of Slot Attention flows. f is one iteration, s0 the initial slots, sg stops gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Unrolled:
    """s = f(f(...f(s0))): through all iterations. The paper's."""

    def tracked(self, iterations: int) -> int:
        """How many of the iterations have a graph, at most."""
        return iterations

    def __call__(self, step: Step, slots: Tensor, iterations: int) -> Tensor:
        """Slots (b, k, d) after ``iterations``."""
        for _ in range(iterations):
            slots = step(slots)
        return slots


@dataclass(frozen=True)
class Implicit:
    """s* = f^T(s0) without a graph, then s = f^m(sg(s*)): at a fixed point, its implicit gradient cut after m terms.

    m = 1 is the one-step gradient; the error of the Neumann series falls as the m-th power of the Jacobian at s*. Memory
    grows with m, not with T.

    Args:
        steps: m, >= 1.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse a gradient through nothing."""
        _positive("Implicit", "steps", self.steps)

    def tracked(self, iterations: int) -> int:
        """The last m."""
        return self.steps

    def __call__(self, step: Step, slots: Tensor, iterations: int) -> Tensor:
        """Slots (b, k, d) after ``iterations`` + m."""
        return Unrolled()(step, _ungraphed(step, slots, iterations), self.steps)


@dataclass(frozen=True)
class Truncated:
    """s = f^m(sg(f^(T-m)(s0))): through the last m of the T iterations.

    Args:
        last: m, >= 1.
    """

    last: int

    def __post_init__(self) -> None:
        """Refuse a gradient through nothing."""
        _positive("Truncated", "last", self.last)

    def tracked(self, iterations: int) -> int:
        """The last m."""
        return min(self.last, iterations)

    def __call__(self, step: Step, slots: Tensor, iterations: int) -> Tensor:
        """Slots (b, k, d) after ``iterations``."""
        free = iterations - self.last
        return Unrolled()(step, _ungraphed(step, slots, free) if free > 0 else slots, self.tracked(iterations))


@dataclass(frozen=True)
class BiLevel:
    """s = f(sg(f^(T-1)(s0)) + s0 - sg(s0)): through the last iteration, and straight through the others to s0.

    As in BO-QSA, where s0 are learned queries.
    """

    def tracked(self, iterations: int) -> int:
        """The last."""
        return min(1, iterations)

    def __call__(self, step: Step, slots: Tensor, iterations: int) -> Tensor:
        """Slots (b, k, d) after ``iterations``."""
        if iterations < 1:
            return slots
        return step(_ungraphed(step, slots, iterations - 1) + slots - slots.detach())


Gradient = Unrolled | Implicit | Truncated | BiLevel


def _ungraphed(step: Step, slots: Tensor, iterations: int) -> Tensor:
    with torch.no_grad():
        return Unrolled()(step, slots, iterations).detach()


def _positive(owner: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{owner} got {name}={value}, expected at least 1 iteration with a gradient")
