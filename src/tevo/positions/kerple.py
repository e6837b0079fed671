"""KERPLE: a learned penalty per head that grows with distance as a conditionally positive definite kernel.

    s_ij <- s_ij - p log(1 + a |i - j|),   p, a > 0                    logarithmic                        (1)
    s_ij <- s_ij - a |i - j|^p,            a > 0,  0 < p <= 2          power                              (2)

One p and one a per head, shared by all layers. Nothing else tells order. ALiBi is the power form with p = 1 and fixed
slopes a. Cost O(h n m), no state.

Source: 2205.09921, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="kerple",
    role="position",
    summary="Subtracts from each score a learned logarithm, or power, of the distance.",
    equations=(
        r"s_{ij} \leftarrow s_{ij} - p \log(1 + a\,|i - j|),\quad p, a > 0",
        r"s_{ij} \leftarrow s_{ij} - a\,|i - j|^p,\quad a > 0,\ 0 < p \le 2",
    ),
    exports={"kerple": "KerpleLog", "kerple_log": "KerpleLog", "kerple_power": "KerplePower"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="2 * h",
    memory="n^2",
    claims=(
        "bidirectional",
        "causal",
        "cross",
        "padding",
        "exact_state",
        "shift_invariant",
        "shared_across_layers",
    ),
    examples=({"heads": 3}, {"part": "kerple_power", "heads": 3}, {"heads": 5}, {"part": "kerple_power", "heads": 1}),
    reduces_to=("alibi: kerple_power at p = 1 and a the fixed slopes, as far as those are at least 0.01",),
    equals=(
        "chijames/KERPLE ParallelKerpleLog and ParallelKerplePower (additive forms); values in tests/golden/kerple_a.npz",
    ),
    departures=(
        "The paper is causal; with later keys visible the penalty is symmetric in the distance.",
        "Parameters outside their bounds count as the bound, and after_step moves them there: the released code moves "
        "them before each forward pass. Training is the same, and evaluation changes no parameter.",
        "The forms that multiply scores by a kernel of the distance are left out: they are no addend of the scores.",
    ),
)

LEAST = 0.01  # the released code's lower bound of every parameter
LARGEST_POWER = 2.0  # beyond it the kernel is not conditionally positive definite


def log_penalty(distance: Tensor, p: Tensor, a: Tensor) -> Tensor:
    """Equation (1): ``distance`` >= 0 (..., n, m), p and a (h, 1, 1)."""
    return p * torch.log1p(a * distance)


def power_penalty(distance: Tensor, p: Tensor, a: Tensor) -> Tensor:
    """Equation (2), same shapes."""
    return a * distance**p


def hold(value: Tensor, high: float | None = None) -> Tensor:
    """``value`` moved into its bounds; the gradient is that of the moved value, so that it can come back."""
    return value + (value.clamp(LEAST, high) - value).detach()


def gap(q_at: Tensor, k_at: Tensor, like: Tensor) -> Tensor:
    """|i - j| (#b, 1, n, m), in at least float32: half precision cannot tell neighbouring distances apart."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return (q_at[:, :, None] - k_at[:, None, :]).abs()[:, None].to(wide)


class KerpleLog(Position):
    """The logarithmic form, the paper's best."""

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(heads))
        self.a = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P uniform in (0, 2), a uniform in (0, 1), as in the released code."""
        nn.init.uniform_(self.p, 0, 2)
        nn.init.uniform_(self.a, 0, 1)
        self.after_step()

    def after_step(self) -> None:
        """Move parameters into their bounds."""
        with torch.no_grad():
            self.p.clamp_(min=LEAST)
            self.a.clamp_(min=LEAST)

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(#b, h, n, m)."""
        p, a = hold(self.p)[:, None, None], hold(self.a)[:, None, None]
        return -log_penalty(gap(q_at, k_at, q), p, a).to(q.dtype)


class KerplePower(Position):
    """The power form."""

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(heads))
        self.a = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """P uniform in (0, 2), a uniform in (0, 1), as in the released code."""
        nn.init.uniform_(self.p, 0, 2)
        nn.init.uniform_(self.a, 0, 1)
        self.after_step()

    def after_step(self) -> None:
        """Move parameters into their bounds."""
        with torch.no_grad():
            self.p.clamp_(LEAST, LARGEST_POWER)
            self.a.clamp_(min=LEAST)

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(#b, h, n, m)."""
        p, a = hold(self.p, LARGEST_POWER)[:, None, None], hold(self.a)[:, None, None]
        return -power_penalty(gap(q_at, k_at, q), p, a).to(q.dtype)
