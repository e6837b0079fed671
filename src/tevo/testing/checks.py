"""The shared checks: each asks one question of a :class:`~tevo.testing.subject.Subject` that its card's claims raise.

A check returns the largest difference that it saw (0.0 where it compares nothing) and raises AssertionError with the
figures when the claim does not hold. Everything runs in float64 on signed normal inputs of odd, unequal sizes.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from tevo.contracts import State
from tevo.testing.cost import EXPONENTS, count, declared_flops, growth
from tevo.testing.subject import SeatedResidual, Subject, stateful
from tevo.testing.tolerances import RUNGS, relative_rms


@dataclass(frozen=True)
class Check:
    """A question: what it asks, of whom, and the function that answers."""

    name: str
    asks: str
    applies: Callable[[Subject], bool]
    run: Callable[[Subject], float]
    once: bool = False  # with the first example only, because it is slow
    seat: str = "tokens"  # of what kind of seated module it is asked


CHECKS: list[Check] = []


def check(
    asks: str, applies: Callable[[Subject], bool] = lambda s: True, *, once: bool = False, seat: str = "tokens"
) -> Callable[[Callable[[Subject], float]], Callable[[Subject], float]]:
    """Add a function to ``CHECKS`` under its own name."""

    def add(run: Callable[[Subject], float]) -> Callable[[Subject], float]:
        CHECKS.append(Check(run.__name__.removeprefix("check_"), asks, applies, run, once, seat))
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


@check("The output has the input's shape and dtype (float64, float32) and is finite.")
def check_shape_and_dtype(s: Subject) -> float:
    """Shapes prove nothing, but wrong ones prove a lot."""
    for dtype in (torch.float64, torch.float32):
        module = s.make(dtype=dtype)
        for n in s.sizes():
            x = s.inputs(2, n, dtype=dtype)
            before = x.clone()
            y = s.call(module, x)
            expect(y.dtype == dtype, f"{s.name} turned {dtype} into {y.dtype}")
            expect(bool(y.isfinite().all()), f"{s.name} gave values that are not finite at n={n}")
            expect(torch.equal(x, before), f"{s.name} changed its input in place")
            if s.card.role != "stack":
                expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
    return 0.0


@check("Rows of a batch are independent.")
def check_batch_consistency(s: Subject) -> float:
    """f(x)[i] equals f(x[i:i+1])."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(3, n)
    whole = s.call(module, x)
    return max(close(f"row {i} alone", s.call(module, x[i : i + 1]), whole[i : i + 1], RUNGS["F64"]) for i in range(3))


@check("Lengths 0 and 1 work, and an empty batch.", lambda s: s.any_length())
def check_short_lengths(s: Subject) -> float:
    """The lengths at which most code was never tried."""
    module = s.make()
    for batch, n in ((2, 1), (2, 0), (0, 5)):
        x = s.inputs(batch, n).requires_grad_()
        y = s.call(module, x)
        if s.card.role != "stack":
            expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for input {tuple(x.shape)}")
        expect(bool(y.isfinite().all()), f"{s.name} gave values that are not finite at n={n}")
        if y.requires_grad:
            y.sum().backward()
    return 0.0


@check("Two calls in evaluation give the same bits, and use no random numbers.")
def check_deterministic(s: Subject) -> float:
    """Same input, same output."""
    module, x = s.make(), s.inputs(2, s.sizes()[0])
    before = torch.get_rng_state()
    first, second = s.call(module, x), s.call(module, x)
    expect(torch.equal(first, second), f"{s.name} gave different outputs for the same input")
    expect(torch.equal(before, torch.get_rng_state()), f"{s.name} drew random numbers in evaluation")
    return 0.0


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
    named = [(f"input {i}", x) for i, x in enumerate(inputs)] + list(module.named_parameters())
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


