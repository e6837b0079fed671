"""Which tokens take the heavy branch, and with what weight.

    s_i = x_i . u,    the m tokens of highest s are routed,    X_i += light(X_i) + w_i heavy(X_i)

with w = 0 elsewhere. A *routing* says how w comes from s: CoLT5's is the soft top-k of the scores, which sums to m. In
training the 9/8 m best tokens are routed, in evaluation m; the weights sum to m in either case. Tokens are always chosen by
score, since weights have ties at 1; of equal scores the earlier token is chosen, so that padding decides nothing.
Cost: O(n d) for the scores, O(n + m log m) for the choice. Source: CoLT5 (arXiv 2303.09752), section 3.1 and appendix C,
which leave open what the defaults of ``Router`` and ``Budget`` settle.

Letters: b batch, n tokens, d width, m tokens to be routed, c slots for routed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tevo.functional.masks import check_mask
from tevo.functional.precision import island
from tevo.functional.soft_topk import Solver, readable, soft_topk
from tevo.taps import tap

__all__ = [
    "ROUTINGS",
    "Budget",
    "Candidates",
    "RandomTokens",
    "Routed",
    "Router",
    "Routing",
    "Sigmoid",
    "SoftTopK",
    "SoftmaxTopK",
    "StaticBlocks",
    "StraightThrough",
]

# one number of tokens for all rows, or (b,)
Count = TypeVar("Count", int, Tensor)


class Routed(NamedTuple):
    """The routed tokens of each row.

    Args:
        indices: (b, c), ascending; slots without a token, at the end, repeat the last one (0 if there is none).
        weights: (b, c), zero in slots without a token.
        mask: (b, c) bool, True = the slot has a token.
    """

    indices: Tensor
    weights: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Budget:
    """How many tokens are routed: m = min(ceil(fraction * length), at_most), at least 1 of a row that has any.

    The length is that of the row without its padding. A fixed m is ``Budget(1.0, at_most=m)``; m that stops growing at
    some length is both.

    Args:
        fraction: 1e-6 to 1; read as p / q with q <= 10^6.
        at_most: m at most, >= 1.
    """

    fraction: float = 1 / 16
    at_most: int | None = None

    def __post_init__(self) -> None:
        """Refuse what routes nothing."""
        if not 1e-6 <= self.fraction <= 1:
            raise ValueError(f"Budget got fraction={self.fraction}, expected a number from 1e-6 to 1")
        if self.at_most is not None and self.at_most < 1:
            raise ValueError(f"Budget got at_most={self.at_most}, expected at least 1 token")

    def tokens(self, length: Count) -> Count:
        """The m of rows of that length."""
        m = _share(self.fraction, length)
        if self.at_most is None:
            return m
        return m.clamp(max=self.at_most) if isinstance(m, Tensor) else min(m, self.at_most)


def _share(factor: float, count: Count) -> Count:
    """Factor times count, rounded up; in integers, so that a product that is whole but for rounding stays."""
    ratio = Fraction(factor).limit_denominator(10**6)
    return -(-ratio.numerator * count // ratio.denominator)


class Candidates(NamedTuple):
    """What a routing chooses from. Numbers are one for all rows or (b,).

    Args:
        scores: (b, n), at least float32; zeros where the routing learns none.
        valid: (b, n) bool, True = may be routed; None: all.
        forced: (b, n) bool, True = must be routed; None: none. All are valid.
        total: what the weights sum to.
        most: a whole number that is at least as great as every total.
        quota: how many tokens are routed.
        slots: the greatest quota.
    """

    scores: Tensor
    valid: Tensor | None
    forced: Tensor | None
    total: float | Tensor
    most: int
    quota: int | Tensor
    slots: int

    def free(self) -> Tensor | None:
        """(b, n) bool: valid and not forced."""
        if self.forced is None:
            return self.valid
        return ~self.forced if self.valid is None else self.valid & ~self.forced


class Routing(nn.Module):
    """A rule by which scores choose tokens and become weights. ``learned`` rules need scores."""

    learned = True

    def rank(self, tokens: Candidates) -> Tensor:
        """(b, n): tokens with the highest numbers are routed."""
        return tokens.scores

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """(b, n): the weight of each token, of which only those of ``chosen`` (b, n) count."""
        raise NotImplementedError


class SoftTopK(Routing):
    """w = soft top-k of the scores with sum m: the paper's. A forced token has weight 1 and takes 1 of the sum.

    Args:
        eps: > 0; weights are flatter the greater it is, 0 and 1 towards 0. A buffer, for a schedule to write to.
        solver: as in :func:`tevo.soft_topk`; the paper's 50 iterations agree with ``exact`` where they converge.
    """

    eps: Tensor

    def __init__(self, *, eps: float = 1.0, solver: Solver = "exact") -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"SoftTopK got eps={eps}, expected a number above 0")
        self.solver = solver
        self.register_buffer("eps", torch.tensor(float(eps)))

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """The soft top-k of all valid tokens."""
        total = tokens.total
        if tokens.forced is not None:
            total = (total - tokens.forced.sum(-1)).clamp(min=0)
        w = soft_topk(tokens.scores, total, eps=self.eps, mask=tokens.free(), solver=self.solver, at_most=tokens.most)
        return w if tokens.forced is None else w.masked_fill(tokens.forced, 1.0)


class SoftmaxTopK(Routing):
    """w = softmax over the routed tokens' scores, s_u(X) = Softmax(TopK(X u^T)), with sum 1."""

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """The softmax; zeros in a row without a routed token."""
        # a finite fill keeps the gradient of a row without a routed token free of NaN
        kept = tokens.scores.masked_fill(~chosen, torch.finfo(tokens.scores.dtype).min)
        return kept.softmax(-1).masked_fill(~chosen, 0.0)


