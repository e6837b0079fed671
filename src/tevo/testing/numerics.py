"""Group C, numerics: bad and extreme numbers stay where they are."""

from __future__ import annotations

import torch

from tevo.testing.checks import check, close, expect
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
