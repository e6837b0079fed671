"""Group A, interface: what code around a part relies on without asking."""

from __future__ import annotations

import torch

from tevo.testing.checks import check, close, expect, refuses
from tevo.testing.subject import Subject
from tevo.testing.tolerances import RUNGS


@check("The output has the input's shape and dtype (float64, float32) and is finite.", group="A")
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


@check("Rows of a batch are independent.", group="A")
def check_batch_consistency(s: Subject) -> float:
    """f(x)[i] equals f(x[i:i+1])."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(3, n)
    whole = s.call(module, x)
    return max(close(f"row {i} alone", s.call(module, x[i : i + 1]), whole[i : i + 1], RUNGS["F64"]) for i in range(3))


@check("Lengths 0 and 1 work, and an empty batch.", lambda s: s.any_length(), group="A")
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


@check("Two calls in evaluation give the same bits, and use no random numbers.", group="A")
def check_deterministic(s: Subject) -> float:
    """Same input, same output."""
    module, x = s.make(), s.inputs(2, s.sizes()[0])
    before = torch.get_rng_state()
    first, second = s.call(module, x), s.call(module, x)
    expect(torch.equal(first, second), f"{s.name} gave different outputs for the same input")
    expect(torch.equal(before, torch.get_rng_state()), f"{s.name} drew random numbers in evaluation")
    return 0.0


@check(
    "A form that the card does not claim is refused.",
    lambda s: s.card.role in ("mixer", "block") and s.accepts("causal"),
    group="A",
    house=True,
)
def check_refuses_other_forms(s: Subject) -> float:
    """Refuse what cannot be honoured."""
    for form, value in (("causal", True), ("bidirectional", False)):
        if not s.claims(form):
            refuses(f"{s.name} with causal={value}", lambda value=value: s.make(causal=value))  # type: ignore[misc]
    return 0.0


@check(
    "Without the padding claim a mask is refused.",
    lambda s: s.card.role == "mixer" and not s.claims("padding"),
    group="A",
    house=True,
)
def check_refuses_a_mask(s: Subject) -> float:
    """Never silently ignored."""
    n = s.sizes()[0]
    module, mask = s.make(), torch.ones(2, n, dtype=torch.bool)
    refuses(f"{s.name} with a mask", lambda: s.call(module, s.inputs(2, n), mask=mask))
    return 0.0
