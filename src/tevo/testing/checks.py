"""The shared checks: each asks one question of a :class:`~tevo.testing.subject.Subject` that its card's claims raise.

A check returns the largest difference that it saw (0.0 where it compares nothing) and raises AssertionError with the
figures when the claim does not hold. Everything runs in float64 on signed normal inputs of odd, unequal sizes, unless
it asks about something else. The checks stand in the modules of their groups; this one holds what they share.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from tevo.contracts import State
from tevo.testing.subject import Subject, stateful
from tevo.testing.tolerances import RUNGS, relative_rms


@dataclass(frozen=True)
class Check:
    """A question: what it asks, of whom, and the function that answers; its docstring says why it is asked."""

    name: str
    group: str
    asks: str
    applies: Callable[[Subject], bool]
    run: Callable[[Subject], float]
    once: bool = False  # with the first example only, because it is slow
    seat: str = "tokens"  # of what kind of seated module it is asked
    house: bool = False  # a rule of the house, not asked of a user's part

    @property
    def why(self) -> str:
        """Why it matters, in a sentence."""
        return " ".join((self.run.__doc__ or "").split())


# letter -> what the checks of the group are about
GROUPS = {
    "A": "interface",
    "B": "mathematics",
    "C": "numerics",
    "D": "systems",
    "E": "declared cost",
    "F": "trainability",
}
# the fast tier
FAST = "ABC"
CHECKS: list[Check] = []


def check(
    asks: str,
    applies: Callable[[Subject], bool] = lambda s: True,
    *,
    group: str = "B",
    once: bool = False,
    seat: str = "tokens",
    house: bool = False,
) -> Callable[[Callable[[Subject], float]], Callable[[Subject], float]]:
    """Add a function to ``CHECKS`` under its own name; a user's part is asked what is no rule of the house."""

    def add(run: Callable[[Subject], float]) -> Callable[[Subject], float]:
        CHECKS.append(Check(run.__name__.removeprefix("check_"), group, asks, applies, run, once, seat, house))
        return run

    return add


def limit(subject: Subject, name: str, rung: str) -> float:
    """The rung's limit, or that of the looser rung which the card gives with a reason."""
    return RUNGS[subject.card.tolerances.get(name, (rung, ""))[0]]


def close(what: str, ours: Tensor, theirs: Tensor, most: float) -> float:
    """The relative RMS difference, at most ``most``."""
    gap = relative_rms(ours, theirs)
    if not gap <= most:
        raise AssertionError(f"{what}: relative RMS difference {gap:.2e}, at most {most:.0e} allowed")
    return gap


def expect(holds: bool, sentence: str) -> None:
    """Raise with a sentence unless a claim holds."""
    if not holds:
        raise AssertionError(sentence)


def refuses(what: str, action: Callable[[], object]) -> None:
    """The action must raise ValueError."""
    try:
        action()
    except ValueError:
        return
    raise AssertionError(f"{what} was accepted, expected a ValueError that says why not")


def is_mixer_like(s: Subject) -> bool:
    """Whether the subject mixes tokens in a seat with mask, context and positions."""
    return s.card.role in ("mixer", "normaliser", "heads", "position")


def takes_mask(s: Subject) -> bool:
    """Whether the role's signature has a mask."""
    return is_mixer_like(s) or s.card.role in ("block", "stack", "channel")


def oracle_of(s: Subject) -> ModuleType:
    """The second formulation.

    Raises:
        AssertionError: there is none.
    """
    try:
        return importlib.import_module(f"tevo.testing.oracles.{s.card.id}")
    except ModuleNotFoundError as error:
        raise AssertionError(f"{s.card.id} has no oracle: write testing/oracles/{s.card.id}.py") from error


def compare_gradients(
    what: str, module: nn.Module, inputs: list[Tensor], ours: Tensor, theirs: Tensor, most: float
) -> float:
    """Values, and gradients of inputs and all parameters under one random cotangent."""
    worst = close(f"{what}: values", ours, theirs, most)
    if ours.numel() == 0:
        return worst
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(ours.shape, generator=generator, dtype=torch.float64).to(ours.dtype)
    named = [(f"input {i}", x) for i, x in enumerate(inputs)]
    named += [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    leaves = [leaf for _, leaf in named]
    mine = torch.autograd.grad(ours, leaves, cotangent, allow_unused=True)
    other = torch.autograd.grad(theirs, leaves, cotangent, allow_unused=True)
    # gradients that vanish analytically hold rounding noise only: compare on the scale of the largest gradient
    scale = max((float(g.abs().max()) for g in other if g is not None and g.numel()), default=0.0)
    for (name, leaf), a, b in zip(named, mine, other, strict=True):
        a = torch.zeros_like(leaf) if a is None else a
        b = torch.zeros_like(leaf) if b is None else b
        noise = float((a - b).abs().max()) if a.numel() else 0.0
        if noise <= most * scale * 1e-2:
            continue
        worst = max(worst, close(f"{what}: gradient of {name}", a, b, most))
    return worst


def leaves(state: State) -> Iterator[Tensor]:
    """Every tensor of a state."""
    if isinstance(state, Tensor):
        yield state
    else:
        for item in state:
            yield from leaves(item)


def step_through(s: Subject, module: nn.Module, x: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Outputs of stepping through ``x`` in pieces."""
    owner = stateful(module)
    state, outputs, start = owner.init_state(len(x)), [], 0
    for piece in pieces:
        y, state = owner.step(x[:, start : start + piece], state)
        for leaf in leaves(state):
            expect(
                leaf.ndim > 0 and leaf.shape[0] == len(x),
                f"{s.name}: a state leaf has shape {tuple(leaf.shape)}, the batch {len(x)} must be its first size",
            )
        outputs.append(y)
        start += piece
    return torch.cat(outputs, 1)


def reorder(state: State, order: Tensor) -> State:
    """Rows of a state picked by ``order`` (b,)."""
    return state[order] if isinstance(state, Tensor) else tuple(reorder(item, order) for item in state)


def applicable(s: Subject, *, first: bool, groups: str = "".join(GROUPS)) -> list[Check]:
    """The checks of the groups that the subject's claims raise, in the groups' order."""
    found = [
        c
        for c in CHECKS
        if c.group in groups
        and c.seat == s.seat
        and (s.house or not c.house)
        and (first or not c.once)
        and c.applies(s)
    ]
    return sorted(found, key=lambda c: c.group)
