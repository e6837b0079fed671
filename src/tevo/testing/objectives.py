"""The shared checks of objectives: of a loss of a model on a batch, in the seat ``objective``."""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.testing.checks import check, close, compare_gradients, expect, limit, oracle_of
from tevo.testing.cost import EXPONENTS, growth
from tevo.testing.subject import SeatedObjective, Subject
from tevo.testing.tolerances import RUNGS


def made(s: Subject, *, dtype: torch.dtype = torch.float64) -> SeatedObjective:
    """The objective with its model."""
    module = s.make(dtype=dtype)
    assert isinstance(module, SeatedObjective)
    return module


def masks(s: Subject, b: int, n: int) -> list[Tensor | None]:
    """No padding, and where the card claims it some at the end of the first row."""
    if not s.claims("padding"):
        return [None]
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[0, n - n // 3 :] = False
    return [None, mask]


@check("The loss is one finite number of the model's dtype, and so is each of its parts.", group="A", seat="objective")
def check_loss(s: Subject) -> float:
    """What is minimised must be a number."""
    for dtype in (torch.float64, torch.float32):
        module = made(s, dtype=dtype)
        for n in s.sizes():
            for mask in masks(s, 2, n):
                loss = module.objective(module.model, module.batch(2, n, mask=mask))
                for name, value in (("total", loss.total), *loss.parts.items()):
                    expect(value.ndim == 0, f"{s.name}: {name} has shape {tuple(value.shape)}, expected one number")
                    expect(bool(value.isfinite()), f"{s.name}: {name} is {value.item()} at n={n}")
                expect(loss.total.dtype == dtype, f"{s.name} turned {dtype} into {loss.total.dtype}")
    return 0.0


@check("A batch is a function of its seed, and the loss of a batch draws nothing.", group="A", seat="objective")
def check_batch_is_a_function_of_its_seed(s: Subject) -> float:
    """All randomness is in the batch, so that a resumed or sliced run sees the same."""
    module, n = made(s), s.sizes()[0]
    before = torch.get_rng_state()
    one, same, other = (module.batch(3, n, seed=seed) for seed in (1, 1, 2))
    first, second = module(one), module(same)
    expect(torch.equal(before, torch.get_rng_state()), f"{s.name} drew from the global generator")
    expect(torch.equal(first, second), f"{s.name} gave different losses for the same seed")
    expect(not torch.equal(first, module(other)), f"{s.name} gave the same loss for another seed")
    for name, value in one.items():
        expect(len(value) == 3, f"{s.name}: entry {name} of a batch of 3 has shape {tuple(value.shape)}")
    return 0.0


@check("It equals the second formulation in float64: the loss and all gradients.", group="B", seat="objective")
def check_objective_oracle(s: Subject) -> float:
    """Two formulations, always."""
    oracle, most, worst = oracle_of(s), limit(s, "objective_oracle", "F64"), 0.0
    for b, n in zip((2, 3, 1), (*s.sizes(), *s.sizes(), *s.sizes())[:3], strict=True):
        for mask in masks(s, b, n):
            module = made(s)
            batch = module.batch(b, n, mask=mask)
            theirs = oracle.reference(module.objective, module.model, batch)
            worst = max(worst, compare_gradients(f"{s.name} n={n}", module, [], module(batch), theirs, most))
    return worst


@check(
    "The losses of rows of equal length, weighted by their items, are the loss of the batch.",
    group="B",
    seat="objective",
)
def check_slices(s: Subject) -> float:
    """So that micro-batches and processes give the gradient of one big batch."""
    module, n = made(s), s.sizes()[0]
    batch = module.batch(3, n)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    weights = [float(module.objective.items(row)) for row in rows]
    expect(min(weights) > 0, f"{s.name}: a row of {n} tokens counts {weights} items")
    total = torch.stack([weight * module(row) for weight, row in zip(weights, rows, strict=True)]).sum()
    return close(f"{s.name} in rows", total / sum(weights), module(batch), RUNGS["F64"])


@check(
    "Every parameter of the objective and of its model gets a gradient that is not zero.", group="C", seat="objective"
)
def check_every_parameter_is_trained(s: Subject) -> float:
    """A parameter without one is not part of the model."""
    module = made(s)
    module(module.batch(4, max(s.sizes()))).backward()
    for name, parameter in module.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        expect(reached, f"{s.name}: {name} got no gradient")
    return 0.0


@check(
    "torch.compile traces the loss as one graph, with the same value and gradients.",
    once=True,
    group="D",
    seat="objective",
)
def check_loss_compiles(s: Subject) -> float:
    """Traced with the aot_eager backend."""
    module = made(s)
    batch = module.batch(2, s.sizes()[0])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    try:
        return compare_gradients(f"{s.name} compiled", module, [], compiled(batch), module(batch), RUNGS["F64"])
    finally:
        torch._dynamo.reset()


@check("Counted FLOPs of a loss grow with the length as the card declares.", once=True, group="E", seat="objective")
def check_loss_cost(s: Subject) -> float:
    """Fitted on meta tensors over three octaves."""
    exponent = growth(s)["exponent"]
    expect(isinstance(exponent, float), f"{s.name}: no FLOPs are counted")
    assert isinstance(exponent, float)
    holds = abs(exponent - EXPONENTS[s.card.cost]) <= 0.05
    expect(holds, f"{s.name}: FLOPs grow as n^{exponent}, the card declares {s.card.cost}")
    return 0.0
