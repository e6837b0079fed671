"""Group B, mathematics: the part computes what its paper says, and sees what it may see."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from tevo.testing.checks import (
    check,
    close,
    compare_gradients,
    expect,
    is_mixer_like,
    leaves,
    limit,
    oracle_of,
    reorder,
    step_through,
    takes_mask,
)
from tevo.testing.subject import SeatedResidual, Subject, stateful
from tevo.testing.tolerances import RUNGS, relative_rms


@check(
    "It equals the second formulation in float64: outputs and all gradients, three odd shapes.", group="B", house=True
)
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


@check(
    "Causal: the gradient of output t with respect to later inputs is zero, to some earlier input it is not.",
    lambda s: s.claims("causal") and (is_mixer_like(s) or s.card.role == "block"),
    group="B",
)
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


@check(
    "Future tokens do not change the past: f(x)[:t] equals f(x[:t]).",
    lambda s: s.claims("causal") and s.any_length() and (is_mixer_like(s) or s.card.role == "block"),
    group="B",
)
def check_prefix(s: Subject) -> float:
    """Catches what gradients miss: normalisers that count the whole sequence."""
    module, n = s.make(causal=True), s.sizes()[-1]
    x = s.inputs(2, n)
    whole = s.call(module, x)
    cuts = (1, n // 3, n // 2, n - 1)
    return max(close(f"prefix {t} of {n}", s.call(module, x[:, :t]), whole[:, :t], RUNGS["F64"]) for t in cuts)


@check(
    "Cross: n != m runs and the context changes the output.",
    lambda s: s.claims("cross") and is_mixer_like(s),
    group="B",
)
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


@check(
    "Padding: its content (NaN too), amount and side change nothing on real tokens.",
    lambda s: s.claims("padding") and takes_mask(s) and s.card.role != "stack",
    group="B",
)
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
        for before, after in s.through("paddings"):
            for junk in (0.0, 1e3, float("nan")):
                padded = torch.full((len(x), before + n + after, s.dim), junk, dtype=torch.float64)
                padded[:, before : before + n] = x
                mask = torch.zeros(len(x), before + n + after, dtype=torch.bool)
                mask[:, before : before + n] = True
                at = (mask.long().cumsum(1) - 1).clamp(min=0)
                leaf = padded.clone().requires_grad_()
                y = s.call(module, leaf, mask=mask, at=at)[:, before : before + n]
                where = f"{s.name} causal={causal}, {before} before and {after} after filled with {junk}"
                worst = max(worst, close(where, y, plain, RUNGS["F64"]))
                (gradient,) = torch.autograd.grad(y.sum(), leaf)
                expect(bool(gradient[mask].isfinite().all()), f"{where}: gradients of real tokens are not finite")
    return worst


@check(
    "A row without any real token gives a defined value and finite gradients.",
    lambda s: s.claims("padding") and takes_mask(s) and s.any_length(),
    group="B",
)
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


@check(
    "Exact state: stepping over any split equals one pass, values and gradients.",
    lambda s: s.claims("exact_state"),
    group="B",
)
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


@check(
    "Exact state: rows of a batch may be exchanged between steps (beam search).",
    lambda s: s.claims("exact_state"),
    group="B",
)
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


@check(
    "Exact state: a left-padded prefill equals the unpadded one.",
    lambda s: s.claims("exact_state") and s.claims("padding") and s.any_length(),
    group="B",
)
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


@check(
    "Lossy state: its shapes become constant, and while nothing is forgotten a step equals a pass.",
    lambda s: s.claims("lossy_state") and s.card.role in ("mixer", "block"),
    group="B",
)
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


@check(
    "Equivariant: permuting the tokens permutes the outputs.",
    lambda s: s.claims("equivariant") and s.claims("bidirectional"),
    group="B",
)
def check_equivariant(s: Subject) -> float:
    """No order inside."""
    module, n = s.make(causal=False), s.sizes()[0]
    x, order = s.inputs(2, n), torch.randperm(n, generator=torch.Generator().manual_seed(4))
    return close(f"{s.name} permuted", s.call(module, x[:, order]), s.call(module, x)[:, order], RUNGS["F64"])


@check(
    "Shift-invariant: adding a constant to all positions changes nothing.",
    lambda s: s.claims("shift_invariant") and is_mixer_like(s),
    group="B",
)
def check_shift_invariant(s: Subject) -> float:
    """Distances only."""
    module, n = s.make(), s.sizes()[0]
    x, at = s.inputs(2, n), torch.arange(n)[None]
    return close(f"{s.name} shifted by 100", s.call(module, x, at=at + 100), s.call(module, x, at=at), RUNGS["F64"])


@check("A position changes what attention computes.", lambda s: s.card.role == "position", group="B")
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


@check("Token-wise: token i's output depends on token i alone.", lambda s: s.claims("token_wise"), group="B")
def check_token_wise(s: Subject) -> float:
    """No mixing where none is claimed."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(2, n)
    other = s.inputs(2, n, seed=2)
    other[:, n // 2] = x[:, n // 2]
    return close(s.name, s.call(module, other)[:, n // 2], s.call(module, x)[:, n // 2], RUNGS["EXACT"])


@check("Identity at start: freshly built, it returns its input.", lambda s: s.claims("identity_at_start"), group="B")
def check_identity_at_start(s: Subject) -> float:
    """As ReZero and its kin promise."""
    x = s.inputs(2, s.sizes()[0])
    return close(s.name, s.call(s.make(disturbed=False), x), x, RUNGS["EXACT"])


@check("Gradients are those of the function: directional derivatives by differences, in float64.", once=True, group="B")
def check_gradient(s: Subject) -> float:
    """A hand-written backward pass, a detach or a cast shows here, whatever the second formulation says."""
    module = s.make()
    n = s.sizes()[0]
    x = s.inputs(2, min(n, 9) if s.any_length() else n)
    parameters = [p for p in module.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(11)
    leaves = [x.requires_grad_(), *parameters]
    ways = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    # together of length one, so that the steps stay within the part's smooth pieces (ReLU, choices of tokens)
    size = sum(float(way.square().sum()) for way in ways) ** 0.5
    ways = [way / size for way in ways]
    y = s.call(module, x)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((y * cotangent).sum(), leaves, allow_unused=True)
    slope = sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None)

    @torch.no_grad()
    def moved(by: float) -> float:
        for leaf, way in zip(leaves, ways, strict=True):
            leaf.add_(way, alpha=by)
        value = float((s.call(module, x) * cotangent).sum())
        for leaf, way in zip(leaves, ways, strict=True):
            leaf.sub_(way, alpha=by)
        return value

    # fourth-order differences: their error is h^4 and rounding / h, together far below the limit
    h = 1e-4
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    gap = abs(difference - slope) / max(abs(slope), 1e-3 * float(y.detach().norm()), 1e-300)
    expect(
        gap <= limit(s, "gradient", "F32"),
        f"{s.name}: backward gives the slope {slope:.9g}, differences {difference:.9g}",
    )
    return gap
