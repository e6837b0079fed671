"""Group C, numerics: bad and extreme numbers stay where they are."""

from __future__ import annotations

import copy

import torch

from tevo.testing.checks import check, close, expect, limit
from tevo.testing.subject import Subject
from tevo.testing.tolerances import RUNGS


@check("Every parameter gets a gradient that is not zero.", group="C")
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
        if not parameter.requires_grad:
            continue
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        expect(reached, f"{s.name}: {name} got no gradient")
    return 0.0


@check(
    "A NaN at one position never reaches earlier ones.",
    lambda s: s.claims("nan_contained") and s.claims("causal"),
    group="C",
)
def check_nan_contained(s: Subject) -> float:
    """One bad token must not spoil what came before it."""
    module, n = s.make(causal=True), s.sizes()[0]
    x = s.inputs(2, n)
    plain = s.call(module, x)
    x[:, n // 2] = float("nan")
    return close(s.name, s.call(module, x)[:, : n // 2], plain[:, : n // 2], RUNGS["F64"])


@check("A NaN in one row of a batch stays in it.", group="C")
def check_nan_row(s: Subject) -> float:
    """One bad sample must not spoil the others' outputs."""
    module, n = s.make(), s.sizes()[0]
    x = s.inputs(3, n)
    plain = s.call(module, x)
    x[1] = float("nan")
    keep = torch.tensor([0, 2])
    return close("the other rows", s.call(module, x)[keep], plain[keep], RUNGS["F64"])


@check("Inputs of 1e-30, 1e4 and zero in float32 give finite outputs and gradients.", group="C")
def check_extremes(s: Subject) -> float:
    """Exponentials, divisions and squares overflow first where nobody looks."""
    module, n = s.make(dtype=torch.float32), s.sizes()[0]
    for size in (1e-30, 1e4, 0.0):
        x = (s.inputs(2, n, dtype=torch.float32) * size).requires_grad_()
        y = s.call(module, x)
        expect(bool(y.isfinite().all()), f"{s.name}: inputs of size {size:g} give outputs that are not finite")
        if y.requires_grad:
            gradients = torch.autograd.grad(
                y.sum(), [x, *(p for p in module.parameters() if p.requires_grad)], allow_unused=True
            )
            finite = all(bool(g.isfinite().all()) for g in gradients if g is not None)
            expect(finite, f"{s.name}: inputs of size {size:g} give gradients that are not finite")
    return 0.0


@check("In bfloat16 it computes what it computes in float32 with the same weights, within 2 %.", group="C")
def check_bfloat16(s: Subject) -> float:
    """Sums, decays and positions kept in half precision drift; what needs more must keep more."""
    half = s.make(dtype=torch.bfloat16)
    full = copy.deepcopy(half).to(torch.float32)
    x = s.inputs(2, s.sizes()[0], dtype=torch.bfloat16)
    with torch.no_grad():
        y, wanted = s.call(half, x), s.call(full, x.to(torch.float32))
    expect(y.dtype == torch.bfloat16, f"{s.name} turned bfloat16 into {y.dtype}")
    return close(f"{s.name} in bfloat16", y, wanted, limit(s, "bfloat16", "BF16"))