@check("It equals the second formulation in float64: outputs and all gradients, three odd shapes.")
def check_oracle(s: Subject) -> float:
    """Two formulations, always."""
    oracle, most = oracle_of(s), limit(s, "oracle", "F64")
    worst = 0.0
    for batch, n in zip((2, 3, 1), (*s.sizes(), *s.sizes(), *s.sizes())[:3], strict=True):
        for what, module, inputs, ours, theirs in _pairs(s, oracle, batch, n):
            worst = max(worst, compare_gradients(f"{s.name} n={n} {what}", module, inputs, ours, theirs, most))
    return worst


def _pairs(
    s: Subject, oracle: ModuleType, batch: int, n: int
) -> Iterator[tuple[str, nn.Module, list[Tensor], Tensor, Tensor]]:
    """(what, module with the parameters, inputs, ours, theirs) for the role's way of comparing."""
    seated = s.make()
    part = s.part_of(seated)
    x = s.inputs(batch, n).requires_grad_()
    role = s.card.role
    if role == "normaliser":
        m = n + 2
        scores = torch.randn(batch, s.heads, n, m, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        scores.requires_grad_()
        allowed = torch.rand(batch, 1, n, m, generator=torch.Generator().manual_seed(3)) < 0.7
        for name, given in (("", None), ("masked", allowed)):
            yield name, part, [scores], part(scores, given), oracle.reference(part, scores, given)
        return
    if role == "position":
        yield from _position_pairs(s, part, oracle, x, n)
        return
    if role == "residual":
        assert isinstance(seated, SeatedResidual)
        layers = [seated.wrap(layer) for layer in seated.sublayers]
        yield "", seated, [x], seated(x), oracle.reference(part, x, layers)
        return
    if role == "heads":
        context = s.inputs(batch, n + 2, seed=2).requires_grad_()
        for name, given in (("", x), ("cross", context)):
            wanted = oracle.reference(part, x, given)
            yield (
                name,
                part,
                [x, context],
                seated(x, None if given is x else given) + 0 * context.sum(),
                wanted + 0 * context.sum(),
            )
        return
    if role in ("channel", "norm"):
        yield "", part, [x], s.call(seated, x), oracle.reference(part, x)
        return
    for causal in (False, True):
        if not s.claims("causal" if causal else "bidirectional"):
            continue
        if s.card.role in ("mixer", "block") or causal == s.seat_causal:
            module = s.make(causal=causal)
            form = "causal" if causal else "bidirectional"
            yield form, module, [x], s.call(module, x), oracle.reference(module, x)
            if s.claims("padding"):
                mask = torch.ones(batch, n, dtype=torch.bool)
                mask[0, n - n // 3 :] = False
                keep = mask[..., None]
                ours, theirs = s.call(module, x, mask=mask), oracle.reference(module, x, mask=mask)
                if s.card.role != "stack":
                    ours, theirs = ours.where(keep, 0.0), theirs.where(keep, 0.0)
                yield f"{form}, masked", module, [x], ours, theirs
            if s.claims("cross") and is_mixer_like(s):
                context = s.inputs(batch, n + 3, seed=2).requires_grad_()
                yield (
                    f"{form}, cross",
                    module,
                    [x, context],
                    s.call(module, x, context),
                    oracle.reference(module, x, context),
                )


def _position_pairs(
    s: Subject, part: nn.Module, oracle: ModuleType, x: Tensor, n: int
) -> Iterator[tuple[str, nn.Module, list[Tensor], Tensor, Tensor]]:
    batch, e, m = len(x), s.dim // s.heads, n + 2
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(batch, s.heads, n, e, generator=generator, dtype=torch.float64).requires_grad_()
    k = torch.randn(batch, s.heads, m, e, generator=generator, dtype=torch.float64).requires_grad_()
    k_at = torch.arange(m)[None] + torch.arange(batch)[:, None]
    q_at = torch.arange(m - n, m)[None] + torch.arange(batch)[:, None]
    bias = part.bias(q, k, q_at, k_at)  # type: ignore[operator]
    turned_q, turned_k = part.turn(q, k, q_at, k_at)  # type: ignore[operator]
    ours = turned_q @ turned_k.mT * e**-0.5
    ours = ours if bias is None else ours + bias
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    theirs = oracle.reference(part, q, k, q_at, k_at)
    # a causal position says nothing about later keys
    if getattr(part, "causal", False):
        ours, theirs = ours.where(causal, 0.0), theirs.where(causal, 0.0)
    yield "scores", part, [q, k], ours, theirs
    if hasattr(oracle, "embed"):
        at = torch.arange(n)[None]
        yield "embed", part, [x], part.embed(x, at), oracle.embed(part, x, at)  # type: ignore[operator]


@check("Every parameter gets a gradient that is not zero.")
def check_every_parameter_gets_a_gradient(s: Subject) -> float:
    """A parameter without one is not part of the model."""
    module = s.make()
    n = max(s.sizes())
    # a part without parameters must still pass a gradient on
    x = s.inputs(2, n).requires_grad_()
    y = s.call(module, x)
    generator = torch.Generator().manual_seed(9)
    (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum().backward()
    for name, parameter in (("(the input)", x), *module.named_parameters()):
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        expect(reached, f"{s.name}: {name} got no gradient")
    return 0.0


@check("Causal: the gradient of output t with respect to later inputs is zero, to some earlier input it is not.",
       lambda s: s.claims("causal") and (is_mixer_like(s) or s.card.role == "block"))  # fmt: skip
def check_causal(s: Subject) -> float:
    """By gradient, because a changed value can hide behind rounding."""
    module = s.make(causal=True)
    most = limit(s, "causal", "EXACT")
    n = s.sizes()[0]
    x = s.inputs(2, n).requires_grad_()
    y = s.call(module, x)
    weight = torch.randn(s.dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    worst, looks_back = 0.0, False
    for t in range(n):
        (gradient,) = torch.autograd.grad((y[:, t] * weight).sum(), x, retain_graph=True)
        leak = float(gradient[:, t + 1 :].abs().max()) / (float(gradient.abs().max()) or 1.0) if t + 1 < n else 0.0
        expect(
            leak <= most,
            f"{s.name}: output {t} depends on later inputs, relative gradient {leak:.2e} (at most {most:.0e})",
        )
        worst = max(worst, leak)
        looks_back = looks_back or bool((gradient[:, :t] != 0).any())
    expect(looks_back, f"{s.name}: no output depends on an earlier input")
    return worst


@check("Future tokens do not change the past: f(x)[:t] equals f(x[:t]).",
       lambda s: s.claims("causal") and s.any_length() and (is_mixer_like(s) or s.card.role == "block"))  # fmt: skip
def check_prefix(s: Subject) -> float:
    """Catches what gradients miss: normalisers that count the whole sequence."""
    module, n = s.make(causal=True), s.sizes()[-1]
    x = s.inputs(2, n)
    whole = s.call(module, x)
    cuts = (1, n // 3, n // 2, n - 1)
    return max(close(f"prefix {t} of {n}", s.call(module, x[:, :t]), whole[:, :t], RUNGS["F64"]) for t in cuts)


@check(
    "A form that the card does not claim is refused.",
    lambda s: s.card.role in ("mixer", "block") and s.accepts("causal"),
)
def check_refuses_other_forms(s: Subject) -> float:
    """Refuse what cannot be honoured."""
    for form, value in (("causal", True), ("bidirectional", False)):
        if not s.claims(form):
            refuses(f"{s.name} with causal={value}", lambda value=value: s.make(causal=value))  # type: ignore[misc]
    return 0.0


@check("Cross: n != m runs and the context changes the output.", lambda s: s.claims("cross") and is_mixer_like(s))
def check_cross(s: Subject) -> float:
    """One class serves self and cross use."""
    module = s.make(causal=False if s.claims("bidirectional") else None)
    x = s.inputs(2, s.sizes()[0])
    for m in (s.sizes()[0] - 2, s.sizes()[0] + 4):
        one, other = s.inputs(2, m, seed=2), s.inputs(2, m, seed=3)
        y = s.call(module, x, one)
        expect(y.shape == x.shape, f"{s.name} gave shape {tuple(y.shape)} for n={x.shape[1]}, m={m}")
        expect(relative_rms(y, s.call(module, x, other)) > 1e-6, f"{s.name} ignores its context")
    return 0.0


@check("Padding: its content (NaN too), amount and side change nothing on real tokens.",
       lambda s: s.claims("padding") and takes_mask(s) and s.card.role != "stack")  # fmt: skip
def check_padding(s: Subject) -> float:
    """Masked equals truncated."""
    worst = 0.0
    n = max(1, s.sizes()[0] - 4) if s.any_length() else s.sizes()[0]
    x = s.inputs(2, n)
    for causal in (False, True):
        if not s.claims("causal" if causal else "bidirectional"):
            continue
        module = s.make(causal=causal)
        plain = s.call(module, x)
        for before, after in ((0, 3), (4, 0), (2, 1)):
            for junk in (0.0, 1e3, float("nan")):
                padded = torch.full((2, before + n + after, s.dim), junk, dtype=torch.float64)
                padded[:, before : before + n] = x
                mask = torch.zeros(2, before + n + after, dtype=torch.bool)
                mask[:, before : before + n] = True
                at = (mask.long().cumsum(1) - 1).clamp(min=0)
                leaf = padded.clone().requires_grad_()
                y = s.call(module, leaf, mask=mask, at=at)[:, before : before + n]
                where = f"{s.name} causal={causal}, {before} before and {after} after filled with {junk}"
                worst = max(worst, close(where, y, plain, RUNGS["F64"]))
                (gradient,) = torch.autograd.grad(y.sum(), leaf)
                expect(bool(gradient[mask].isfinite().all()), f"{where}: gradients of real tokens are not finite")
    return worst


@check("A row without any real token gives a defined value and finite gradients.",
       lambda s: s.claims("padding") and takes_mask(s) and s.any_length())  # fmt: skip
def check_all_padding(s: Subject) -> float:
    """An empty row must not poison the batch."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(2, n).requires_grad_()
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1] = False
    y = s.call(module, x, mask=mask)
    y.sum().backward()
    expect(bool(y.isfinite().all()), f"{s.name}: outputs are not finite where a row is all padding")
    assert x.grad is not None
    expect(bool(x.grad.isfinite().all()), f"{s.name}: gradients are not finite where a row is all padding")
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            expect(bool(parameter.grad.isfinite().all()), f"{s.name}: gradient of {name} is not finite")
    return 0.0


@check("Without the padding claim a mask is refused.", lambda s: s.card.role == "mixer" and not s.claims("padding"))
def check_refuses_a_mask(s: Subject) -> float:
    """Never silently ignored."""
    n = s.sizes()[0]
    module, mask = s.make(), torch.ones(2, n, dtype=torch.bool)
    refuses(f"{s.name} with a mask", lambda: s.call(module, s.inputs(2, n), mask=mask))
    return 0.0


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


@check("Exact state: stepping over any split equals one pass, values and gradients.", lambda s: s.claims("exact_state"))
def check_exact_state(s: Subject) -> float:
    """Parallel, chunked and token by token are one function."""
    module = s.make(causal=True)
    n = s.sizes()[-1] if s.any_length() else s.sizes()[0]
    x = s.inputs(2, n).requires_grad_()
    whole = s.call(module, x)
    worst = 0.0
    for pieces in ((1,) * n, (n,), (4, 1, n - 5), (n // 2, n - n // 2)):
        with torch.no_grad():
            worst = max(
                worst, close(f"{s.name} in pieces {pieces}", step_through(s, module, x, pieces), whole, RUNGS["F64"])
            )
    stepped = step_through(s, module, x, (3, 1, n - 4))
    return max(worst, compare_gradients(f"{s.name} stepped", module, [x], stepped, whole, RUNGS["F64"]))


@check("Exact state: rows of a batch may be exchanged between steps (beam search).", lambda s: s.claims("exact_state"))
def check_state_reorders(s: Subject) -> float:
    """The batch is dimension 0 of every leaf."""
    module, n = s.make(causal=True), s.sizes()[0]
    owner, x = stateful(module), s.inputs(3, s.sizes()[0])
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        _, state = owner.step(x[:, : n // 2], owner.init_state(3))
        state = reorder(state, order)
        y, _ = owner.step(x[:, n // 2 :], state)
        wanted = s.call(module, torch.cat([x[order, : n // 2], x[:, n // 2 :]], 1))[:, n // 2 :]
    return close(f"{s.name} after reordering", y, wanted, RUNGS["F64"])


def reorder(state: State, order: Tensor) -> State:
    """Rows of a state picked by ``order`` (b,)."""
    return state[order] if isinstance(state, Tensor) else tuple(reorder(item, order) for item in state)


@check("Exact state: a left-padded prefill equals the unpadded one.",
       lambda s: s.claims("exact_state") and s.claims("padding") and s.any_length())  # fmt: skip
def check_padded_prefill(s: Subject) -> float:
    """Without a mask in step this is wrong by O(1)."""
    module, n = s.make(causal=True), s.sizes()[0]
    owner, x = stateful(module), s.inputs(2, s.sizes()[0])
    whole = s.call(module, x)
    padded = torch.cat([torch.full((2, 3, s.dim), 7.0, dtype=x.dtype), x[:, : n - 4]], 1)
    mask = torch.ones(2, 3 + n - 4, dtype=torch.bool)
    mask[:, :3] = False
    at = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        first, state = owner.step(padded, owner.init_state(2), mask=mask, at=at)
        rest = [first[:, 3:]]
        for t in range(n - 4, n):
            y, state = owner.step(x[:, t : t + 1], state, at=torch.full((2, 1), t))
            rest.append(y)
    return close(f"{s.name} after a left-padded prefill", torch.cat(rest, 1), whole, RUNGS["F64"])


@check("Lossy state: its shapes become constant, and while nothing is forgotten a step equals a pass.",
       lambda s: s.claims("lossy_state") and s.card.role in ("mixer", "block"))  # fmt: skip
def check_lossy_state(s: Subject) -> float:
    """What it forgets must be bounded, what it keeps must be right."""
    owner = stateful(s.make(causal=True))
    x = s.inputs(2, s.sizes()[-1])
    with torch.no_grad():
        state, shapes = owner.init_state(2), []
        for _ in range(6):
            _, state = owner.step(x, state)
            shapes.append([tuple(leaf.shape) for leaf in leaves(state)])
    expect(shapes[-1] == shapes[-2], f"{s.name}: the state still grows after six segments")
    return 0.0


@check("Equivariant: permuting the tokens permutes the outputs.",
       lambda s: s.claims("equivariant") and s.claims("bidirectional"))  # fmt: skip
def check_equivariant(s: Subject) -> float:
    """No order inside."""
    module, n = s.make(causal=False), s.sizes()[0]
    x, order = s.inputs(2, n), torch.randperm(n, generator=torch.Generator().manual_seed(4))
    return close(f"{s.name} permuted", s.call(module, x[:, order]), s.call(module, x)[:, order], RUNGS["F64"])


@check("Shift-invariant: adding a constant to all positions changes nothing.",
       lambda s: s.claims("shift_invariant") and is_mixer_like(s))  # fmt: skip
def check_shift_invariant(s: Subject) -> float:
    """Distances only."""
    module, n = s.make(), s.sizes()[0]
    x, at = s.inputs(2, n), torch.arange(n)[None]
    return close(f"{s.name} shifted by 100", s.call(module, x, at=at + 100), s.call(module, x, at=at), RUNGS["F64"])


@check("A position changes what attention computes.", lambda s: s.card.role == "position")
def check_position_matters(s: Subject) -> float:
    """Guards against a mechanism that does nothing."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(2, n)
    order = torch.cat([torch.arange(n - 1).flip(0), torch.tensor([n - 1])])
    moved = s.call(module, x[:, order])[:, -1]
    expect(
        relative_rms(moved, s.call(module, x)[:, -1]) > 1e-6, f"{s.name}: the order of earlier tokens changes nothing"
    )
    return 0.0


@check("Token-wise: token i's output depends on token i alone.", lambda s: s.claims("token_wise"))
def check_token_wise(s: Subject) -> float:
    """No mixing where none is claimed."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(2, n)
    other = s.inputs(2, n, seed=2)
    other[:, n // 2] = x[:, n // 2]
    return close(s.name, s.call(module, other)[:, n // 2], s.call(module, x)[:, n // 2], RUNGS["EXACT"])


@check("Identity at start: freshly built, it returns its input.", lambda s: s.claims("identity_at_start"))
def check_identity_at_start(s: Subject) -> float:
    """As ReZero and its kin promise."""
    x = s.inputs(2, s.sizes()[0])
    return close(s.name, s.call(s.make(disturbed=False), x), x, RUNGS["EXACT"])


@check("A NaN at one position never reaches earlier ones.", lambda s: s.claims("nan_contained") and s.claims("causal"))
def check_nan_contained(s: Subject) -> float:
    """One bad token must not spoil what came before it."""
    module, n = s.make(causal=True), s.sizes()[0]
    x = s.inputs(2, n)
    plain = s.call(module, x)
    x[:, n // 2] = float("nan")
    return close(s.name, s.call(module, x)[:, : n // 2], plain[:, : n // 2], RUNGS["F64"])


@check("The state dict round-trips: a second instance with it gives the same bits.")
def check_state_dict(s: Subject) -> float:
    """What is saved is what is needed."""
    one, two = s.make(), s.make(disturbed=False)
    saved = copy.deepcopy(one.state_dict())
    for name, tensor in saved.items():
        expect(not tensor.is_complex(), f"{s.name}: {name} is complex; store it as a pair of reals")
    two.load_state_dict(saved)
    x = s.inputs(2, s.sizes()[0])
    expect(torch.equal(s.call(one, x), s.call(two, x)), f"{s.name}: outputs differ after loading the state dict")
    return 0.0


@check("torch.compile traces it as one graph, with the same values and gradients.", once=True)
def check_compiles(s: Subject) -> float:
    """Traced with the aot_eager backend: the graph is tested, not the code generator."""
    module = s.make()
    x = s.inputs(2, s.sizes()[0]).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: s.call(module, y), fullgraph=True, backend="aot_eager", dynamic=False)
    try:
        ours = compiled(x)
        return compare_gradients(f"{s.name} compiled", module, [x], ours, s.call(module, x), RUNGS["F64"])
    finally:
        torch._dynamo.reset()


@check("Counted FLOPs grow with the length as the card declares.", once=True)
def check_cost(s: Subject) -> float:
    """Fitted on meta tensors over three octaves."""
    found = growth(s)
    exponent = found["exponent"]
    if exponent is None:
        expect(not s.card.flops, f"{s.name}: the card declares FLOPs but none are counted")
        return 0.0
    assert isinstance(exponent, float)
    least, most = EXPONENTS[s.card.cost]
    expect(least <= exponent <= most, f"{s.name}: FLOPs grow as n^{exponent}, the card declares {s.card.cost}")
    return 0.0


@check("Counted FLOPs equal the card's formula within 1 %.", lambda s: bool(s.card.flops))
def check_flops(s: Subject) -> float:
    """At the part's own odd lengths."""
    worst = 0.0
    for n in s.sizes():
        counted, declared = count(s, n), declared_flops(s, n)
        gap = abs(counted - declared) / max(counted, 1)
        expect(gap <= 0.01, f"{s.name}: {counted} FLOPs counted at n={n}, the card's formula gives {declared:.0f}")
        worst = max(worst, gap)
    return worst


def applicable(s: Subject, *, first: bool) -> list[Check]:
    """The checks that the subject's claims raise."""
    return [c for c in CHECKS if c.seat == s.seat and c.applies(s) and (first or not c.once)]