class Sigmoid(Routing):
    """w = sigmoid(s), each token by itself; 1 for a forced one."""

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """The sigmoid."""
        w = tokens.scores.sigmoid()
        return w if tokens.forced is None else w.masked_fill(tokens.forced, 1.0)


class StraightThrough(Routing):
    """w = 1 for every routed token, with the gradient that another routing's weights would have.

    Args:
        of: the other routing; by default the soft top-k.
    """

    def __init__(self, *, of: Routing | None = None) -> None:
        super().__init__()
        self.of = SoftTopK() if of is None else of

    def rank(self, tokens: Candidates) -> Tensor:
        """As the other routing."""
        return self.of.rank(tokens)

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """Ones."""
        w = self.of.weigh(tokens, chosen)
        return w - w.detach() + 1.0


class StaticBlocks(Routing):
    """The first token of each of m blocks of equal length, w = 1: the paper's ablation. Nothing is learned."""

    learned = False

    def rank(self, tokens: Candidates) -> Tensor:
        """Ones for first tokens of blocks, zeros for others."""
        free, quota = tokens.free(), tokens.quota
        if free is None:
            free = torch.ones_like(tokens.scores, dtype=torch.bool)
        if isinstance(quota, Tensor):
            quota = quota[:, None]
        if tokens.forced is not None:
            quota = (quota - tokens.forced.sum(-1, keepdim=True)).clamp(min=0)
        place = free.long().cumsum(-1) - 1
        length = free.sum(-1, keepdim=True).clamp(min=1)
        # token i is the first of a block where floor(i m / n) grows
        block, before = ((p * quota).div(length, rounding_mode="floor") for p in (place, place - 1))
        return ((block > before) & free).to(tokens.scores.dtype)

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(tokens.scores)


