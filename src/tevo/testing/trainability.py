"""Group F, trainability: an optimiser gets somewhere with it."""

from __future__ import annotations

import torch
from torch import nn

from tevo.testing.checks import check, expect
from tevo.testing.cost import Called
from tevo.testing.subject import Subject

# steps of Adam, and the share of the loss that must be gone after them
STEPS, LEFT = 200, 0.6


@check("Adam halves the loss on a small fixed batch, with a linear layer before and after it.", once=True, group="F")
def check_learns(s: Subject) -> float:
    """A part can be right and still not be trainable: dead units, vanishing gradients, bad initial values."""
    part = Called(s, s.make(dtype=torch.float32, disturbed=False).train())
    x = s.inputs(2, min(s.sizes()), dtype=torch.float32)
    torch.manual_seed(0)
    before, after = nn.Linear(s.dim, s.dim), nn.Linear(s.dim, s.dim)
    target = torch.randn(part(before(x)).shape, generator=torch.Generator().manual_seed(2))
    parameters = [*part.parameters(), *before.parameters(), *after.parameters()]
    adam = torch.optim.Adam(parameters, lr=2e-2)
    losses = []
    for _ in range(STEPS):
        adam.zero_grad()
        loss = (after(part(before(x))) - target).square().mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if losses[-1] <= LEFT * losses[0]:
            return 0.0
    raise AssertionError(
        f"{s.name}: the loss went from {losses[0]:.3f} to {min(losses):.3f} in {STEPS} steps, expected {LEFT:g} of it"
    )


@check("What no_decay() names are parameters of the part.", group="F")
def check_no_decay(s: Subject) -> float:
    """A name that is misspelt there decays what must not be."""
    for module in s.make(disturbed=False).modules():
        named = getattr(module, "no_decay", None)
        if callable(named):
            own = {name for name, _ in module.named_parameters()}
            stray = set(named()) - own
            expect(
                not stray, f"{s.name}: no_decay() of {type(module).__name__} names {sorted(stray)}, which it has not"
            )
    return 0.0