class RandomTokens(Routing):
    """M tokens drawn anew at each call, w = 1. Nothing is learned."""

    learned = False

    def rank(self, tokens: Candidates) -> Tensor:
        """Random numbers."""
        return torch.rand_like(tokens.scores)

    def weigh(self, tokens: Candidates, chosen: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(tokens.scores)


ROUTINGS: dict[str, Callable[[], Routing]] = {
    "soft_topk": SoftTopK,
    "soft_topk_iterations": partial(SoftTopK, solver="iterations"),
    "softmax_topk": SoftmaxTopK,
    "sigmoid": Sigmoid,
    "straight_through": StraightThrough,
    "static": StaticBlocks,
    "random": RandomTokens,
}


class Router(nn.Module):
    """Scores tokens and chooses those that are routed.

    Args:
        dim: width d.
        budget: how many tokens are routed; may be set anew after training.
        routing: a name of ``ROUTINGS``, or a routing.
        slack: factor of the number of routed tokens while training, >= 1; the sum of the weights stays.
        total: factor of the sum of the weights, > 0; public code routes m tokens with a sum of 9/8 m.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        dim: int,
        budget: Budget,
        routing: str | Routing = "soft_topk",
        slack: float = 9 / 8,
        total: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(routing, str) and routing not in ROUTINGS:
            raise ValueError(
                f"Router got routing={routing!r}, expected one of {', '.join(ROUTINGS)}, or a Routing of your own"
            )
        if slack < 1:
            raise ValueError(f"Router got slack={slack}, expected at least 1")
        if total <= 0:
            raise ValueError(f"Router got total={total}, expected a number above 0")
        self.dim, self.budget, self.slack, self.total = dim, budget, slack, total
        self.routing = ROUTINGS[routing]() if isinstance(routing, str) else routing
        self.register_parameter("weight", nn.Parameter(torch.empty(dim)) if self.routing.learned else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U normal with standard deviation d^-1/2, so that normalised tokens have scores of unit variance."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.dim**-0.5)

    def score(self, x: Tensor) -> Tensor:
        """X (b, n, d) gives s (b, n), in float32 at least; zeros if nothing is learned."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None:
            return x.new_zeros(x.shape[:-1], dtype=dtype)
        with island(x):
            return x.to(dtype) @ self.weight.to(dtype)

    def forward(
        self,
        x: Tensor,
        *,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
    ) -> Routed:
        """Choose among the tokens of ``x`` (b, n, d).

        Padding and forbidden tokens are never routed. Where more tokens are forced than routed, the first of them are.

        Args:
            x: the sublayer's normalised input.
            scores: (b, n), if they are known already; as of :meth:`score`.
            mask: (b, n) bool, True = real token.
            forced: (b, n) bool, True = route this token (questions, headings).
            forbidden: (b, n) bool, True = never route this token (boilerplate).

        Raises:
            ValueError: if a shape does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"Router got x of shape {tuple(x.shape)}, expected (b, n, {self.dim}) with n at least 1")
        b, n, _ = x.shape
        for name, tokens in (("Router", mask), ("Router (forced)", forced), ("Router (forbidden)", forbidden)):
            check_mask(name, tokens, b, n)
        if scores is None:
            scores = self.score(x)
        elif scores.shape != (b, n):
            raise ValueError(f"Router got scores of shape {tuple(scores.shape)}, expected {(b, n)}, one for each token")
        valid = mask if forbidden is None else ~forbidden if mask is None else mask & ~forbidden
        if forced is not None and valid is not None:
            forced = forced & valid
        candidates = self._candidates(scores, mask, valid, forced)
        ranking = self.routing.rank(candidates).detach()
        if forced is not None:
            ranking = ranking.masked_fill(forced, math.inf)
        if valid is not None:
            ranking = ranking.masked_fill(~valid, -math.inf)
        quick = None if valid is not None else choose_untied(ranking, candidates.slots)
        if quick is None:
            chosen = choose(ranking, candidates.quota, candidates.slots)
            indices, used = places(chosen, candidates.slots)
        else:
            chosen, indices, used = quick
        weights = self.routing.weigh(candidates, chosen)
        tap("routing_scores", scores)
        return Routed(
            tap("routed", indices),
            tap("routing_weights", weights.gather(-1, indices).masked_fill(~used, 0.0)),
            used,
        )

    def _candidates(
        self, scores: Tensor, mask: Tensor | None, valid: Tensor | None, forced: Tensor | None
    ) -> Candidates:
        slack, n = self.slack if self.training else 1.0, scores.shape[-1]
        m = self.budget.tokens(n)
        slots = min(n, _share(slack, m))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        most = math.ceil(self.total * m)
        if mask is None:
            return Candidates(scores, valid, forced, self.total * m, most, slots, slots)
        lengths = mask.sum(-1)
        rows = self.budget.tokens(lengths)
        quota = torch.minimum(_share(slack, rows), lengths)
        return Candidates(scores, valid, forced, self.total * rows, most, quota, slots)


def choose_untied(ranking: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`choose`, and :func:`places` of it, by one sort; None where there is a tie for the last slot.

    Looks into the numbers, and so serves neither a graph of any kind nor a device that would have to be waited for.
    """
    if torch.is_grad_enabled() or not readable(ranking) or slots == ranking.shape[-1]:
        return None
    best = ranking.topk(slots, -1)
    chosen = ranking >= best.values[:, -1:]
    if not bool((chosen.sum(-1) == slots).all()):
        return None
    return chosen, best.indices.sort(-1).values, torch.ones_like(best.indices, dtype=torch.bool)


def choose(ranking: Tensor, quota: int | Tensor, slots: int) -> Tensor:
    """The ``quota`` (a number, or (b,)) <= ``slots`` tokens of the highest ``ranking`` (b, n), as a mask (b, n).

    Tokens of rank minus infinity are never among them; of equal ones the earlier is.
    """
    best = ranking.topk(slots, -1).values
    # the rank of the last token that is chosen
    if isinstance(quota, Tensor):
        quota = quota[:, None]
        least = best.gather(-1, (quota - 1).clamp(min=0))
    else:
        least = best[:, quota - 1 :]
    above, level = ranking > least, (ranking == least) & (ranking > -math.inf)
    room = quota - above.sum(-1, keepdim=True)
    return above | (level & (level.long().cumsum(-1) <= room))


def places(chosen: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ascending indices (b, slots) of the tokens of the mask ``chosen`` (b, n), and which slots have one."""
    b, n = chosen.shape
    order = chosen.long().cumsum(-1)
    # all others go to one slot too many
    slot = torch.where(chosen, order - 1, slots)
    tokens = torch.arange(n, device=chosen.device).expand(b, n)
    indices = order.new_zeros(b, slots + 1).scatter_(-1, slot, tokens)[:, :slots]
    used = torch.arange(slots, device=chosen.device) < order[:, -1:]
    return indices.cummax(-1).values, used
